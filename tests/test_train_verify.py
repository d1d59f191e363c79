"""`sigphi verify` of folders: figures are computed again, and what it says of mistakes."""

import json
import re

import pytest
from conftest import TOY_IMAGES

from sigphi.hub_card.release import RECORD, file_hash, stage
from sigphi.train import evaluation, verify
from sigphi.train.errors import UserError


@pytest.fixture
def release(tiny_encoder, tiny_encoder_processor, toy_csv, tmp_path):
    """A published folder with its figures, and the words that name what these were computed on."""
    folder, target = tmp_path / "model", tmp_path / "release"
    for part in (tiny_encoder, tiny_encoder_processor):
        part.save_pretrained(folder)
    words = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--probe-size", "0"]
    evaluation.main([str(folder), *words])
    target.mkdir()
    stage(folder, target, {})
    return target, words


def test_figures_are_computed_again(release, capsys):
    folder, words = release
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    verify.main([str(folder), *words])
    out = capsys.readouterr().out
    results = json.loads(before["eval_results.json"])
    count = sum(isinstance(value, (int, float)) for value in results.values())
    assert f"{count} figures compared, 0 differ by more than 0.005\n" in out and count > 10
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    results["zero_shot_top1"] += 0.01
    (folder / "eval_results.json").write_text(json.dumps(results))
    record = json.loads((folder / RECORD).read_text())
    record["sha256"]["eval_results.json"] = file_hash(folder / "eval_results.json")
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(SystemExit) as stop:
        verify.main([str(folder), *words])
    now, told = results["zero_shot_top1"] - 0.01, results["zero_shot_top1"]
    assert f"zero_shot_top1: recorded {told:.4f}, now {now:.4f}\n" in capsys.readouterr().out
    assert stop.value.code == verify.DIFFERS
    verify.main([str(folder), *words, "--tolerance", "0.02"])


def test_code_that_is_not_the_installed_one_is_named(release, capsys):
    folder, _ = release
    verify.main([str(folder)])
    assert "not as the sigphi" not in capsys.readouterr().out
    code = folder / "processing_siglip_resnet.py"
    code.write_text(code.read_text() + "# of another version\n")
    record = json.loads((folder / RECORD).read_text())
    record["sha256"][code.name] = file_hash(code)
    (folder.parent / "own.json").write_text(json.dumps(record))
    verify.main([str(folder), "--record", str(folder.parent / "own.json")])
    assert f"not as the sigphi installed here ships it: {code.name}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "MODEL ./nowhere: there is no such folder; give a folder or the id of a repository."),
        (["{folder}", "--revision", "main"], "--revision main is for a repository, and"),
        (["{folder}"], "it has no file_hashes.json, which `sigphi push` writes: there is nothing to compare with."),
        (["{folder}", "--record", "{folder}/bad.json"], "bad.json is no record of hashes (KeyError)"),
        (["{folder}", "--record", "none.json"], "--record none.json: there is nothing to compare with."),
        (["{folder}", "--tolerance", "-1"], "--tolerance must be 0 or more, got -1.0."),
        (["{folder}", "--image-split", "val"], "--image-split must be one of train, test"),
        (["a/b/c"], "MODEL a/b/c: there is no such folder"),
        (["nobody/nothing"], "MODEL nobody/nothing: cannot be read from the Hub (LocalEntryNotFoundError)."),
    ],
)
def test_mistakes_are_user_errors(tmp_path, words, message):
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(message)):
        verify.main([word.format(folder=tmp_path) for word in words])
