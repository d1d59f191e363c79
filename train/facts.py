"""What is known of an image: its class, and colors and brightness read from its pixels by fixed rules.

```python
>>> facts = image_facts(pixels, label=3)
>>> facts.object_name, facts.category, facts.background_color
('cat', 'animal', 'gray')
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CATEGORIES = ("animal", "vehicle")
BRIGHTNESS_LEVELS = ("dark", "medium", "bright")

# A color's shades as sRGB in hex, after the xkcd color survey (https://xkcd.com/color/rgb/, CC0). With one shade a
# color most pixels of a photo would be gray: its blues, browns and greens lie far from the pure ones.
COLOR_SHADES: dict[str, tuple[str, ...]] = {
    "black": ("000000",),
    "white": ("ffffff",),
    "gray": ("929591", "d8dcd6", "363737"),  # grey, light grey, dark grey
    "red": ("e50000", "840000"),  # red, dark red
    "orange": ("f97306", "fdaa48"),  # orange, light orange
    "yellow": ("ffff14", "fffe7a", "d5b60a"),  # yellow, light yellow, dark yellow
    "green": ("15b01a", "96f97b", "033500", "82a67d", "4b5d16"),  # green, light, dark, greyish, army green
    "blue": ("0343df", "95d0fc", "00035b", "6b8ba4", "9dbcd4", "29465b"),  # blue, light, dark, 3 x grey blue
    "purple": ("7e1e9c", "bf77f6", "35063e"),  # purple, light, dark
    "brown": (
        "653700",
        "ad8150",
        "341c02",
        "d1b26f",
        "7f7053",
        "b9a281",
    ),  # brown, light, dark, tan, grey brown, taupe
    "pink": ("ff81c0", "ffd1df", "cb416b"),  # pink, light, dark
}
COLOR_NAMES = tuple(COLOR_SHADES)

_ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
_DARK_BELOW = 110.0
_BRIGHT_FROM = 135.0
_BORDER = 3
# Bounds the memory of the Lab values of a batch to a few hundred MB at 32x32.
_IMAGES_AT_ONCE = 2000
_DESCRIPTION_PROBABILITY = 0.25


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image; see [`batch_facts`] for the rules.

    Args:
        label (`int`): CIFAR-10's class index, 0 to 9.
        luminance (`float`): mean Rec. 709 luma of the pixels, 0 (black) to 255 (white).
        brightness (`str`): one of `BRIGHTNESS_LEVELS`.
        dominant_color (`str`): one of `COLOR_NAMES`, of the center of the image.
        background_color (`str`): one of `COLOR_NAMES`, of the border of the image.
    """

    label: int
    luminance: float
    brightness: str
    dominant_color: str
    background_color: str

    @property
    def object_name(self) -> str:
        """The name of the class, one of `CLASS_NAMES`."""
        return CLASS_NAMES[self.label]

    @property
    def category(self) -> str:
        """`"animal"` or `"vehicle"`."""
        return "animal" if self.object_name in _ANIMALS else "vehicle"


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert 8-bit sRGB to CIELAB under the D65 white.

    The transfer curve and the matrix are those of IEC 61966-2-1, the rest of CIE 015.

    Args:
        rgb (`np.ndarray` of shape `(..., 3)`, uint8): red, green, blue.

    Returns:
        `np.ndarray` of shape `(..., 3)`, float32: L* from 0 to 100, a*, b*.
    """
    xyz = _LINEAR_OF_BYTE[rgb] @ _XYZ_OF_LINEAR.T  # (..., 3), relative to white
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1).astype(np.float32)


def _linear_of_byte() -> np.ndarray:
    encoded = np.arange(256) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return linear.astype(np.float32)


_LINEAR_OF_BYTE = _linear_of_byte()
_XYZ_OF_RGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
# Rows divided by the white's X, Y, Z, so that white maps to (1, 1, 1).
_XYZ_OF_LINEAR = (_XYZ_OF_RGB / _XYZ_OF_RGB.sum(axis=1, keepdims=True)).astype(np.float32)

_SHADE_RGB = np.array([list(bytes.fromhex(shade)) for shades in COLOR_SHADES.values() for shade in shades], np.uint8)
_SHADE_LAB = srgb_to_lab(_SHADE_RGB)
_COLOR_OF_SHADE = np.array([i for i, shades in enumerate(COLOR_SHADES.values()) for _ in shades])


def nearest_colors(rgb: np.ndarray) -> np.ndarray:
    """Name colors: the one that owns the shade of `COLOR_SHADES` at the smallest distance in CIELAB (CIE76).

    Args:
        rgb (`np.ndarray` of shape `(..., 3)`, uint8): red, green, blue.

    Returns:
        `np.ndarray` of shape `(...)`, int64: indices into `COLOR_NAMES`.
    """
    # |lab - shade|^2 without |lab|^2, which is the same for every shade.
    distance = (_SHADE_LAB**2).sum(axis=1) - 2 * srgb_to_lab(rgb) @ _SHADE_LAB.T  # (..., num_shades)
    return _COLOR_OF_SHADE[distance.argmin(axis=-1)]


def image_facts(pixels: np.ndarray, label: int) -> ImageFacts:
    """The facts of one image, by the rules of [`batch_facts`].

    Args:
        pixels (`np.ndarray` of shape `(height, width, 3)`, uint8): RGB.
        label (`int`): class index, 0 to 9.
    """
    return batch_facts(pixels[None], [label])[0]


def batch_facts(pixels: np.ndarray, labels: Sequence[int]) -> list[ImageFacts]:
    """The facts of many images, vectorised over images.

    - `luminance`: mean over all pixels of 0.2126 R + 0.7152 G + 0.0722 B on the 8-bit values (Rec. 709 luma).
    - `brightness`: `"dark"` below 110, `"bright"` from 135 on, otherwise `"medium"`: about a third of CIFAR-10 each.
    - `dominant_color`: every pixel of the central half (rows `height // 4` to `height - height // 4`, columns alike)
      is named by [`nearest_colors`]; the most frequent name, the first in `COLOR_NAMES` on a tie.
    - `background_color`: the name of the median color (per channel) of the 3 outermost pixels on each side.

    Args:
        pixels (`np.ndarray` of shape `(num_images, height, width, 3)`, uint8): RGB.
        labels (`Sequence[int]` of length `num_images`): class indices, 0 to 9.

    Raises:
        ValueError: if `pixels` or `labels` have another shape, type or range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) != len(labels):
        raise ValueError(
            f"`pixels` has to be uint8 of shape (num_images, height, width, 3) with one of `labels` an image, "
            f"got {pixels.dtype} of shape {pixels.shape} and {len(labels)} labels."
        )
    if any(not 0 <= label < len(CLASS_NAMES) for label in labels):
        raise ValueError(f"`labels` have to lie in 0 to {len(CLASS_NAMES) - 1}, got {min(labels)} to {max(labels)}.")
    facts = []
    for start in range(0, len(pixels), _IMAGES_AT_ONCE):
        stop = start + _IMAGES_AT_ONCE
        facts += _facts_of_chunk(pixels[start:stop], labels[start:stop])
    return facts


