"""What is known of an image: its class and what follows from it, and what fixed rules read from its pixels.

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
CONTRAST_LEVELS = ("low", "medium", "high")
VIVIDNESS_LEVELS = ("dull", "moderate", "vivid")

# Where an object of the class is usually found.
HABITATS: dict[str, str] = {
    "airplane": "sky",
    "automobile": "road",
    "bird": "sky",
    "cat": "house",
    "deer": "forest",
    "dog": "house",
    "frog": "pond",
    "horse": "farm",
    "ship": "sea",
    "truck": "road",
}
HABITAT_NAMES = tuple(dict.fromkeys(HABITATS.values()))
# What an object of the class can do. Whether a bird swims depends on its kind, few people have seen a cat swim though
# it can, and a ship floats: these three are asked nothing about swimming.
FLYING = ("airplane", "bird")
SWIMMING = ("deer", "dog", "frog", "horse")
NOT_SWIMMING = ("airplane", "automobile", "truck")
CARRYING_PEOPLE = ("airplane", "automobile", "horse", "ship", "truck")

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
_LUMA = (2126, 7152, 722)  # Rec. 709, in ten-thousandths
# The middle level of each starts at the first threshold and ends below the second.
_BRIGHTNESS_THRESHOLDS = (110.0, 135.0)
_CONTRAST_THRESHOLDS = (43.0, 57.0)
_VIVIDNESS_THRESHOLDS = (22.0, 38.0)
# Difference in mean luma from which one part of an image is called brighter than another.
_CLEARLY_BRIGHTER = 10.0
_BORDER = 3
# Bounds the memory of the Lab values of a batch to a few hundred MB at 32x32.
_IMAGES_AT_ONCE = 2000


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image; see [`batch_facts`] for the rules.

    Args:
        label (`int`): CIFAR-10's class index, 0 to 9.
        luminance (`float`): mean Rec. 709 luma of the pixels, 0 (black) to 255 (white).
        brightness (`str`): one of `BRIGHTNESS_LEVELS`.
        contrast (`str`): one of `CONTRAST_LEVELS`.
        vividness (`str`): one of `VIVIDNESS_LEVELS`.
        dominant_color (`str`): one of `COLOR_NAMES`, of the center of the image.
        background_color (`str`): one of `COLOR_NAMES`, of the border of the image.
        brighter_half (`str`): `"top"`, `"bottom"`, or `""` where neither is clearly brighter.
        brighter_area (`str`): `"center"`, `"border"`, or `""` where neither is clearly brighter.
    """

    label: int
    luminance: float
    brightness: str
    contrast: str
    vividness: str
    dominant_color: str
    background_color: str
    brighter_half: str
    brighter_area: str

    @property
    def object_name(self) -> str:
        """The name of the class, one of `CLASS_NAMES`."""
        return CLASS_NAMES[self.label]

    @property
    def category(self) -> str:
        """`"animal"` or `"vehicle"`."""
        return "animal" if self.object_name in _ANIMALS else "vehicle"

    @property
    def living(self) -> str:
        """`"yes"` for an animal, `"no"` for a vehicle."""
        return _yes_no(self.category == "animal")

    @property
    def habitat(self) -> str:
        """Where an object of the class is usually found, by the table `HABITATS`."""
        return HABITATS[self.object_name]

    @property
    def can_fly(self) -> str:
        """`"yes"` or `"no"`, by the table `FLYING`."""
        return _yes_no(self.object_name in FLYING)

    @property
    def can_swim(self) -> str:
        """`"yes"` or `"no"`, by the tables `SWIMMING` and `NOT_SWIMMING`; `""` where the class does not decide it."""
        return _yes_no(self.object_name in SWIMMING) if self.object_name in SWIMMING + NOT_SWIMMING else ""

    @property
    def carries_people(self) -> str:
        """`"yes"` or `"no"`, by the table `CARRYING_PEOPLE`."""
        return _yes_no(self.object_name in CARRYING_PEOPLE)

    @property
    def legs(self) -> str:
        """How many an object of the class has: `"zero"`, `"two"` or `"four"`."""
        if self.category == "vehicle":
            return "zero"
        return "two" if self.object_name == "bird" else "four"

    @property
    def wings(self) -> str:
        """How many an object of the class has: `"zero"` or `"two"` (an airplane's pair counts as two)."""
        return "two" if self.object_name in FLYING else "zero"


