"""`sigphi data check`: every problem of a CSV of questions and answers in one pass.

```bash
sigphi data check qa.csv --images uoft-cs/cifar10
```
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from sigphi.train.errors import UserError
from sigphi.train.parser import parse_arguments
from sigphi.train.qa_csv import read_pairs


@dataclass(frozen=True)
class Problem:
    """One kind of problem, with all its occurrences in a file.

    Args:
        kind (`str`): such as `"half-empty pair"`.
        is_error (`bool`): whether the file has to be mended before training; otherwise a warning.
        count (`int`): how often it occurs.
        places (`tuple[str, ...]`): the first occurrences, such as `"line 7 column A4"`; the header is line 1.
        example (`str`): what stands at the first place.
        remedy (`str`): what to do.
    """

    kind: str
    is_error: bool
    count: int
    places: tuple[str, ...]
    example: str
    remedy: str


@dataclass(frozen=True)
class CheckReport:
    """What [`check_csv`] found.

    Args:
        problems (`list[Problem]`): one a kind, errors first.
        num_rows (`int`): rows of the file behind its header, without blank lines.
        num_pairs (`int`): pairs of a question and an answer.
        num_images (`int`): distinct images that they are about.
    """

    problems: list[Problem]
    num_rows: int
    num_pairs: int
    num_images: int

    @property
    def num_errors(self) -> int:
        """How many places have to be mended."""
        return sum(problem.count for problem in self.problems if problem.is_error)


def check_csv(
    path: str | Path,
    images: str | None = None,
    image_split: str | None = None,
    eval_csv: str | Path | None = None,
) -> CheckReport:
    """Check a CSV of questions and answers.

    Args:
        path (`str` or `Path`): the CSV, see [`read_qa_csv`].
        images (`str`, *optional*): where the images are, see [`load_images`].
        image_split (`str`, *optional*): `"train"` or `"test"`, for a CSV without the column `Split`.
        eval_csv (`str` or `Path`, *optional*): the CSV that the model will be evaluated on.

    Raises:
        UserError: if a file or the images cannot be read at all.
    """
    rows, num_empty, _ = read_pairs(Path(path), image_split, "error")
    empty = Problem("empty pair", False, num_empty, (), "", "Fill both cells, or leave both empty on purpose.")
    return CheckReport(
        [empty] if num_empty else [],
        rows["line"].nunique(),
        len(rows),
        len(rows[["split", "dataset_index"]].drop_duplicates()),
    )


def format_report(report: CheckReport) -> str:
    """The report as text, one block a kind."""
    lines = [f"{report.num_rows} rows, {report.num_pairs} pairs, {report.num_images} images"]
    for problem in report.problems:
        level = "error" if problem.is_error else "warning"
        lines.append(f"{level}: {problem.kind}: {problem.count}. {problem.remedy}")
    return "\n".join(lines) + "\n"


@dataclass
class DataCheckArguments:
    """Options of `sigphi data check`."""

    _argument_group_name = "data check"

    images: str | None = HfArg(help="Images, to compare answers with CIFAR's labels.", default=None)
    image_split: str | None = HfArg(help="train or test, for a CSV without the column Split.", default=None)
    eval_csv: str | None = HfArg(help="CSV of the evaluation: no image may be in both.", default=None)


def main(argv: list[str]) -> None:
    """`sigphi data check FILE`."""
    arguments, path = parse_arguments(
        [DataCheckArguments], argv, "sigphi data check", [("input_csv", None, "the CSV file to check")]
    )
    report = check_csv(path, arguments.images, arguments.image_split, arguments.eval_csv)
    sys.stdout.write(format_report(report))
    if report.num_errors:
        raise UserError(f"{path} has {report.num_errors} errors, see above; mend them and check again.")


__all__ = ["CheckReport", "DataCheckArguments", "Problem", "check_csv", "format_report", "main"]
