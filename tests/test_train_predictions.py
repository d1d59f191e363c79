"""Which answers are shown, and the two files that show them. The table itself is tested with the evaluation."""

import pandas as pd
import pytest
from PIL import Image

from sigphi.train.predictions import worst_and_best, write_samples


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
    grid = Image.open(tmp_path / "eval_samples.png")
    # The second picture is that of the third row.
    size, position = 128, 8 + 136
    shown = grid.crop((position, 8, position + size, 8 + size)).resize((32, 32), Image.Resampling.NEAREST)
    expected = toy_dataset[2]["image"].convert("RGB")
    assert shown.crop((8, 8, 32, 32)).tobytes() == expected.crop((8, 8, 32, 32)).tobytes()


@pytest.mark.parametrize("older", [True, False])
def test_nothing_to_show_leaves_no_files(older, toy_dataset, tmp_path):
    if older:
        (tmp_path / "eval_samples.md").write_text("old")
    table((0, "", 0.5, None)).to_parquet(tmp_path / "predictions.parquet")
    write_samples(tmp_path, toy_dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.parquet"]
