"""What the benchmark of repeated texts compares: two sets, three losses, and one of its figures."""

import csv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sigphi import global_sigmoid_loss
from sigphi.train.pairs import pair_masks, text_key

ROWS: list[dict[str, Any]] = [
    {"image_index": 0, "texts": ["A cat.", "Red."], "facts": ["object=cat", "color=red"]},
    {"image_index": 1, "texts": ["a cat. ", "It is a cat."], "facts": ["object=cat", "object=cat"]},
    {"image_index": 2, "texts": ["A dog."], "facts": ["object=dog"]},
]
for row in ROWS:
    row["known"] = sorted(set(row["facts"]))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import repeated_texts

    return repeated_texts


@pytest.fixture
def arguments(tiny_encoder_processor: Any) -> dict[str, Any]:
    """Of a collator; each distinct text has another embedding."""
    keys = dict.fromkeys(text_key(text) for row in ROWS for text in row["texts"])
    return {
        "processor": tiny_encoder_processor,
        "images": torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
        "text_features": F.normalize(torch.randn(len(keys), 8, generator=torch.Generator().manual_seed(0)), dim=-1),
        "text_rows": {key: row for row, key in enumerate(keys)},
    }


def positives_of(batch: dict[str, Any]) -> list[list[int]]:
    positives, ignored = pair_masks(**batch["pairs"])
    assert not ignored.any()
    return positives.int().tolist()


def test_rows_have_equal_texts_of_others_as_negatives(benchmark, arguments):
    batch = benchmark.RowsCollator(**arguments)(ROWS)
    assert positives_of(batch) == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    texts, images = batch["text_features"], F.normalize(torch.randn(3, 8), dim=-1)
    assert torch.equal(texts[0], texts[2])
    loss = global_sigmoid_loss(images, texts, torch.tensor(1.0), torch.tensor(-1.0), **batch["pairs"])
    signs = 2 * torch.tensor(positives_of(batch)) - 1
    expected = -F.logsigmoid(signs * (images @ texts.t() * torch.tensor(1.0).exp() - 1.0)).sum() / 3
    torch.testing.assert_close(loss, expected)


def test_equal_texts_are_one_of_which_no_more_is_known(benchmark, arguments):
    batch = benchmark.EqualTextsCollator(**arguments)(ROWS)
    assert positives_of(batch) == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]  # a cat, red, it is a cat, a dog


def test_answers_are_numbered_until_so_many_repeat(benchmark, tmp_path):
    source, target = tmp_path / "all.csv", tmp_path / "numbered.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["Q1", "A1", "Q2", "A2"], *([["?", "A cat.", "?", f"{i % 4}."] for i in range(50)])]
        )
    assert benchmark.number_answers(source, target, 0.6) == pytest.approx(0.6, abs=0.02)
    assert benchmark.number_answers(source, target, 0.0) == 0.0
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["A1"].startswith("A cat. Number ") and row["Q1"] == "?" for row in rows)


def test_matching_accuracy(benchmark):
    labels = torch.tensor([0, 1])
    logits = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -2.0, -1.0]])  # one of two own ones, three of four others
    assert benchmark.matching_accuracy(logits, labels) == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert benchmark.matching_accuracy(torch.full((2, 3), -5.0), labels) == 0.5


def test_figures_are_summed_up_by_case(benchmark):
    runs = [
        {"answers": "repeated", "loss": "rows", "seed": seed} | dict.fromkeys(benchmark.FIGURES, value)
        for seed, value in ((0, 0.5), (1, 0.75))
    ]
    (row,) = benchmark.summary(runs)
    assert (row["answers"], row["loss"], row["seeds"]) == ("repeated", "rows", 2)
    assert row["ece_sigmoid"] == {"mean": 0.625, "least": 0.5, "most": 0.75}
