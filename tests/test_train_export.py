"""`sigphi export` and `sigphi merge`: what they write, measure and refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_IMAGES

from sigphi.train import export, merge
from sigphi.train.errors import UserError


@pytest.fixture(scope="module")
def adapter_4bit(save_toy_vlm: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    return save_toy_vlm(tmp_path_factory.mktemp("vlm") / "adapter", bits=4)


@pytest.fixture(scope="module")
def adapter_16bit(save_toy_vlm: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy_vlm(tmp_path_factory.mktemp("vlm") / "adapter16", bits=16)


@pytest.fixture(scope="module")
def words(toy_csv: Path) -> list[str]:
    return ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--parity-questions", "12", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def merged(adapter_4bit: Path, words: list[str]) -> Path:
    folder = adapter_4bit.with_name("merged")
    merge.main([str(adapter_4bit), str(folder), *words])
    return folder


@pytest.fixture(scope="module")
def nf4(adapter_4bit: Path) -> Path:
    folder = adapter_4bit.with_name("nf4")
    export.main([str(adapter_4bit), str(folder), "--form", "nf4", "--parity-questions", "0"])
    return folder


def parity_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "parity.json").read_text(encoding="utf-8"))


def test_merging_measures_and_tells_what_it_changes(merged):
    found = parity_of(merged)
    assert (found["form"], found["base"], found["dtype"]) == ("merged", "dequantized", "float32")
    assert found["compared_with"] == {"form": "adapter", "base_bits": 4}
    assert found["questions"] == found["identical_answers"] == found["logit_questions"] == 12
    assert 0 < found["max_abs_logit_difference"] < 1e-3 and found["next_token_agreement"] == 1
    assert found["metadata"]["questions_from"] == "qa.csv" and "torch" in found["metadata"]
    card = (merged / "README.md").read_text(encoding="utf-8")
    assert "LoRA merged into the de-quantised weights: of 12 questions from `qa.csv`, 12 get the same greedy" in card


def test_the_original_base_changes_more(adapter_4bit, merged, words, tmp_path, capsys):
    merge.main([str(adapter_4bit), str(tmp_path / "merged"), "--base", "original", *words])
    found = parity_of(tmp_path / "merged")
    assert found["base"] == "original" and found["mean_kl"] > 100 * parity_of(merged)["mean_kl"]
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["identical_answers"]) == found["identical_answers"]
    assert float(printed["mean_kl"]) == pytest.approx(found["mean_kl"], rel=1e-4)


def test_a_merge_of_16_bits_answers_as_before(adapter_16bit, words, tmp_path):
    merge.main([str(adapter_16bit), str(tmp_path / "merged"), *words])
    found = parity_of(tmp_path / "merged")
    assert (found["base"], found["compared_with"]["base_bits"], found["identical_answers"]) == (None, 16, 12)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "Compared with the adapter form (language model in 16 bits) that it was made of: of 12" in card


def test_nf4_without_a_comparison(nf4):
    assert not (nf4 / "parity.json").exists()
    assert "Compared" not in (nf4 / "README.md").read_text(encoding="utf-8")
    config = json.loads((nf4 / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4" and config["lora"] is None


def test_nf4_of_a_merged_form_is_compared_with_that(merged, words, tmp_path):
    export.main([str(merged), str(tmp_path / "nf4"), "--form", "nf4", *words])
    found = parity_of(tmp_path / "nf4")
    assert found["compared_with"]["form"] == "merged" and found["base"] is None and found["mean_kl"] > 0
    assert "Compared with the merged form that it was made of: of" in (tmp_path / "nf4" / "README.md").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("export {merged} new --form adapter", "--form adapter: .*merged is in merged form, where LoRA is merged"),
        ("export {adapter} new", "--form must be one of adapter, merged, nf4, got ''"),
        ("export {adapter} new --form gguf", "--form must be one of adapter, merged, nf4, got 'gguf'"),
        ("merge {adapter} {merged}", "OUTPUT .*merged: something is there already. Give a new folder"),
        ("merge {adapter} new --base nf4", "--base must be one of auto, dequantized, original, got 'nf4'"),
        ("merge {adapter} new --dtype int8", "--dtype must be one of auto, bfloat16, float16, float32, got 'int8'"),
        ("merge {adapter16} new --base original", "--base original has no use for .*: its base is not quantised"),
        ("merge {nf4} new --base original", "--base original has no use for .*: nothing is merged"),
        ("export {adapter} new --form adapter --base original", "--base original has no use .* its LoRA stays apart"),
        ("merge {base} new", "MODEL .* is a 'phi' model; give a VLM that `sigphi train-vlm` wrote"),
        ("merge gone/nowhere/x new", "MODEL gone/nowhere/x: there is no model folder"),
        ("merge {homeless} new", "the base of .*homeless, /gone/base: there is no model folder"),
        ("merge {on_nf4} new --base original", "--base original: the base of .*, .*nf4, is stored in 4 bits"),
    ],
)
def test_what_cannot_be_written_is_refused_before_weights_load(
    adapter_4bit, adapter_16bit, merged, nf4, toy_base, tmp_path, monkeypatch, line, message
):
    places = {"adapter": adapter_4bit, "adapter16": adapter_16bit, "merged": merged, "nf4": nf4, "base": toy_base}
    for name, base in (("homeless", "/gone/base"), ("on_nf4", str(nf4))):
        places[name] = shutil.copytree(adapter_4bit, tmp_path / name)
        config = json.loads((places[name] / "config.json").read_text())
        (places[name] / "config.json").write_text(json.dumps(config | {"base_language_model": base}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "export_form", lambda *_: pytest.fail("weights were loaded"))
    command, *rest = line.format(**places).split()
    with pytest.raises(UserError, match=message):
        {"export": export, "merge": merge}[command].main(rest)
    assert not Path("new").exists()
