"""Read a CSV to its end however broken it is, and say what is broken where."""

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd

from sigphi.train.errors import UserError

_ROWS_A_TABLE = 10_000


def read_header(path: Path) -> list[str]:
    """The names in the first line of a CSV, without white space around them, none where it is blank or no CSV.

    Raises:
        UserError: if the file cannot be opened or read.
    """
    line, names = next(iterate_rows(path, lambda kind, line, example: None), (1, []))
    return names if line == 1 else []


def read_tables(path: Path, columns: Sequence[str], report: Callable[[str, str, str], None]) -> Iterator[pd.DataFrame]:
    """The rows of a CSV, some thousands at a time, without those that are no CSV or have too few or too many cells.

    Args:
        path (`Path`): the file; without a header in line 1 it has no rows.
        columns (`Sequence[str]`): the columns to read, as far as they are there; of two of a name the first.
        report (`Callable`): gets kind, place and an example of each problem, see `KINDS`.

    Yields:
        `pandas.DataFrame`: a row for each row of the file that is not blank, with `line` (int, where the row starts,
        the header is 1) and the `columns` as str, without white space around them.

    Raises:
        UserError: if the file cannot be opened or read.
    """
    header = read_header(path)
    rows = iterate_rows(path, lambda kind, line, example: report(kind, f"line {line}", example))
    next(rows, None)
    if not header:
        return
    positions = {name: header.index(name) for name in columns if name in header}
    sound = _full_rows(rows, len(header), report)
    while chunk := list(islice(sound, _ROWS_A_TABLE)):
        lines, cells = zip(*chunk, strict=True)
        columns_of_cells = list(zip(*cells, strict=True))
        table = {name: columns_of_cells[position] for name, position in positions.items()}
        yield pd.DataFrame({"line": lines} | table)


def _full_rows(
    rows: Iterator[tuple[int, list[str]]], num_columns: int, report: Callable[[str, str, str], None]
) -> Iterator[tuple[int, list[str]]]:
    for line, cells in rows:
        if cells and len(cells) != num_columns:
            report("malformed row", f"line {line}", f"{len(cells)} cells, but the header has {num_columns}")
        elif cells:
            yield line, cells


def iterate_rows(path: Path, report: Callable[[str, int, str], None]) -> Iterator[tuple[int, list[str]]]:
    r"""The rows that `csv.reader` can read, the header among them, each with the line it starts on.

    Behind a row that is no CSV it goes on with the next line, so that a quote that is opened and not closed costs one
    row. A byte that is not UTF-8 is written as `\xe9`.

    Args:
        path (`Path`): the file.
        report (`Callable`): gets `"not UTF-8"` or `"malformed row"`, the line, and an example, for each such line.

    Yields:
        `tuple`: the line (the first one is 1) and the cells, stripped of white space, `[]` for a blank line.

    Raises:
        UserError: if the file cannot be opened or read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from _rows(_Lines(file, report), report)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a CSV file.") from error


class _Lines(Iterator[str]):
    """The lines of a file for `csv.reader`, which can be handed out again."""

    def __init__(self, file: Iterator[str], report: Callable[[str, int, str], None]) -> None:
        self.number = 0
        self._file = file
        self._report = report
        self._since_mark: list[str] = []
        self._again: deque[str] = deque()

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._decoded(next(self._file))
        self.number += 1
        self._since_mark.append(line)
        return line

    def mark(self) -> int:
        """Remember the place, and return the number of the line that comes next."""
        self._since_mark.clear()
        return self.number + 1

    def return_to_second_line(self) -> None:
        """Hand out again what came since the mark, without its first line."""
        self._again.extendleft(reversed(self._since_mark[1:]))
        self.number -= len(self._since_mark) - 1

    def _decoded(self, line: str) -> str:
        if line.isascii():
            return line
        encoded = line.encode("utf-8", "surrogateescape")
        decoded = encoded.decode("utf-8", "backslashreplace")
        if decoded != line:
            self._report("not UTF-8", self.number + 1, decoded.strip())
        return decoded


def _rows(lines: _Lines, report: Callable[[str, int, str], None]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, strict=True)
    while True:
        line = lines.mark()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines.return_to_second_line()
            report("malformed row", line, str(error))
            continue
        yield line, [cell.strip() for cell in row]


__all__ = ["iterate_rows", "read_header", "read_tables"]
