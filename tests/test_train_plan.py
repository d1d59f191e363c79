"""What `sigphi plan` says, and what it makes of trainings that do not fit."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES, Originals

from sigphi import SiglipResNetProcessor, cli
from sigphi.train import plan
from sigphi.train.check_report import CheckReport, Problem
from sigphi.train.errors import UserError
from sigphi.train.machine import Machine, measured_speed
from sigphi.train.memory import Speed
from sigphi.train.plan import Advice, advise, parse_bytes, verdict_text
from sigphi.train.plan_report import GLIBC_KEEPS, Disk, _checkpoints, as_bytes, as_duration, fatal_errors


@pytest.fixture(scope="module")
def encoder_folder(shared: Originals, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    shared["encoder"].save_pretrained(folder)
    SiglipResNetProcessor(shared["image_processor"], shared["tokenizer"]).save_pretrained(folder)
    return folder


@pytest.fixture
def words(toy_csv, toy_base, encoder_folder, tmp_path) -> list[str]:
    files = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--output-dir", str(tmp_path / "out")]
    models = ["--siglip-checkpoint", str(encoder_folder), "--language-model", str(toy_base)]
    return ["vlm", *files, *models, "--use-cpu", "true", "--report-to", "none", "--bits", "16", "--tflops", "0.1"]


# Advice --------------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """A case whose need is the sum of its sizes."""

    sizes: dict[str, float]
    families: list[list[dict[str, Any]]]

    def remedies(self) -> list[list[dict[str, Any]]]:
        return self.families

    def changed(self, changes: dict[str, float]) -> "Toy":
        return Toy(self.sizes | changes, self.families)


def toy_advice(limit: float, **sizes: float) -> list[Advice]:
    families = [[{name: size / 2**k} for k in range(1, 5)] for name, size in sizes.items()]
    case: Any = Toy(sizes, families)
    return advise(case, lambda other: sum(other.sizes.values()), limit)


def test_each_single_change_that_suffices_is_named_as_mild_as_may_be():
    assert toy_advice(80, a=64, b=32) == [Advice({"a": 32}, 64), Advice({"b": 16}, 80)]
    assert toy_advice(50, a=64, b=32) == [Advice({"a": 16}, 48)]


def test_changes_are_joined_as_mild_as_may_be_when_none_suffices():
    # The strongest of each would be 4 + 2; the other family is let off where one goes all the way.
    (advice,) = toy_advice(12, a=64, b=32)
    assert advice.need <= 12
    assert advice.changes == {"a": 8, "b": 4} or advice.changes == {"a": 4, "b": 8}


def test_a_change_that_the_others_make_needless_is_left_out():
    families = [[{"a": 10}], [{"b": 1}], [{"a": 2, "b": 1}]]
    case: Any = Toy({"a": 20, "b": 10, "c": 5}, families)
    (advice,) = advise(case, lambda other: sum(other.sizes.values()), 8)
    assert advice == Advice({"a": 2, "b": 1}, 8)


def test_what_does_not_fit_at_all_gets_the_strongest_changes():
    (advice,) = toy_advice(1, a=64, b=32)
    assert advice == Advice({"a": 4, "b": 2}, 6)
    assert "does not fit" in verdict_text(6, 1, "cuda", [advice])


def test_no_remedies_give_no_advice():
    assert advise(Toy({"a": 5}, []), lambda case: 5, 1) == []  # type: ignore[arg-type]
    assert "take a smaller model" in verdict_text(5, 1, "cuda", [])


def test_the_verdict_tells_what_the_heap_may_add(monkeypatch):
    monkeypatch.setattr(plan, "heap_keeps_freed_blocks", lambda: True)
    assert "glibc" in verdict_text(1.0, 1.2, "cpu", [])
    assert verdict_text(1.0, 1.2, "cuda", []) == verdict_text(1.0, 1.0 * GLIBC_KEEPS, "cpu", []) == "It fits.\n"
    monkeypatch.setattr(plan, "heap_keeps_freed_blocks", lambda: False)
    assert verdict_text(1.0, 1.2, "cpu", []) == "It fits.\n"


# The command ---------------------------------------------------------------------------------------------------------


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *words])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def needed(report: str) -> float:
    (size, unit) = re.search(r"^memory    ([\d.]+) (\w+) of", report, re.MULTILINE).groups()  # type: ignore[union-attr]
    return parse_bytes(size + unit)


def test_a_training_that_fits_is_told_in_full(words, capsys):
    plan.main([*words, "--memory-limit", "100GB"])
    report = capsys.readouterr().out
    assert [line.split()[0] for line in report.splitlines() if not line.startswith(" ")] == [
        *("CSV", "data", "tokens", "padding", "steps", "model", "memory", "time", "disk", "It")
    ]
    for kind in ("activations", "optimizer states", "decoded images", "language model, not quantised"):
        assert f"  {kind}\n" in report
    assert report.endswith("It fits.\n")


@pytest.mark.slow
def test_advice_fits_when_it_is_followed(words, capsys, monkeypatch):
    # What this process holds differs from one plan to the next.
    machine = Machine(torch.device("cpu"), Speed(1e9), 1e12, {"Python": 1e7})
    monkeypatch.setattr(plan.Machine, "present", lambda training, tflops: machine)
    plan.main([*words, "--memory-limit", "100GB", "--batch-size", "64", "--per-device-eval-batch-size", "256"])
    whole = needed(capsys.readouterr().out)
    limit = ["--memory-limit", f"{whole / 1e6 * 0.97:.0f}MB"]
    sizes = ["--batch-size", "64", "--per-device-eval-batch-size", "256"]
    code, report, error = run([*words, *sizes, *limit], capsys)
    assert code == 2
    assert "of memory are needed, and there are" in error
    advice = report.split("It would fit with")[1].splitlines()[1]
    options = re.sub(r"\s+[\d.]+ [KMG]B$", "", advice).split()
    plan.main([*words, *sizes, *limit, *options])
    assert "It fits" in capsys.readouterr().out


def test_the_encoder_is_planned_too(toy_csv, toy_base, tmp_path, capsys):
    options = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--text-model", str(toy_base)]
    options += ["--layer-type", "basic", "--embedding-size", "8", "--hidden-sizes", "8", "16", "--depths", "1", "1"]
    options += ["--output-dir", str(tmp_path / "out"), "--use-cpu", "true", "--report-to", "none", "--tflops", "0.1"]
    plan.main(["siglip", *options, "--memory-limit", "100GB"])
    report = capsys.readouterr().out
    assert "images to train on" in report
    assert "cached features" in report


def test_errors_of_the_csv_are_counted_and_end_the_plan_with_code_2(words, toy_csv, tmp_path, capsys):
    with toy_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[1][rows[0].index("A1")] = "ERROR: timeout"
    faulty = tmp_path / "faulty.csv"
    with faulty.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    words[words.index("--input-csv") + 1] = str(faulty)
    code, report, error = run([*words, "--memory-limit", "100GB", "--on-faulty-answers", "error"], capsys)
    assert code == 2
    assert "ERROR  failure as answer: 1" in report
    assert "Traceback" not in error
    plan.main([*words, "--memory-limit", "100GB", "--on-faulty-answers", "skip"])
    assert "1 errors" not in capsys.readouterr().out


def test_a_full_disk_is_an_error(words, monkeypatch, capsys):
    monkeypatch.setattr(Disk, "free", property(lambda disk: 1000))
    code, _, error = run([*words, "--memory-limit", "100GB"], capsys)
    assert code == 2
    assert "of disk are needed, and 1 KB are free" in error


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "the stage is missing"),
        (["foo"], "there is no stage 'foo'"),
        (["vlm", "--memory-limit", "4"], "--memory-limit 4: write a size with its unit"),
        (["vlm", "--tflops", "0"], "--tflops must be above 0"),
    ],
)
def test_wrong_words_are_user_errors(words, given, match, capsys):
    code, _, error = run([*words, *given[1:]] if given[:1] == ["vlm"] else given, capsys)
    assert code == 2
    assert match in error


@pytest.mark.parametrize(
    ("text", "size"), [("6GB", 6 * 10**9), ("8 GiB", 8 * 2**30), ("512mb", 512 * 10**6), ("1.5TB", 15 * 10**11)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["6", "GB", "-1GB", "6 apples", "0GB", "1e3GB"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(UserError, match="--memory-limit"):
        parse_bytes(text)


# Figures -------------------------------------------------------------------------------------------------------------


def test_sizes_and_times_are_written_in_units_that_suit_them():
    assert [as_bytes(size) for size in (2.28e9, 12.34e6, 4500)] == ["2.28 GB", "12.34 MB", "4 KB"]
    assert [as_duration(s) for s in (1.25, 42, 600, 7800)] == ["1.2 s", "42 s", "10 min", "2 h 10 min"]


@pytest.mark.parametrize(
    ("strategy", "save_steps", "limit", "count"),
    [
        ("no", 500, None, 0),
        ("epoch", 500, None, 4),
        ("epoch", 500, 1, 2),
        ("steps", 30, None, 14),
        ("steps", 0.5, 9, 2),
    ],
)
def test_checkpoints_are_those_that_lie_there_at_once(strategy, save_steps, limit, count):
    arguments = SimpleNamespace(save_strategy=SimpleNamespace(value=strategy), save_steps=save_steps)
    arguments.save_total_limit = limit
    assert _checkpoints(arguments, steps=400, steps_an_epoch=100) == count


def test_faults_that_are_left_out_are_not_fatal():
    problems = [
        Problem("failure as answer", True, 3, (), "", ""),
        Problem("bad index", True, 2, (), "", ""),
        Problem("over-long text", False, 5, (), "", ""),
    ]
    report = CheckReport(problems, num_rows=10, num_pairs=50, num_images=10)
    assert fatal_errors(report, "error") == 5
    assert fatal_errors(report, "skip") == 2


def test_speed_is_that_of_work_that_is_run():
    speed = measured_speed(torch.device("cpu"), torch.float32)
    assert 1e8 < speed.flops < 1e14
    assert 1e7 < speed.bandwidth < 1e13
    assert 0 < speed.latency < 0.1
