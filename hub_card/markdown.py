"""Text of anybody in a card: what it says is shown, and neither HTML nor Markdown in it means anything."""

import re
from collections.abc import Sequence

_LONGEST_NAME = 60


def code(text: str, longest: int = _LONGEST_NAME) -> str:
    """
    Text of anybody as code in one cell of a table, on one line; what would end code or cell is replaced.

    Args:
        text (`str`): the text.
        longest (`int`, *optional*, defaults to 60): after so many characters it is cut off.
    """
    visible = "".join(letter if letter.isprintable() else " " for letter in text)
    words = " ".join(visible.replace("`", "'").replace("|", "/").split())
    return f"`{words if len(words) <= longest else words[:longest] + '...'}`" if words else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def is_license(name: str) -> bool:
    """Whether `name` is written as the identifiers of licenses on the Hub are."""
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) is not None


__all__ = ["code", "is_license", "table"]
