"""The files that record what a model is: written whole or not at all, and said to be broken where they are."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sigphi.hub_card.errors import UserError


@contextlib.contextmanager
def written_aside(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """
    Where to write a file that appears whole or not at all.

    Args:
        path (`Path`): its name, which it gets when it is on the disk; a file that has that name is replaced.
        scratch (`Path`, *optional*): where it grows, on the same file system, by default beside its name. Only a kill
            leaves it behind.
    """
    # Another process may be writing the same. The end of the name stays: by it libraries choose the form of a picture.
    aside = path.with_name(f".unfinished-{os.getpid()}-{path.name}") if scratch is None else scratch
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text in UTF-8 that appears whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """
    The content of a JSON file of a model's folder.

    Raises:
        UserError: if it is no JSON, as one that was cut off.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path) from error


def read_record(path: Path) -> dict[str, Any]:
    """
    What a JSON file of a model's folder records; nothing where there is no such file.

    Raises:
        UserError: if it is no JSON object.
    """
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise _broken(path)
    return content


def _broken(path: Path) -> UserError:
    return UserError(
        f"{path} is not the JSON that it should be; it may have been cut off. Put a whole copy there, or remove it: "
        f"what it records is then unknown."
    )


__all__ = ["read_json", "read_record", "sync", "write_whole", "written_aside"]
