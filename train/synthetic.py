"""CIFAR-like pictures of the ten classes, drawn in code: for tests, and for a first run without a download."""

from collections.abc import Callable
from typing import Any, Literal

import datasets
import numpy as np
from PIL import Image, ImageDraw

from sigphi.train.facts import CLASS_NAMES

IMAGE_FEATURES = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})

_SIZE = 32
_SUPERSAMPLING = 4
_SPLIT_SEEDS = {"train": 0, "test": 1}
# Squared distance in RGB, 0 to 3 * 255^2: an object stands out from its background.
_MIN_CONTRAST = 140**2

# A shape is a list of parts in the order they are painted: whether the part is object (or a hole in it), and its
# outline in a frame from -1 to 1 with y pointing down.
_Part = tuple[bool, np.ndarray]


def _polygon(*points: tuple[float, float], solid: bool = True) -> _Part:
    return solid, np.array(points)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, solid: bool = True) -> _Part:
    angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    return solid, np.stack([x + radius_x * np.cos(angle), y + radius_y * np.sin(angle)], axis=1)


def _box(left: float, top: float, right: float, bottom: float, solid: bool = True) -> _Part:
    return _polygon((left, top), (right, top), (right, bottom), (left, bottom), solid=solid)


_SHAPES: dict[str, list[_Part]] = {
    # From above, nose up: a body, swept wings, a small tail.
    "airplane": [
        _ellipse(0, 0, 0.2, 1),
        _polygon((0, -0.4), (1, 0.3), (1, 0.55), (0, 0.2), (-1, 0.55), (-1, 0.3)),
        _polygon((0, 0.6), (0.45, 0.85), (0.45, 1), (-0.45, 1), (-0.45, 0.85)),
    ],
    # From the side: low, a rounded cabin with windows, two wheels.
    "automobile": [
        _polygon((-0.7, -0.05), (-0.4, -0.7), (0.35, -0.7), (0.7, -0.05)),
        _box(-1, -0.1, 1, 0.45),
        _ellipse(-0.55, 0.45, 0.3, 0.3),
        _ellipse(0.55, 0.45, 0.3, 0.3),
        _polygon((-0.45, -0.12), (-0.28, -0.5), (-0.07, -0.5), (-0.07, -0.12), solid=False),
        _polygon((0.1, -0.12), (0.1, -0.5), (0.25, -0.5), (0.45, -0.12), solid=False),
    ],
    # In flight, from the front: two raised wings in a wide V, a body and a fanned tail.
    "bird": [
        _polygon((0, 0.6), (-0.5, 0.1), (-1, -0.75), (-0.35, -0.5), (0, 0), (0.35, -0.5), (1, -0.75), (0.5, 0.1)),
        _ellipse(0, 0.1, 0.3, 0.55),
        _polygon((-0.4, 0.95), (0, 0.35), (0.4, 0.95)),
    ],
    # A round head with pointed ears and two eyes.
    "cat": [
        _ellipse(0, 0.2, 0.85, 0.72),
        _polygon((-0.85, -0.95), (-0.83, 0.2), (-0.15, -0.4)),
        _polygon((0.85, -0.95), (0.83, 0.2), (0.15, -0.4)),
        _ellipse(-0.35, 0.1, 0.16, 0.16, solid=False),
        _ellipse(0.35, 0.1, 0.16, 0.16, solid=False),
    ],
    # A narrow head under wide, forked antlers.
    "deer": [
        _polygon((-0.38, 0.05), (0.38, 0.05), (0.16, 1), (-0.16, 1)),
        _polygon((-0.1, 0.15), (-0.75, -0.3), (-1, -0.95), (-0.78, -0.95), (-0.55, -0.42), (0, 0)),
        _polygon((0.1, 0.15), (0.75, -0.3), (1, -0.95), (0.78, -0.95), (0.55, -0.42), (0, 0)),
        _polygon((-0.45, -0.2), (-0.42, -0.95), (-0.22, -0.95), (-0.2, -0.1)),
        _polygon((0.45, -0.2), (0.42, -0.95), (0.22, -0.95), (0.2, -0.1)),
    ],
    # A head between long hanging ears, with a muzzle hole for the nose.
    "dog": [
        _ellipse(0, 0, 0.6, 0.85),
        _ellipse(-0.78, 0.1, 0.22, 0.75),
        _ellipse(0.78, 0.1, 0.22, 0.75),
        _box(-0.56, 0, -0.47, 0.8, solid=False),
        _box(0.47, 0, 0.56, 0.8, solid=False),
        _ellipse(0, 0.45, 0.22, 0.17, solid=False),
    ],
    # Wide and flat, two eyes on top, folded legs to the sides.
    "frog": [
        _ellipse(0, 0.15, 0.7, 0.42),
        _ellipse(-0.4, -0.35, 0.25, 0.25),
        _ellipse(0.4, -0.35, 0.25, 0.25),
        _ellipse(-0.4, -0.37, 0.11, 0.11, solid=False),
        _ellipse(0.4, -0.37, 0.11, 0.11, solid=False),
        _polygon((-0.5, 0.1), (-1, -0.15), (-0.85, 0.7), (-0.4, 0.7), (-0.7, 0.45)),
        _polygon((0.5, 0.1), (1, -0.15), (0.85, 0.7), (0.4, 0.7), (0.7, 0.45)),
    ],
    # From the side: a body on four legs, neck and head to one side, a tail to the other.
    "horse": [
        _ellipse(0, 0, 0.65, 0.3),
        _polygon((0.3, 0), (0.6, -0.95), (1, -0.6), (0.95, -0.4), (0.72, -0.5), (0.6, 0.1)),
        _box(-0.6, 0, -0.44, 1),
        _box(-0.34, 0, -0.18, 1),
        _box(0.18, 0, 0.34, 1),
        _box(0.44, 0, 0.6, 1),
        _polygon((-0.5, -0.2), (-0.95, 0.05), (-0.95, 0.5), (-0.8, 0.5), (-0.75, 0.15), (-0.5, 0.05)),
    ],
    # A hull under a mast with two sails.
    "ship": [
        _polygon((-1, 0.4), (1, 0.4), (0.65, 0.9), (-0.65, 0.9)),
        _box(-0.05, -1, 0.05, 0.4),
        _polygon((0.12, -0.95), (0.85, 0.25), (0.12, 0.25)),
        _polygon((-0.12, -0.7), (-0.12, 0.25), (-0.65, 0.25)),
    ],
    # From the side: a tall box, a gap, a lower cab with a window, three wheels.
    "truck": [
        _box(-1, -0.7, 0.3, 0.45),
        _polygon((0.38, -0.3), (0.75, -0.3), (1, 0.05), (1, 0.45), (0.38, 0.45)),
        _box(-1, 0.3, 1, 0.45),
        _box(0.48, -0.18, 0.72, 0.05, solid=False),
        _ellipse(-0.68, 0.5, 0.22, 0.22),
        _ellipse(-0.15, 0.5, 0.22, 0.22),
        _ellipse(0.68, 0.5, 0.22, 0.22),
    ],
}


