"""Which answers are shown, and the two files that show them. The table itself is tested with the evaluation."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sigphi.train.predictions import SAMPLES_COLUMNS, worst_and_best, write_samples
from sigphi.train.report import picture_grid, pictures_of_grid


def table(*rows: tuple[int, str, float, bool | None]) -> pd.DataFrame:
    """Of image, type, confidence and verdict of each row."""
    frame = pd.DataFrame(rows, columns=["dataset_index", "question_type", "confidence", "correct"])
    texts = {"question": "What | is it?", "true_answer": "A cat.", "given_answer": "A dog.", "split": "test"}
    return frame.assign(correct=frame["correct"].astype("boolean"), **texts)


def test_the_surest_come_first_and_the_types_by_turns():
    predictions = table(
        (0, "object", 0.7, False),
        (1, "object", 0.9, False),
        (2, "object", 0.8, False),
        (3, "category", 0.5, False),
        (4, "category", 0.4, False),
        (5, "object", 0.6, True),
        (6, "description", 0.99, None),
    )
    worst, best = worst_and_best(predictions, 4)
    assert worst["dataset_index"].tolist() == [1, 3, 2, 4]
    assert best["dataset_index"].tolist() == [5]


def test_an_image_is_shown_once_on_each_side():
    predictions = table((0, "object", 0.9, False), (0, "category", 0.8, False), (0, "category", 0.7, True))
    worst, best = worst_and_best(predictions)
    assert worst["confidence"].tolist() == [0.9] and best["confidence"].tolist() == [0.7]


def test_the_files_say_which_picture_is_which(toy_dataset, tmp_path):
    rows = [(number, "object", 0.9 - number / 10, number % 2 == 1) for number in range(3)]
    table(*rows).to_parquet(tmp_path / "predictions.parquet")
    write_samples(tmp_path, toy_dataset)
    lines = (tmp_path / "eval_samples.md").read_text().splitlines()
    numbered = [line for line in lines if line[:3] in ("| 1", "| 2", "| 3")]
    assert numbered == [
        "| 1 | What \\| is it? | A cat. | A dog. | 0.90 |",
        "| 2 | What \\| is it? | A cat. | A dog. | 0.70 |",
        "| 3 | What \\| is it? | A cat. | A dog. | 0.80 |",
    ]
    assert lines.index("## Wrong") < lines.index(numbered[1]) < lines.index("## Right") < lines.index(numbered[2])
    with Image.open(tmp_path / "eval_samples.png") as grid:
        shown = pictures_of_grid(grid, SAMPLES_COLUMNS)
    # The second picture is that of the third row.
    assert [picture.tobytes() for picture in shown] == [
        toy_dataset[row]["image"].convert("RGB").tobytes() for row in (0, 2, 1)
    ]


@pytest.mark.parametrize("older", [True, False])
def test_nothing_to_show_leaves_no_files(older, toy_dataset, tmp_path):
    if older:
        (tmp_path / "eval_samples.md").write_text("old")
    table((0, "", 0.5, None)).to_parquet(tmp_path / "predictions.parquet")
    write_samples(tmp_path, toy_dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.parquet"]


@pytest.mark.parametrize(("count", "columns"), [(1, 8), (5, 2), (6, 3), (16, 8)])
def test_a_grid_gives_back_its_pictures(count, columns):
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]
    pictures[0] = Image.new("RGB", (32, 32), "white")
    grid = picture_grid(pictures, columns)
    assert [one.tobytes() for one in pictures_of_grid(grid, columns)] == [one.tobytes() for one in pictures]
    assert pictures_of_grid(grid.crop((0, 0, grid.width, grid.height - 1)), columns) == []
    assert pictures_of_grid(Image.new("RGB", (1096, 8 + 2 * 136)), 8) == []  # one with the numbers on the pictures


def test_a_picture_of_another_size_comes_back_enlarged():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 30, 3), dtype=np.uint8))
    (back,) = pictures_of_grid(picture_grid([picture]), 4)
    assert back.tobytes() == picture.resize((128, 128), Image.Resampling.NEAREST).tobytes()
