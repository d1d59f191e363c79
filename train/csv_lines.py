"""The lines of a CSV, of which none fills the memory, whatever the file is."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sigphi.train.errors import UserError

# What a header may have: tables of more columns are of another kind, or lost their line ends.
MOST_COLUMNS = 1_000
# In characters. A cell of `csv` holds 131,072.
LONGEST_LINE = 10_000_000
TOO_LONG = f"the line has more than {LONGEST_LINE:,} characters"


def bounded_lines(file: TextIO, path: Path) -> Iterator[str]:
    """The lines of an open file with their ends; raises a [`UserError`] at the first one that is too long."""
    number = 1
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise UserError(f"{path}, line {number}: this is not CSV ({TOO_LONG}).")
        yield line
        number += 1


def next_line(file: TextIO) -> str | None:
    """The next line of an open file, empty at its end; `None` for one that is too long, which is passed over."""
    line = file.readline(LONGEST_LINE + 1)
    if len(line) <= LONGEST_LINE:
        return line
    while line and not line.endswith(("\n", "\r")):
        line = file.readline(LONGEST_LINE)
    return None


__all__ = ["LONGEST_LINE", "MOST_COLUMNS", "TOO_LONG", "bounded_lines", "next_line"]