def synthetic_images(split: Literal["train", "test"], num_images: int, seed: int = 0) -> datasets.Dataset:
    """Draw pictures with the features of CIFAR-10, the same ones whenever the arguments are the same.

    The shape alone decides the class: colors of object and background, size (50% to 75% of the frame), place,
    rotation (up to 12 degrees), mirroring, brightness and noise are drawn apart from it. So neither the mean color
    nor a linear model on pixels says much about the class, while a small convolutional network learns it.

    Every ten pictures in a row hold each class once, and the first `n` pictures of a larger set are the set of `n`.
    No picture of one split is in the other.

    Args:
        split (`str`): `"train"` or `"test"`, two independent streams.
        num_images (`int`): how many to draw, at least 1.
        seed (`int`, *optional*, defaults to 0): of every draw, not negative.

    Returns:
        `datasets.Dataset`: `img` (`datasets.Image`, 32x32 RGB, held as PNG bytes) and `label` (`ClassLabel` with the
        names of CIFAR-10).

    Raises:
        ValueError: if `split` or `num_images` is out of range.
    """
    if split not in _SPLIT_SEEDS or num_images < 1:
        raise ValueError(
            f"`split` has to be 'train' or 'test' and `num_images` 1 or more, got {split!r}, {num_images}."
        )
    rng = np.random.default_rng([seed, _SPLIT_SEEDS[split]])
    labels: list[int] = []
    pictures: list[dict[str, Any]] = []
    while len(pictures) < num_images:
        if len(pictures) == len(labels):
            labels += rng.permutation(len(CLASS_NAMES)).tolist()
        pixels = _draw(CLASS_NAMES[labels[len(pictures)]], rng)
        pictures.append(datasets.Image().encode_example(pixels))
    return datasets.Dataset.from_dict({"img": pictures, "label": labels[:num_images]}, features=IMAGE_FEATURES)


