"""Pictures and text about a run: loss curves, a confusion matrix, a grid of answered questions, tables."""

import itertools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers.utils.import_utils import is_matplotlib_available

from sigphi.hub_card.files import write_whole, written_aside
from sigphi.train.checkpoint_files import write_errors
from sigphi.train.metrics import per_class_scores
from sigphi.train.records import LOG_HISTORY, write_json

logger = logging.getLogger(__name__)

CONFUSION_MATRIX = "confusion_matrix.json"
# Of a grid of pictures, in pixels: between them, and above each for its number.
_GAP, _NUMBER = 8, 16
# What helps where the files of a training cannot be written.
_AGAIN = "Make room, and run it again with --resume."


def write_loss_curve(log_history: list[dict[str, Any]], folder: Path) -> None:
    """
    Write the Trainer's log as `log_history.json`, and its losses as the picture `loss_curve.png`.

    The picture needs matplotlib; without it one line says so, and the numbers are there all the same.

    Raises:
        UserError: if they cannot be written.
    """
    with write_errors(folder, _AGAIN):
        write_whole(folder / LOG_HISTORY, json.dumps(log_history, indent=1) + "\n")
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
    if axes.lines:
        axes.legend()
    with write_errors(folder, _AGAIN), written_aside(folder / "loss_curve.png") as aside:
        figure.savefig(aside, dpi=120)


def write_confusion_matrix(counts: torch.Tensor, class_names: Sequence[str], folder: Path) -> None:
    """
    Write `confusion_matrix.json` and the picture `confusion_matrix.png`.

    The JSON object holds `classes`, `counts` (a row for each true class, a column for each predicted one) and
    `per_class`: for each class `precision`, `recall`, `f1` and `support`, null where undefined. The picture needs
    matplotlib; without it one line says so.

    Args:
        counts (`torch.LongTensor` of shape `(classes, classes)`): see [`confusion_counts`].
        class_names (`Sequence[str]`): of each class.
        folder (`Path`): where to write.
    """
    columns = {name: values.tolist() for name, values in per_class_scores(counts).items()}
    per_class = {
        class_name: {name: None if math.isnan(values[row]) else values[row] for name, values in columns.items()}
        for row, class_name in enumerate(class_names)
    }
    content = {"classes": list(class_names), "counts": counts.tolist(), "per_class": per_class}
    write_json(folder / CONFUSION_MATRIX, content)
    picture = folder / "confusion_matrix.png"
    picture.unlink(missing_ok=True)  # an older one would contradict the numbers
    if not is_matplotlib_available():
        logger.warning("matplotlib is not installed, so there is no %s: pip install 'sigphi[eval]'", picture.name)
        return
    with written_aside(picture) as aside:
        _draw_confusion(counts, class_names).savefig(aside, dpi=120)


def _draw_confusion(counts: torch.Tensor, class_names: Sequence[str]) -> Any:
    """A matplotlib figure: counts as text, their share of the true class as color."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    colors = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    for row, column in itertools.product(range(len(class_names)), repeat=2):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column].item()), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(colors, label="share of the true class")
    return figure


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
    """The images, enlarged to `size` pixels, in rows of `columns`; above each its number, from 1 on."""
    rows = -(-len(images) // columns)
    width, height = _grid_size(rows, columns, size)
    grid = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(grid)
    for position, image in enumerate(images):
        left, top = _corner(position, columns, size)
        grid.paste(image.convert("RGB").resize((size, size), Image.Resampling.NEAREST), (left, top))
        draw.text((left, top - _NUMBER), str(position + 1), fill="black")
    return grid


def pictures_of_grid(grid: Image.Image, columns: int, size: int = 128, original: int = 32) -> list[Image.Image]:
    """
    The pictures of a [`picture_grid`]; none of any other picture.

    Args:
        grid (`PIL.Image.Image`): the grid.
        columns, size (`int`): as it was made with.
        original (`int`, *optional*, defaults to 32): pixels of a side before they were enlarged; a picture that is no
            enlarged one of that size is returned as it is.
    """
    rows = (grid.height - _GAP) // (size + _NUMBER + _GAP)
    if grid.size != _grid_size(rows, columns, size):
        return []
    pictures = []
    for position in range(rows * columns):
        left, top = _corner(position, columns, size)
        if grid.crop((left, top - _NUMBER, left + size, top)).convert("L").getextrema() == (255, 255):
            break  # no number, so the last row is at its end
        shown = grid.crop((left, top, left + size, top + size))
        small = shown.resize((original, original), Image.Resampling.NEAREST)
        is_enlarged = small.resize((size, size), Image.Resampling.NEAREST).tobytes() == shown.tobytes()
        pictures.append(small if is_enlarged else shown)
    return pictures


def _grid_size(rows: int, columns: int, size: int) -> tuple[int, int]:
    return columns * (size + _GAP) + _GAP, rows * (size + _NUMBER + _GAP) + _GAP


def _corner(position: int, columns: int, size: int) -> tuple[int, int]:
    """Left and top of a picture in a grid."""
    row, column = divmod(position, columns)
    return _GAP + column * (size + _GAP), _GAP + _NUMBER + row * (size + _NUMBER + _GAP)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; a pipe or line break in a cell cannot break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


__all__ = [
    "Answered",
    "markdown_table",
    "picture_grid",
    "pictures_of_grid",
    "write_confusion_matrix",
    "write_loss_curve",
]