def _yes_no(condition: bool) -> str:
    return "yes" if condition else "no"


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
    - `brightness`, of `luminance`: `"dark"` below 110, `"bright"` from 135 on, otherwise `"medium"`.
    - `contrast`, of the standard deviation of luma over the pixels: `"low"` below 43, `"high"` from 57 on, otherwise
      `"medium"`.
    - `vividness`, of the mean chroma of the pixels, the largest of R, G, B minus the smallest as in HSV: `"dull"`
      below 22, `"vivid"` from 38 on, otherwise `"moderate"`.
    - `dominant_color`: every pixel of the central half (rows `height // 4` to `height - height // 4`, columns alike)
      is named by [`nearest_colors`]; the most frequent name, the first in `COLOR_NAMES` on a tie.
    - `background_color`: the name of the median color (per channel) of the 3 outermost pixels on each side.
    - `brighter_half`: the half of the rows whose mean luma is higher by 10 or more, if any. Of an odd number of rows
      the middle one belongs to the bottom.
    - `brighter_area`: the same of the central half and the 3 outermost pixels on each side.

    The thresholds were set on CIFAR-10's train split, where the levels have these shares:

    | fact | shares |
    | --- | --- |
    | `brightness` | dark 0.343, medium 0.336, bright 0.321 |
    | `contrast` | low 0.336, medium 0.338, high 0.327 |
    | `vividness` | dull 0.347, moderate 0.322, vivid 0.331 |
    | `brighter_half` | top 0.485, bottom 0.295, neither 0.220 |
    | `brighter_area` | center 0.337, border 0.475, neither 0.188 |

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
    center = (slice(None), slice(height // 4, height - height // 4), slice(width // 4, width - width // 4))
    is_border = np.ones((height, width), dtype=bool)
    is_border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    # In integers up to the division: neither rounding nor the size of the batch moves an image over a threshold.
    luma = pixels.astype(np.int64) @ np.array(_LUMA)  # (num_images, height, width), 0 to 2,550,000
    chroma = (pixels.max(axis=-1) - pixels.min(axis=-1)).astype(np.int64)  # (num_images, height, width)
    named = nearest_colors(pixels[center].reshape(len(pixels), -1, 3))  # (num_images, num_pixels)
    votes = np.stack([(named == color).sum(axis=1) for color in range(len(COLOR_NAMES))], axis=1)
    border = np.median(pixels[:, is_border], axis=1).round().astype(np.uint8)  # (num_images, 3)
    columns = zip(
        labels,
        _mean_luma(luma),
        luma.reshape(len(pixels), -1).std(axis=1) / 10_000,
        chroma.mean(axis=(1, 2)),
        votes.argmax(axis=1),
        nearest_colors(border),
        _mean_luma(luma[:, : height // 2]) - _mean_luma(luma[:, height // 2 :]),
        _mean_luma(luma[center]) - _mean_luma(luma[:, is_border]),
        strict=True,
    )
    return [
        ImageFacts(
            label=int(label),
            luminance=float(mean),
            brightness=_level(mean, _BRIGHTNESS_THRESHOLDS, BRIGHTNESS_LEVELS),
            contrast=_level(deviation, _CONTRAST_THRESHOLDS, CONTRAST_LEVELS),
            vividness=_level(mean_chroma, _VIVIDNESS_THRESHOLDS, VIVIDNESS_LEVELS),
            dominant_color=COLOR_NAMES[dominant],
            background_color=COLOR_NAMES[background],
            brighter_half=_brighter(top_minus_bottom, "top", "bottom"),
            brighter_area=_brighter(center_minus_border, "center", "border"),
        )
        for label, mean, deviation, mean_chroma, dominant, background, top_minus_bottom, center_minus_border in columns
    ]


def _mean_luma(luma: np.ndarray) -> np.ndarray:
    """Mean of each image, 0 to 255; shape (num_images,)."""
    flat = luma.reshape(len(luma), -1)
    return flat.sum(axis=1) / (10_000 * flat.shape[1])


def _level(value: float, thresholds: tuple[float, float], levels: tuple[str, str, str]) -> str:
    return levels[sum(bool(value >= threshold) for threshold in thresholds)]


def _brighter(difference: float, first: str, second: str) -> str:
    if abs(difference) < _CLEARLY_BRIGHTER:
        return ""
    return first if difference > 0 else second


__all__ = [
    "BRIGHTNESS_LEVELS",
    "CARRYING_PEOPLE",
    "CATEGORIES",
    "CLASS_NAMES",
    "COLOR_NAMES",
    "COLOR_SHADES",
    "CONTRAST_LEVELS",
    "FLYING",
    "HABITATS",
    "HABITAT_NAMES",
    "NOT_SWIMMING",
    "SWIMMING",
    "VIVIDNESS_LEVELS",
    "ImageFacts",
    "batch_facts",
    "image_facts",
    "nearest_colors",
    "srgb_to_lab",
]
