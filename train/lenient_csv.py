"""Read a CSV to its end however broken it is, and say what is broken where."""

import csv
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TextIO

import pandas as pd

from sigphi.train.csv_lines import TOO_LONG, RowLines, RowTooLong, next_line
from sigphi.train.errors import UserError

_ROWS_A_TABLE = 10_000


def read_header(path: Path) -> list[str]:
    """The names in the first line of a CSV, without white space around them, none where it is blank or no CSV.

    Raises:
        UserError: if the file cannot be opened or read.
    """
    line, names = next(iterate_rows(path, lambda kind, line, example: None), (1, ()))
    return list(names) if line == 1 else []


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
    # The number of a row's cells may be anything: of those that are not asked for none is kept.
    places = {name: header.index(name) for name in columns if name in header}
    chosen = _chooser(list(places.values()))
    if not header:
        return
    chunk: dict[int, tuple[str, ...]] = {}
    for line, cells in rows:
        if cells and len(cells) != len(header):
            report("malformed row", f"line {line}", f"{len(cells)} cells, but the header has {len(header)}")
        elif cells:
            chunk[line] = chosen(cells)
        if len(chunk) == _ROWS_A_TABLE:
            yield _table(list(places), chunk)
            chunk = {}
    if chunk:
        yield _table(list(places), chunk)


def _chooser(places: list[int]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    """A function that gives the cells of a row at these places."""
    if len(places) < 2:  # of one place `itemgetter` gives no tuple
        return lambda cells: tuple(cells[place] for place in places)
    return itemgetter(*places)


def _table(names: list[str], rows: dict[int, tuple[str, ...]]) -> pd.DataFrame:
    columns = zip(*rows.values(), strict=True)
    return pd.DataFrame({"line": list(rows)} | dict(zip(names, columns, strict=True)))


def iterate_rows(path: Path, report: Callable[[str, int, str], None]) -> Iterator[tuple[int, tuple[str, ...]]]:
    r"""The rows that `csv.reader` can read, the header among them, each with the line it starts on.

    Behind a row that is no CSV it goes on with the next line, so that a quote that is opened and not closed costs one
    row; at one of more than ten million characters it ends. A byte that is not UTF-8 is written as `\xe9`.

    Args:
        path (`Path`): the file.
        report (`Callable`): gets `"not UTF-8"` or `"malformed row"`, the line, and an example, for each such line.

    Yields:
        `tuple`: the line (the first one is 1) and the cells, stripped of white space, none for a blank line.

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

    def __init__(self, file: TextIO, report: Callable[[str, int, str], None]) -> None:
        self.number = 0
        self._file = file
        self._report = report
        self._since_mark: list[str] = []
        self._again: deque[str] = deque()

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
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

    def _read(self) -> str:
        line = next_line(self._file)
        if line is None:
            self._report("malformed row", self.number + 1, TOO_LONG)
            return "\n"
        if not line:
            raise StopIteration
        return self._decoded(line)

    def _decoded(self, line: str) -> str:
        if line.isascii():
            return line
        encoded = line.encode("utf-8", "surrogateescape")
        decoded = encoded.decode("utf-8", "backslashreplace")
        if decoded != line:
            self._report("not UTF-8", self.number + 1, decoded.strip())
        return decoded


def _rows(lines: _Lines, report: Callable[[str, int, str], None]) -> Iterator[tuple[int, tuple[str, ...]]]:
    of_row = RowLines(lines)
    reader = csv.reader(of_row, strict=True)
    while True:
        line = lines.mark()
        of_row.begin_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except RowTooLong as error:
            # Each of its lines may begin another one, to be read as far again.
            report("malformed row", line, f"{error}; what follows is not read")
            return
        except csv.Error as error:
            lines.return_to_second_line()
            report("malformed row", line, str(error))
            continue
        # Tuples of texts cost the garbage collector nothing, and lists of them a tenth of the whole time.
        yield line, tuple(map(str.strip, row))


__all__ = ["iterate_rows", "read_header", "read_tables"]
