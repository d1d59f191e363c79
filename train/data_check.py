"""`sigphi data check`: every problem of a CSV of questions and answers, in one pass.

```bash
sigphi data check qa.csv --images uoft-cs/cifar10
```
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch.utils.data import DataLoader, IterableDataset
from transformers.hf_argparser import HfArg

from sigphi.train.check_report import CheckReport, Findings, Problem, counted, format_report
from sigphi.train.errors import UserError, worker_errors
from sigphi.train.leaks import lines_of_evaluation, report_near_duplicates, report_shared_images
from sigphi.train.lenient_csv import read_tables
from sigphi.train.pair_checks import Repetitions, check_answers, check_texts
from sigphi.train.parser import parse_arguments
from sigphi.train.qa_csv import IMAGE_SPLITS, OPTIONAL_COLUMNS, PAIRS, REQUIRED_COLUMNS, one_row_a_pair
from sigphi.train.row_checks import ImageSets, Lines, check_header, locate_images

_COLUMNS = (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS, "Class_Label")
_LARGE = 50_000_000  # bytes; below, a second process takes longer to start than it saves
_MEMORY = "If memory has run out, close what else takes it, or split the file, and check again."


def check_csv(
    path: str | Path,
    images: str | None = None,
    image_split: str | None = None,
    eval_csv: str | Path | None = None,
    max_characters: int = 1000,
    max_places: int = 50,
) -> CheckReport:
    """Find every problem of a CSV of questions and answers, in one pass and in little memory.

    Whatever [`read_qa_csv`] refuses is an error here, and so is what makes a sound file untrue: failures and damaged
    text as answers, answers that contradict the class of their image, images that are in the evaluation too. What may
    be meant so is a warning. The kinds and what to do about each are in `KINDS`.

    Args:
        path (`str` or `Path`): the CSV, in the columns of [`read_qa_csv`].
        images (`str`, *optional*):
            Where the images are, see [`load_images`]. With them answers to what the object is and the column
            `Class_Label` are compared with their labels, and near-duplicate images of training and evaluation are
            found. Without them answers are compared with `Class_Label` where the file has it, and `Dataset_Index`
            counts in CIFAR-10, which has 50,000 train and 10,000 test images.
        image_split (`str`, *optional*): `"train"` or `"test"`, for a CSV without the column `Split`.
        eval_csv (`str` or `Path`, *optional*):
            The CSV of the evaluation, of which nothing but the images is read. Without it, near duplicates are looked
            for between the train and the test images of a file that has both.
        max_characters (`int`, *optional*, defaults to 1000): a longer question or answer is a warning.
        max_places (`int`, *optional*, defaults to 50): how many places of each kind the report names.

    Raises:
        UserError: if a file or the images cannot be read, or an option has a value that it cannot have.
    """
    if image_split is not None and image_split not in IMAGE_SPLITS:
        raise UserError(f"--image-split {image_split}: it has to be train or test.")
    for option, value in (("--max-characters", max_characters), ("--max-places", max_places)):
        if value < 1:
            raise UserError(f"{option} {value}: it has to be 1 or more.")
    path, image_sets, findings, repetitions = Path(path), ImageSets(images), Findings(max_places), Repetitions()
    check_header(path, image_split, findings)
    num_rows = num_pairs = 0
    with worker_errors(f"{path}: the process that reads it", _MEMORY):
        for table in _tables(path, findings):
            table = locate_images(table, image_sets, image_split, findings)
            rows = _pairs_of(table)
            usable = check_texts(rows, max_characters, findings)
            check_answers(usable, findings)
            repetitions.add(usable)
            num_rows += len(table)
            num_pairs += int(((rows["question"] != "") & (rows["answer"] != "")).sum())
    lines = repetitions.report(path, findings)
    if num_pairs == 0:
        findings.add("no pairs", "line 1", "no row has both a question and an answer")
    _check_leaks(lines, image_sets, image_split, eval_csv, findings)
    return CheckReport(findings.problems(), num_rows, num_pairs, len(lines))


class _Tables(IterableDataset):
    """The tables of a CSV, each with the problems that were found while it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[pd.DataFrame, list[tuple[str, str, str]]]]:
        problems: list[tuple[str, str, str]] = []
        for table in read_tables(self.path, _COLUMNS, lambda *problem: problems.append(problem)):
            yield table, problems.copy()
            problems.clear()
        yield pd.DataFrame(), problems  # those behind the last table


def _tables(path: Path, findings: Findings) -> Iterator[pd.DataFrame]:
    """Those of [`read_tables`]; a process of its own reads a large file while this one checks."""
    num_workers = int(path.stat().st_size > _LARGE)
    for table, problems in DataLoader(_Tables(path), batch_size=None, num_workers=num_workers, collate_fn=_as_it_is):
        for problem in problems:
            findings.add(*problem)
        if not table.empty:
            yield table


def _as_it_is(item: Any) -> Any:
    return item


def _check_leaks(
    lines: Lines, image_sets: ImageSets, image_split: str | None, eval_csv: str | Path | None, findings: Findings
) -> None:
    if eval_csv is not None:
        tested = lines_of_evaluation(Path(eval_csv), image_sets, image_split)
        report_shared_images(lines, tested, eval_csv, findings)
        learned, of_file = lines, f" of {eval_csv}"
    else:
        tested = {image: line for image, line in lines.items() if image[0] == "test"}
        learned, of_file = {image: line for image, line in lines.items() if image[0] == "train"}, ""
    if image_sets.source is not None:
        report_near_duplicates(learned, tested, of_file, image_sets.source, findings)


def _pairs_of(table: pd.DataFrame) -> pd.DataFrame:
    """One row a pair, as `QaTable.rows` with `class_name`, of the pairs for which both columns are there."""
    rows = one_row_a_pair(table, table["line"].tolist())
    rows["class_name"] = table["class_name"].repeat(len(PAIRS)).to_numpy()
    return rows[rows["pair"].isin([pair for pair in PAIRS if f"Q{pair}" in table and f"A{pair}" in table])]


@dataclass
class DataCheckArguments:
    """Options of `sigphi data check`."""

    _argument_group_name = "data check"

    images: str | None = HfArg(
        help="Images, to compare answers with their labels: a Hub id, a folder in the same schema, torchvision's "
        "download folder, or 'synthetic'.",
        default=None,
    )
    image_split: Literal["train", "test"] | None = HfArg(
        help="Split that Dataset_Index counts in, for a CSV without the column Split.", default=None
    )
    eval_csv: str | None = HfArg(
        help="CSV of the evaluation: images that are in both are found, with --images also near duplicates.",
        default=None,
    )
    max_characters: int = HfArg(help="A longer question or answer is a warning.", default=1000)
    max_places: int = HfArg(help="How many places of each kind of problem are named.", default=50)


def main(argv: list[str]) -> None:
    """`sigphi data check FILE`."""
    arguments, path = parse_arguments(
        [DataCheckArguments], argv, "sigphi data check", [("input_csv", None, "the CSV file to check")]
    )
    report = check_csv(path, **vars(arguments))
    sys.stdout.write(format_report(report))
    sys.stdout.flush()
    if report.num_errors:
        raise UserError(f"{path}: {counted(report.num_errors, 'error')}, named above with what to do.")


__all__ = ["CheckReport", "DataCheckArguments", "Problem", "check_csv", "format_report", "main"]
