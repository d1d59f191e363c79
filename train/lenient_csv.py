"""Read a CSV to its end however broken it is, and say what is broken where."""

import csv
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from sigphi.train.errors import UserError


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


__all__ = ["iterate_rows"]
