"""The benchmark of merging, at toy size."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TOY_IMAGES

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_way_to_export_has_its_line(
    save_toy_vlm: Callable[..., Path], toy_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import merge

    models = [str(save_toy_vlm(tmp_path / f"vlm{bits}", bits=bits)) for bits in (16, 4)]
    options = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--questions", "12", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", ["merge.py", *models, *options, "--results", str(tmp_path / "merge.json")])
    merge.main()
    found = json.loads((tmp_path / "merge.json").read_text(encoding="utf-8"))
    assert {"commit", "environment", "arithmetic"} <= found.keys()
    lines = {(line["model"], line["form"], line["base"], line["dtype"]): line for line in found["lines"]}
    assert len(lines) == 2 * 4 + 5
    exact = [("vlm16", "merged", "dequantized", "auto"), ("vlm4", "merged", "dequantized", "auto")]
    assert all(lines[key]["identical_answers"] == lines[key]["questions"] == 12 for key in exact)
    original = lines[("vlm4", "merged", "original", "auto")]
    assert original["mean_kl"] > 100 * lines[exact[1]]["mean_kl"]
    assert "answer_accuracy_before" in original and "answer_accuracy_after" in original
    assert lines[("vlm16, in bfloat16", "merged", "dequantized", "auto")]["stored_in"] == "bfloat16"
