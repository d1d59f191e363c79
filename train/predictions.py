"""The answers of an evaluation as a table on disk, and which of them to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import pandas as pd

from sigphi.hub_card.files import write_whole, written_aside
from sigphi.train.answer_scores import BLANK, SHUFFLED, JudgedRow
from sigphi.train.report import markdown_table, picture_grid

PREDICTIONS = "predictions.parquet"
SAMPLES = "eval_samples"
SAMPLES_COLUMNS = 8
# What is said in place of an answer with less confidence than is wanted.
ABSTAINED = "I am not sure enough to answer."


class Given(NamedTuple):
    """
    An answer of a model, and how sure it was of it.

    Args:
        text (`str`): without white space around it.
        confidence (`float`): the geometric mean of the probabilities of the answer's tokens, the end-of-text token
            among them; 0 to 1. Their product would say how probable the whole answer is, and be smaller for longer
            answers; of an arithmetic mean, one token that is as good as impossible takes little.
    """

    text: str
    confidence: float


def write_predictions(
    path: Path, dataset: datasets.Dataset, rows: Sequence[JudgedRow], given: dict[str, list[Given]]
) -> None:
    """
    Write a line for each question as Parquet, all of them or none.

    Its columns are `split`, `dataset_index`, `class_name`, `question`, `true_answer`, `question_type`, `short_answer`,
    and `given_answer`, `confidence`, `correct`, these three also with `_shuffled_image` and `_blank_image`. `correct`
    is null where neither a short answer nor the class decides, and all three where no such answer was asked for.

    Args:
        path (`Path`): the file to write; one that exists is replaced.
        dataset (`datasets.Dataset`): what was asked.
        rows (`Sequence[JudgedRow]`): of `dataset`, see [`judged_rows`].
        given (`dict[str, list[Given]]`): an answer a row, by suffix.
    """
    table = pd.DataFrame({name: dataset[name][:] for name in ("split", "dataset_index")})
    for name in ("class_name", "question", "answer", "question_type", "short_answer"):
        table["true_answer" if name == "answer" else name] = [getattr(row, name) for row in rows]
    for suffix in ("", SHUFFLED, BLANK):
        answers = given.get(suffix, [])
        verdicts = [row.verdict(one.text) for row, one in zip(rows if answers else [], answers, strict=True)]
        columns = {
            "given_answer": pd.Series([one.text for one in answers], dtype="string"),
            "confidence": pd.Series([one.confidence for one in answers], dtype="Float64"),
            "correct": pd.Series(verdicts, dtype="boolean"),
        }
        # Rows that a column does not reach are null.
        table = table.join(pd.DataFrame(columns).add_suffix(suffix))
    with written_aside(path) as aside:
        table.to_parquet(aside, index=False)


def worst_and_best(predictions: pd.DataFrame, count: int = 8) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    The wrong answers, and the right ones, that the model was surest of; one an image, the types by turns.

    Args:
        predictions (`pandas.DataFrame`): what [`write_predictions`] has written.
        count (`int`, *optional*, defaults to 8): at most so many of each.
    """
    judged = predictions[predictions["correct"].notna()].sort_values("confidence", ascending=False, kind="stable")
    chosen = []
    for right in (False, True):
        part = judged[judged["correct"] == right].drop_duplicates(["split", "dataset_index"])
        turn = part.groupby("question_type").cumcount()
        chosen.append(part.iloc[turn.argsort(kind="stable")][:count])
    return chosen[0], chosen[1]


def write_samples(folder: Path, dataset: datasets.Dataset) -> None:
    """
    Write the pictures of [`worst_and_best`] as `eval_samples.png`, and what was asked of them as `eval_samples.md`.

    Args:
        folder (`Path`): where `predictions.parquet` is, and the two files go to.
        dataset (`datasets.Dataset`): what was asked there, row by row.
    """
    worst, best = worst_and_best(pd.read_parquet(folder / PREDICTIONS))
    shown = pd.concat([worst, best])
    for suffix in (".png", ".md"):
        (folder / f"{SAMPLES}{suffix}").unlink(missing_ok=True)  # older ones would contradict the table
    if shown.empty:
        return
    grid = picture_grid([dataset[row]["image"] for row in shown.index.tolist()], columns=SAMPLES_COLUMNS)
    with written_aside(folder / f"{SAMPLES}.png") as aside:
        grid.save(aside)
    header = ["image", "question", "true answer", "given answer", "confidence"]
    columns = shown[["question", "true_answer", "given_answer"]].itertuples(index=False)
    lines = [
        [number, *texts, f"{confidence:.2f}"]
        for number, (texts, confidence) in enumerate(zip(columns, shown["confidence"], strict=True), 1)
    ]
    text = f"""# Answers that the model was surest of

Confidence is the geometric mean of the probabilities of the answer's tokens. All answers are in `{PREDICTIONS}`.

![The images, numbered]({SAMPLES}.png)

## Wrong

{markdown_table(header, lines[: len(worst)])}
## Right

{markdown_table(header, lines[len(worst) :])}"""
    write_whole(folder / f"{SAMPLES}.md", text)


__all__ = [
    "ABSTAINED",
    "PREDICTIONS",
    "SAMPLES",
    "SAMPLES_COLUMNS",
    "Given",
    "worst_and_best",
    "write_predictions",
    "write_samples",
]
