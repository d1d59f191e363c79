"""Pictures and text about a run: loss curves, a grid of answered questions, the quickstart's page."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from transformers.utils.import_utils import is_matplotlib_available

from sigphi.train.records import LOG_HISTORY

logger = logging.getLogger(__name__)


def write_loss_curve(log_history: list[dict[str, Any]], folder: Path) -> None:
    """
    Write the Trainer's log as `log_history.json`, and its losses as the picture `loss_curve.png`.

    The picture needs matplotlib; without it one line says so, and the numbers are there all the same.
    """
    (folder / LOG_HISTORY).write_text(json.dumps(log_history, indent=1) + "\n", encoding="utf-8")
    if not is_matplotlib_available():
        logger.warning("matplotlib is not installed, so there is no loss_curve.png: pip install 'sigphi[eval]'")
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss_curve.png", dpi=120)


@dataclass
class Answered:
    """One question that was asked.

    Args:
        image (`PIL.Image.Image`): RGB.
        question, true_answer, given_answer (`str`): the texts.
        correct (`bool`): the verdict.
    """

    image: Image.Image
    question: str
    true_answer: str
    given_answer: str
    correct: bool


def picture_grid(images: Sequence[Image.Image], columns: int = 4, size: int = 128) -> Image.Image:
    """The images, enlarged to `size` pixels and numbered from 1, in rows of `columns`."""
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (size + 8) + 8, rows * (size + 8) + 8), "white")
    draw = ImageDraw.Draw(grid)
    for position, image in enumerate(images):
        corner = (8 + position % columns * (size + 8), 8 + position // columns * (size + 8))
        grid.paste(image.convert("RGB").resize((size, size), Image.Resampling.NEAREST), corner)
        draw.rectangle([corner, (corner[0] + 20, corner[1] + 14)], fill="black")
        draw.text((corner[0] + 4, corner[1] + 1), str(position + 1), fill="white")
    return grid


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a pipe or line break in a cell cannot break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


__all__ = ["Answered", "markdown_table", "picture_grid", "write_loss_curve"]
