"""Text of anybody in a card: it is shown as it is, and neither HTML nor Markdown in it means anything."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# What stands for a path on this machine.
SOMEWHERE = "a local folder"
_LONGEST_NAME = 60


def code(text: str, longest: int = _LONGEST_NAME) -> str:
    """
    Text of anybody as code in one cell of a table, on one line; what would end code or cell is replaced.

    Args:
        text (`str`): the text.
        longest (`int`, *optional*, defaults to 60): after so many characters it is cut off.
    """
    words = one_line(text.replace("`", "'").replace("|", "/"))
    return f"`{words if len(words) <= longest else words[:longest] + '...'}`" if words else ""


def one_line(text: str) -> str:
    """Text of anybody without line breaks and control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def name_of(source: str) -> str:
    """A Hub id as code, and nothing of a path."""
    return SOMEWHERE if is_local(source) else code(source, 100)


def is_local(name: str) -> bool:
    """Whether `name` is a path on this machine, and no Hub id."""
    is_path = Path(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith(("./", "../", "~"))
    return is_path or ("/" in name and os.path.exists(name))


def is_hub_id(name: str) -> bool:
    """Whether `name` is written as the id of a repository, and is no path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_local(name)


def is_license(name: str) -> bool:
    """Whether `name` is written as the identifiers of licenses on the Hub are."""
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) is not None


__all__ = ["SOMEWHERE", "code", "is_hub_id", "is_license", "is_local", "name_of", "one_line", "table"]
