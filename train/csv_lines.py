"""The lines and rows of a CSV, of which none fills the memory, whatever the file is."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sigphi.train.errors import UserError

# What a header may have: tables of more columns are of another kind, or lost their line ends.
MOST_COLUMNS = 1_000
# In characters. A cell of `csv` holds 131,072.
LONGEST_LINE = 10_000_000
TOO_LONG = f"the line has more than {LONGEST_LINE:,} characters"
# The same of all lines of a row: cells in quotes hold line breaks, and there may be cells without end.
ROW_TOO_LONG = f"the row has more than {LONGEST_LINE:,} characters"


class RowTooLong(csv.Error):
    """The lines of a row have no end."""

    def __init__(self) -> None:
        super().__init__(ROW_TOO_LONG)


class RowLines(Iterator[str]):
    """
    The lines of a file for `csv.reader`, which asks for no more than it needs for a row.

    Args:
        lines (`Iterator[str]`): of a file.

    Raises:
        RowTooLong: in place of the line at which a row becomes too long.
    """

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._room = LONGEST_LINE

    def begin_row(self) -> None:
        """What comes next is another row."""
        self._room = LONGEST_LINE

    def __next__(self) -> str:
        line = next(self._lines)
        self._room -= len(line)
        if self._room < 0:
            raise RowTooLong
        return line


def bounded_rows(file: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """
    The rows of an open CSV, each with the line it starts on; the first one has number 1.

    Raises:
        UserError: at the first row that is no CSV or too long.
    """
    lines = RowLines(bounded_lines(file, path))
    # Not pandas: it neither knows the line of a row behind cells of several lines nor refuses short rows.
    reader = csv.reader(lines, strict=True)
    while True:
        line = reader.line_num + 1
        lines.begin_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = line if isinstance(error, RowTooLong) else reader.line_num
            raise UserError(f"{path}, line {place}: this is not CSV ({error}).") from error
        yield line, row


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


__all__ = [
    "LONGEST_LINE",
    "MOST_COLUMNS",
    "TOO_LONG",
    "RowLines",
    "RowTooLong",
    "bounded_lines",
    "bounded_rows",
    "next_line",
]
