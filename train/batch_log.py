"""What a long run has finished, kept beside its output, so that a kill at any moment loses no finished batch."""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from sigphi.hub_card.files import written_aside
from sigphi.train.errors import UserError

_SETTINGS = "settings.json"


class BatchLog:
    """The finished batches of a run, in a folder that its processes share.

    The folder holds `settings.json`, and for each process a `rank-<n>.jsonl` with one line a batch. A line is on the
    disk before [`add`] returns. Which process has finished a batch makes no difference, so a run can be resumed with
    another number of processes; a line that a kill has cut is dropped, and its batch counts as not finished.

    Args:
        folder (`Path`): made if it is missing; on a file system that all processes see.
        settings (`dict[str, str]`): what the content of the batches depends on, by the name that the user knows.
        rank (`int`, *optional*, defaults to 0): of this process. Nobody else may open the same folder and rank.

    Raises:
        UserError: if the folder cannot be made, is in use by another process, or holds batches of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, str], rank: int = 0) -> None:
        self.folder = folder
        path = folder / f"rank-{rank}.jsonl"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}.") from error
        self._lock = FileLock(f"{path}.lock")
        try:
            # The system lets go of it when the process ends, however that happens.
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or end it first.") from error
        self._check_settings(settings, rank)
        self._file = path.open("ab")
        self._file.truncate(_whole_lines_size(path))

    def __enter__(self) -> "BatchLog":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
        self._lock.release()

    def _check_settings(self, settings: dict[str, str], rank: int) -> None:
        path = self.folder / _SETTINGS
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        changed = [
            f"{name}: {recorded.get(name)} before, {settings.get(name)} now"
            for name in {**recorded, **settings}
            if recorded.get(name) != settings.get(name)
        ]
        # A run that has finished nothing, such as one that its model did not fit into memory, binds nobody.
        if changed and finished_batches(self.folder):
            raise UserError(
                f"{self.folder} holds an unfinished run with other settings: {'; '.join(changed)}.\n"
                "Give the same ones to go on with it, or remove that folder to start anew."
            )
        if changed:
            write_durably(path, json.dumps(settings, indent=2) + "\n", self.folder / f"rank-{rank}.tmp")

    def add(self, batch: int, content: Any) -> None:
        """Record a batch as finished.

        Args:
            batch (`int`): its number.
            content: what came out of it, as JSON can hold it.
        """
        self._file.write(json.dumps([batch, content]).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def finished_batches(folder: Path) -> dict[int, Any]:
    """The content of every finished batch by its number, whichever process and run recorded it.

    Args:
        folder (`Path`): of a [`BatchLog`].

    Raises:
        UserError: if a line is damaged otherwise than by a kill.
    """
    batches = {}
    for path in sorted(folder.glob("rank-*.jsonl")):
        whole = path.read_bytes()[: _whole_lines_size(path)]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                batch, content = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged; remove the line to do its batch again.") from error
            batches[batch] = content
    return batches


def _whole_lines_size(path: Path) -> int:
    """How many bytes of a file belong to lines that are not cut."""
    return path.read_bytes().rfind(b"\n") + 1


def write_durably(path: Path, text: str, scratch: Path) -> None:
    """Write a file that appears whole or not at all.

    Args:
        path (`Path`): the file; one that exists is replaced.
        text (`str`): its content.
        scratch (`Path`): where it grows, on the same file system; left behind by a kill, replaced by the next call.
    """
    with written_aside(path, scratch) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def discard(folder: Path) -> None:
    """Remove the folder of a [`BatchLog`] whose run is complete."""
    # Under its own name a half-removed folder would be taken for one of an unfinished run.
    trash = folder.with_name(f"{folder.name}.trash")
    if trash.exists():
        shutil.rmtree(trash)
    if folder.exists():
        os.replace(folder, trash)
        shutil.rmtree(trash)


__all__ = ["BatchLog", "discard", "finished_batches", "write_durably"]
