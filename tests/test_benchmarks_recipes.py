"""What the benchmarks of the encoder's recipes decide and compute."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import input_pipeline
    import recipes

    return SimpleNamespace(recipes=recipes, input_pipeline=input_pipeline)


@pytest.mark.parametrize(
    ("name", "top1", "seconds", "target", "goal"),
    [
        ("cpu-small", 0.88, 2700.0, True, False),
        ("cpu-small", 0.8799, 100.0, False, False),
        ("cpu-small", 0.95, 2701.0, False, False),
        ("cpu-small", 0.91, 2700.0, True, True),
        ("resnet50-32", 0.9399, 100.0, False, False),
        ("resnet50-32", 0.94, 5000.0, True, False),
        ("resnet50-32", 0.94, 120.0, True, True),
        ("resnet50-224-pretrained", 0.99, 1.0, None, None),
    ],
)
def test_a_target_is_met_by_accuracy_and_time(benchmarks, name, top1, seconds, target, goal):
    recipes = benchmarks.recipes
    assert recipes.is_met(recipes.TARGETS.get(name), top1, seconds) is target
    assert recipes.is_met(recipes.GOALS.get(name), top1, seconds) is goal


def test_the_share_of_the_peak(benchmarks):
    assert benchmarks.recipes.share_of_peak(flops=6e15, seconds=60.0, peak=4e14) == pytest.approx(0.25)


def test_waiting_is_counted_from_the_first_batch_to_the_last(benchmarks):
    waits = [(0.0, 0.5), (2.0, 2.1), (4.0, 9.0)]  # asked, got
    assert benchmarks.input_pipeline.waiting_share(waits) == pytest.approx(0.6 / 4.0)


def test_processes_that_cannot_share_a_batch_are_refused(benchmarks):
    assert benchmarks.recipes.share_of_batch(256, 4) == 64
    with pytest.raises(SystemExit, match="cannot share a batch of 256"):
        benchmarks.recipes.share_of_batch(256, 3)


def test_the_held_out_figures_outlive_an_interrupted_evaluation(benchmarks, monkeypatch, tmp_path):
    """The command writes the figures of the test images where those of the held-out images were."""
    recipes = benchmarks.recipes
    options: Any = SimpleNamespace(output_dir=tmp_path, test_csv="test.csv", images="synthetic")
    (tmp_path / recipes.EVAL_RESULTS).write_text('{"zero_shot_top1": 0.5}')
    calls = []

    def evaluated(command, check):
        calls.append(command)
        (tmp_path / recipes.EVAL_RESULTS).write_text('{"zero_shot_top1": 0.75}')
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes.subprocess, "run", evaluated)
    with pytest.raises(KeyboardInterrupt):
        recipes.evaluate(options)
    for _ in range(2):
        results = recipes.evaluate(options)
        assert results == {"held_out": {"zero_shot_top1": 0.5}, "test": {"zero_shot_top1": 0.75}}
    assert len(calls) == 2


@pytest.mark.parametrize(("processes", "batch_size"), [(1, None), (2, "128")])
def test_processes_share_the_batch_of_the_recipe(benchmarks, processes, batch_size, tmp_path):
    options: Any = SimpleNamespace(
        recipe="cpu-small",
        input_csv="qa.csv",
        images="synthetic",
        text_model="base",
        processes=processes,
        further=[],
        output_dir=tmp_path,
    )
    words = benchmarks.recipes.training_words(options)
    assert words[:4] == ["--recipe", "cpu-small", "--input-csv", "qa.csv"]
    assert (words[-1] if "--batch-size" in words else None) == batch_size
    assert benchmarks.recipes.parsed(words)[2].muon