def _draw(class_name: str, rng: np.random.Generator) -> np.ndarray:
    """One picture as an array of shape (32, 32, 3), uint8."""
    mask = _mask(_SHAPES[class_name], _random_placement(rng))[..., None]  # (32, 32, 1), 0 background to 1 object
    foreground, background = _random_colors(rng)
    clean = background + (foreground - background) * mask  # (32, 32, 3)
    noise = rng.normal(0, rng.uniform(2, 10), clean.shape)
    return (clean * rng.uniform(0.8, 1.15) + noise).clip(0, 255).astype(np.uint8)


def _random_placement(rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """A map from the frame of a shape, -1 to 1, to pixels of the supersampled canvas."""
    canvas = _SIZE * _SUPERSAMPLING
    scale = rng.uniform(0.5, 0.75) * canvas / 2
    angle = np.deg2rad(rng.uniform(-12, 12))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    mirror = np.array([rng.choice((-1, 1)), 1])
    # Half of the room there is, so that the middle, whose color is asked for, is more object than background.
    center = canvas / 2 + rng.uniform(-0.5, 0.5, size=2) * (canvas / 2 - scale)
    return lambda outline: (outline * mirror) @ rotation * scale + center


def _mask(shape: list[_Part], place: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    canvas = Image.new("L", (_SIZE * _SUPERSAMPLING,) * 2)
    brush = ImageDraw.Draw(canvas)
    for solid, outline in shape:
        brush.polygon(place(outline).ravel().tolist(), fill=255 if solid else 0)
    return np.asarray(canvas.reduce(_SUPERSAMPLING), dtype=np.float32) / 255


# Colors to draw with, as RGB. They are no part of the rules by which colors are named, which are tested on them.
_COLORS = np.array(
    [
        (0, 0, 0),
        (255, 255, 255),
        (146, 149, 145),  # gray
        (229, 0, 0),  # red
        (249, 115, 6),  # orange
        (255, 255, 20),  # yellow
        (21, 176, 26),  # green
        (3, 67, 223),  # blue
        (126, 30, 156),  # purple
        (101, 55, 0),  # brown
        (255, 129, 192),  # pink
    ],
    dtype=np.float32,
)
_CONTRAST = ((_COLORS[:, None] - _COLORS[None]) ** 2).sum(axis=-1)  # (num_colors, num_colors)
_COLOR_PAIRS = np.argwhere(_CONTRAST >= _MIN_CONTRAST)  # (num_pairs, 2), each pair in both orders


def _random_colors(rng: np.random.Generator) -> np.ndarray:
    """Object color and background color, each near the color it is named after; shape (2, 3), 0 to 255."""
    pair = _COLORS[rng.choice(_COLOR_PAIRS)]
    return (pair + rng.uniform(-15, 15, pair.shape)).clip(0, 255)


__all__ = ["IMAGE_FEATURES", "synthetic_images"]
