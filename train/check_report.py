"""What `sigphi data check` can find in a CSV, and how it reports it."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

from sigphi.train.errors import printable

# Kind of problem -> whether it is an error (otherwise a warning), and the remedy. The report keeps this order.
KINDS: dict[str, tuple[bool, str]] = {
    "not UTF-8": (True, "Save the file as CSV in UTF-8."),
    "missing column": (True, "Add the column; line 1 is the header, and commas stand between its names."),
    "too many columns": (True, "Leave out the columns that docs/data.md does not name."),
    "repeated column": (True, "Rename or remove all but one column of this name."),
    "no pairs": (True, "Fill Q1 and A1 of at least one row."),
    "malformed row": (True, "Put cells with commas, quotes or line breaks in double quotes, and double inner quotes."),
    "damaged text": (True, "Write the text again from its source, read as UTF-8."),
    "unknown split": (True, "Say which split Dataset_Index counts in: --image-split train or test."),
    "bad split": (True, "Write train or test; --image-split must not contradict the column, leave it out."),
    "bad index": (True, "Write the row of the image in its split, from 0, or name the split that it counts in."),
    "wrong Class_Label": (True, "Index or split points at another image than the one that was asked about."),
    "half-empty pair": (True, "Fill the cell, empty its partner, or train with --on-faulty-answers skip."),
    "failure as answer": (True, "Ask again or empty the pair; --on-faulty-answers skip leaves out those with ERROR."),
    "image placeholder": (True, "Remove it: it stands for the image itself."),
    "bad short answer": (True, "Write a word, for a description 'object=cat; category=animal', or empty the cell."),
    "repeated question": (True, "Keep one of the answers, or ask something else."),
    "contradicted label": (True, "Correct the answer, or remove the pair."),
    "image in both files": (True, "Remove the image from one of the files: its score would be of something learned."),
    "near-duplicate image": (False, "Look at both, and leave one out of the evaluation."),
    "unclear answer": (False, "Make it name one value and no other: the class, or yes or no, as the question asks."),
    "missed short answer": (False, "Correct A, or make S the value that A states; a model's own errors may stay."),
    "foreign class": (False, "The answer names a class, but not that of its image; correct it, or remove the pair."),
    "constant answer": (False, "Such a question teaches nothing about the image; ask it less often, or leave it out."),
    "over-long text": (False, "Shorten it, or raise --max-characters: one long text costs memory for a whole batch."),
    "no answer": (False, "Remove pairs whose answer is a stand-in for a missing value."),
    "talk of an assistant": (False, "Remove the pair: the model would learn to say that it cannot see."),
    "leftover markup": (False, "Remove the tokens of another model's chat template, and escapes of HTML."),
    "empty pair": (False, "Nothing has to be done: empty pairs are left out."),
}
_WIDTH = 119
_EXAMPLE_LENGTH = 300


@dataclass(frozen=True)
class Problem:
    """One kind of problem, with all its occurrences in a file.

    Args:
        kind (`str`): one of `KINDS`, such as `"half-empty pair"`.
        is_error (`bool`): whether the file has to be mended before training; otherwise a warning.
        count (`int`): how often it occurs.
        places (`tuple[str, ...]`): the first occurrences, such as `"line 7 column A4"`; the header is line 1.
        example (`str`): what is wrong at the first place.
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
        num_rows (`int`): rows behind the header that could be read, without blank lines.
        num_pairs (`int`): pairs with both a question and an answer.
        num_images (`int`): distinct images that these pairs are about.
    """

    problems: list[Problem]
    num_rows: int
    num_pairs: int
    num_images: int

    @property
    def num_errors(self) -> int:
        """How many places have to be mended."""
        return sum(problem.count for problem in self.problems if problem.is_error)


@dataclass
class Findings:
    """Collects occurrences by kind, and keeps the first places and the first example of each.

    Args:
        max_places (`int`): how many places of a kind to keep.
    """

    max_places: int
    _counts: dict[str, int] = field(default_factory=dict)
    _places: dict[str, list[str]] = field(default_factory=dict)
    _examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, place: str, example: str) -> None:
        """Add one occurrence."""
        self.add_all(kind, 1, [place], example)

    def add_all(self, kind: str, count: int, places: Iterable[str], example: str) -> None:
        """Add `count` occurrences, more than none; of `places` only as many are read as are wanted."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        self._examples.setdefault(kind, example)
        kept = self._places.setdefault(kind, [])
        for place in places:
            if len(kept) >= self.max_places:
                break
            kept.append(place)

    def problems(self) -> list[Problem]:
        """One [`Problem`] for each kind that occurred, in the order of `KINDS`."""
        return [
            Problem(kind, is_error, self._counts[kind], tuple(self._places[kind]), self._examples[kind], remedy)
            for kind, (is_error, remedy) in KINDS.items()
            if kind in self._counts
        ]


def format_report(report: CheckReport) -> str:
    """The report as text: what was read, then one block a kind with count, places, example and remedy."""
    counts = ((report.num_rows, "row"), (report.num_pairs, "pair"), (report.num_images, "image"))
    blocks = [f"{', '.join(counted(number, noun) for number, noun in counts)}.\n"]
    blocks += [_format_problem(problem) for problem in report.problems]
    num_warnings = sum(problem.count for problem in report.problems if not problem.is_error)
    blocks.append(f"{counted(report.num_errors, 'error')}, {counted(num_warnings, 'warning')}.\n")
    return "\n".join(blocks)


def counted(number: int, noun: str) -> str:
    """`"1 row"`, `"2 rows"`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _format_problem(problem: Problem) -> str:
    more = problem.count - len(problem.places)
    places = "; ".join(problem.places) + (f"; {more} more" if more else "")
    texts = {"at": places, "example": _shown(problem.example), "remedy": problem.remedy}
    lines = [f"{'ERROR' if problem.is_error else 'warning'}  {problem.kind}: {problem.count}"]
    for title, text in texts.items():
        if text:
            lines += _wrapped(f"{title + ':':9}{text}")
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent=" " * 11, break_on_hyphens=False)


def _shown(text: str) -> str:
    """On one line, of a length that can be read, and without what would steer a terminal."""
    text = printable(text)
    return text if len(text) <= _EXAMPLE_LENGTH else f"{text[:_EXAMPLE_LENGTH]} ..."


__all__ = ["KINDS", "CheckReport", "Findings", "Problem", "counted", "format_report"]