def _facts_of_chunk(pixels: np.ndarray, labels: Sequence[int]) -> list[ImageFacts]:
    height, width = pixels.shape[1:3]
    # In integers up to the division: neither rounding nor the size of the batch moves an image over a threshold.
    sums = pixels.sum(axis=(1, 2), dtype=np.int64)  # (num_images, 3)
    luminance = (sums * (2126, 7152, 722)).sum(axis=1) / (10_000 * height * width)  # (num_images,)
    center = pixels[:, height // 4 : height - height // 4, width // 4 : width - width // 4]
    named = nearest_colors(center.reshape(len(pixels), -1, 3))  # (num_images, num_pixels)
    votes = np.stack([(named == color).sum(axis=1) for color in range(len(COLOR_NAMES))], axis=1)
    is_border = np.ones((height, width), dtype=bool)
    is_border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    border = np.median(pixels[:, is_border], axis=1).round().astype(np.uint8)  # (num_images, 3)
    return [
        ImageFacts(int(label), float(luma), _brightness_level(luma), COLOR_NAMES[dominant], COLOR_NAMES[background])
        for label, luma, dominant, background in zip(
            labels, luminance, votes.argmax(axis=1), nearest_colors(border), strict=True
        )
    ]


def _brightness_level(luminance: float) -> str:
    if luminance < _DARK_BELOW:
        return "dark"
    return "bright" if luminance >= _BRIGHT_FROM else "medium"


__all__ = [
    "BRIGHTNESS_LEVELS",
    "CATEGORIES",
    "CLASS_NAMES",
    "COLOR_NAMES",
    "COLOR_SHADES",
    "ImageFacts",
    "batch_facts",
    "image_facts",
    "nearest_colors",
    "srgb_to_lab",
]
