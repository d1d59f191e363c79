"""The question bank: facts that follow from an image's label and pixels, questions about them, and their judge.

```python
>>> facts = image_facts(pixels, label=3)
>>> facts.object_name, facts.category, facts.background_color
('cat', 'animal', 'gray')
>>> is_correct("There is a kitten on the sofa.", "cat", "object")
True
```
"""

import random
import re
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


# ---------------------------------------------------------------------------------------------------------------------
# Facts


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


# ---------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about one image, with its answer.

    Args:
        question (`str`): what is asked.
        answer (`str`): one or more full sentences.
        question_type (`str`): one of `QUESTION_TYPES`.
        short_answer (`str`): the value that [`is_correct`] looks for, empty for `"description"`.
    """

    question: str
    answer: str
    question_type: str
    short_answer: str


# Fields in braces are filled by _fields; one that starts with `a_` carries its article.
_QUESTIONS: dict[str, tuple[str, ...]] = {
    "object": (
        "What is the main object in this image?",
        "What object does this image show?",
        "What is shown in this picture?",
        "Which object do you see in the image?",
    ),
    "category": (
        "Is the main object an animal or a vehicle?",
        "Which kind of object is this, an animal or a vehicle?",
        "Does this image show an animal or a vehicle?",
    ),
    "yes_no_class": (
        "Is there {a_asked} in the image?",
        "Does this image show {a_asked}?",
        "Can you see {a_asked} in this picture?",
    ),
    "living": (
        "Is the main object a living thing?",
        "Is there something alive in this image?",
        "Does this picture show a living creature?",
    ),
    "lifeless": (
        "Is the main object a machine?",
        "Is there something built by people in this image?",
        "Does this picture show a means of transport?",
    ),
    "dominant_color": (
        "What is the dominant color in the center of the image?",
        "Which color is most common in the middle of this picture?",
        "What color covers most of the center of the image?",
    ),
    "background_color": (
        "What color is the background?",
        "What is the background color of this image?",
        "Which color is most common at the edges of the picture?",
    ),
    "brightness": (
        "What is the overall brightness of the image: dark, medium or bright?",
        "How bright is this picture: dark, medium or bright?",
        "Is the light in the image dark, medium or bright?",
    ),
    "comparison": (
        "Is it {a_first} or {a_second}?",
        "Which of the two is in the image, {a_first} or {a_second}?",
        "Does the picture show {a_first} or {a_second}?",
    ),
    "description": (
        "Describe this image in detail.",
        "Give a detailed description of the image.",
        "What does this picture look like? Describe it in detail.",
    ),
}

# Under the key of its question, with the short answer behind it where the wording depends on that.
_ANSWERS: dict[str, tuple[str, ...]] = {
    "object": (
        "The main object in this image is {a_object}.",
        "This image shows {a_object}.",
        "It is a picture of {a_object}.",
    ),
    "category": (
        "The main object is {a_category}.",
        "It is {a_category}, more exactly {a_object}.",
        "This image shows {a_category}.",
    ),
    "yes_no_class yes": ("Yes, there is {a_asked} in the image.", "Yes, this image shows {a_asked}."),
    "yes_no_class no": ("No, there is {a_object} in the image.", "No, this image shows {a_object}."),
    "living yes": ("Yes, {a_object} is a living thing.", "Yes, the image shows {a_object}, which is an animal."),
    "living no": ("No, {a_object} is a machine.", "No, the image shows {a_object}, which is a vehicle."),
    "lifeless yes": ("Yes, {a_object} is a machine.", "Yes, the image shows {a_object}, which is a vehicle."),
    "lifeless no": ("No, {a_object} is a living thing.", "No, the image shows {a_object}, which is an animal."),
    "dominant_color": (
        "The dominant color in the center of the image is {dominant_color}.",
        "The middle of the picture is mostly {dominant_color}.",
    ),
    "background_color": ("The background is {background_color}.", "The background color is {background_color}."),
    "brightness": ("The overall brightness is {brightness}.", "The light in this picture is {brightness}."),
    "comparison": ("It is {a_object}.", "The picture shows {a_object}.", "Of the two, it is {a_object}."),
    "description": (
        "This image shows {a_object}, which is {a_category}. The center of the image is mostly {dominant_color}. "
        "The background is {background_color}. The overall brightness is {brightness}.",
        "The main object in this image is {a_object}. It is {a_category} in front of {a_background_color} background. "
        "The middle of the picture is mostly {dominant_color}, and the light is {brightness}.",
        "It is a picture of {a_object}. The background color is {background_color}, and the dominant color in the "
        "center is {dominant_color}. Overall the light is {brightness}. The object is {a_category}.",
    ),
}

QUESTION_TYPES = (
    "object",
    "category",
    "yes_no_class",
    "living",
    "dominant_color",
    "background_color",
    "brightness",
    "comparison",
    "description",
)
# An image has one question of a type, and `object` is always among them; `description` is drawn apart.
_DRAWN_TYPES = QUESTION_TYPES[1:-1]
MAX_QUESTIONS = 1 + len(_DRAWN_TYPES)


def make_questions(facts: ImageFacts, rng: random.Random, count: int = 5) -> list[QuestionAnswer]:
    """Draw questions about one image, of distinct types, in random order.

    One is always of type `object`, one is a `description` with probability 1/4 (when `count` leaves room), the others
    are drawn evenly from the remaining types. Over many images `yes_no_class` and `living` are answered by yes and no
    equally often, so that an answer without a look at the image is right half the time.

    Args:
        facts (`ImageFacts`): what is known of the image.
        rng (`random.Random`): the source of every draw; the same state gives the same questions.
        count (`int`, *optional*, defaults to 5): how many, 1 to 8.

    Raises:
        ValueError: if `count` is out of range.
    """
    if not 1 <= count <= MAX_QUESTIONS:
        raise ValueError(f"`count` has to lie in 1 to {MAX_QUESTIONS}, the number of distinct types, got {count}.")
    with_description = rng.random() < _DESCRIPTION_PROBABILITY and count > 1
    types = ["object", "description"] if with_description else ["object"]
    types += rng.sample(_DRAWN_TYPES, count - len(types))
    rng.shuffle(types)
    return [_make_question(question_type, facts, rng) for question_type in types]


def _make_question(question_type: str, facts: ImageFacts, rng: random.Random) -> QuestionAnswer:
    fields = _fields(facts, rng)
    wording = question_type
    # Six of ten classes live: asking half the time for the opposite keeps yes and no even.
    if question_type == "living" and rng.random() < 0.5:
        wording = "lifeless"
    short_answer = {
        "object": facts.object_name,
        "category": facts.category,
        "yes_no_class": "yes" if fields["asked"] == facts.object_name else "no",
        "living": "yes" if (facts.category == "animal") == (wording == "living") else "no",
        "dominant_color": facts.dominant_color,
        "background_color": facts.background_color,
        "brightness": facts.brightness,
        "comparison": facts.object_name,
        "description": "",
    }[question_type]
    question = rng.choice(_QUESTIONS[wording]).format(**fields)
    answer_key = f"{wording} {short_answer}" if short_answer in _YES_NO else wording
    return QuestionAnswer(question, rng.choice(_ANSWERS[answer_key]).format(**fields), question_type, short_answer)


def _fields(facts: ImageFacts, rng: random.Random) -> dict[str, str]:
    other = rng.choice([name for name in CLASS_NAMES if name != facts.object_name])
    first, second = rng.sample((facts.object_name, other), 2)
    fields = {
        "object": facts.object_name,
        "asked": rng.choice((facts.object_name, other)),
        "first": first,
        "second": second,
        "category": facts.category,
        "dominant_color": facts.dominant_color,
        "background_color": facts.background_color,
        "brightness": facts.brightness,
    }
    return fields | {f"a_{name}": _with_article(value) for name, value in fields.items()}


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


# ---------------------------------------------------------------------------------------------------------------------
# Judging

_YES_NO = ("yes", "no")
# Words that mean the value and nothing else in an answer: "does" would read as the plural of "doe".
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "airplane": ("plane", "aeroplane", "aircraft", "jet", "airliner", "biplane"),
    "automobile": ("car", "auto", "sedan"),
    "bird": (),
    "cat": ("kitten", "kitty"),
    "deer": ("fawn", "stag"),
    "dog": ("puppy",),
    "frog": ("toad",),
    "horse": ("pony", "foal"),
    "ship": ("boat", "sailboat"),
    "truck": ("lorry", "pickup", "firetruck"),
    "gray": ("grey",),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "object": CLASS_NAMES,
    "category": CATEGORIES,
    "yes_no_class": _YES_NO,
    "living": _YES_NO,
    "dominant_color": COLOR_NAMES,
    "background_color": COLOR_NAMES,
    "brightness": BRIGHTNESS_LEVELS,
    "comparison": CLASS_NAMES,
}


def competing_values(question_type: str) -> tuple[str, ...]:
    """Every short answer that a question of this type can have: `("yes", "no")`, the ten classes, ...

    Empty for `"description"` and for a type that is not one of `QUESTION_TYPES`.
    """
    return _VALUES.get(question_type, ())


def _plural(noun: str) -> str:
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def _value_of_word(question_type: str) -> dict[str, str]:
    table = {}
    for value in competing_values(question_type):
        names = (value, *_SYNONYMS.get(value, ()))
        plurals = () if value in _YES_NO else tuple(_plural(name) for name in names)
        table.update(dict.fromkeys((*names, *plurals), value))
    return table


_WORD_TABLES = {question_type: _value_of_word(question_type) for question_type in QUESTION_TYPES}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def is_correct(answer: str, short_answer: str, question_type: str) -> bool:
    """Whether an answer, in free wording, holds the short answer and no competing value.

    Case and punctuation do not count; whole words are compared, so that "cart" is not "car"; plurals and synonyms
    ("kitten", "plane", "grey") stand for their value. An answer that names two classes is wrong for `object` and
    `comparison`, one with both yes and no is wrong for `yes_no_class` and `living`; there a class may be named. For a
    type without [`competing_values`], holding the words of the short answer in a row is enough.

    It judges the value only, not the rest of the sentence: a fluent but false description can pass.

    Args:
        answer (`str`): what was answered.
        short_answer (`str`): the value to look for, not empty.
        question_type (`str`): one of `QUESTION_TYPES`, or any other name, such as `""` for unknown.

    Raises:
        ValueError: if `short_answer` holds no word: there is nothing to judge.
    """
    wanted = _words(short_answer)
    if not wanted:
        raise ValueError(f"`short_answer` has to hold a word, got {short_answer!r}; leave such rows out.")
    table = _WORD_TABLES.get(question_type, {})
    words = _words(answer)
    if len(wanted) == 1 and wanted[0] in table:
        return {table[word] for word in words if word in table} == {table[wanted[0]]}
    return f" {' '.join(wanted)} " in f" {' '.join(words)} "


_OBJECT = "(?:main |primary |central )?(?:object|subject|thing)"
_SHOWN = "(?:shown|visible|depicted|pictured|present)"
_IMAGE = "(?:this|the) (?:image|picture|photo|photograph)"
# Matched against the words in lower case with single spaces, where "what's" has become "what s".
_OBJECT_QUESTION = re.compile(
    "|".join(
        (
            f"what (?:is|s) (?:(?:the|this) )?{_OBJECT}(?: {_SHOWN})?(?: (?:in|of|on) {_IMAGE})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} is (?:this|it|{_SHOWN})(?: (?:in|on) {_IMAGE})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} (?:can|do) you see(?: (?:in|on) {_IMAGE})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} (?:does {_IMAGE} (?:show|contain)|is (?:in|on) {_IMAGE})",
            f"what (?:is|s) (?:{_SHOWN} )?(?:in|on) {_IMAGE}",
            f"what does {_IMAGE} (?:show|depict|contain)",
            f"what (?:can|do) you see(?: (?:in|on) {_IMAGE})?",
            f"(?:please )?(?:name|identify) the {_OBJECT}(?: (?:in|of|on) {_IMAGE})?",
        )
    )
)


def stated_fact(answer: str, question_type: str, short_answer: str) -> str:
    """What a typed answer says of its image, in a form in which answers of different wording can be compared.

    Args:
        answer (`str`): the sentence.
        question_type (`str`): the type of its question; answers of type `"description"` state many facts at once.
        short_answer (`str`): the value that was asked for.

    Returns:
        `str`: `"object=deer"` when the answer names exactly one class, else `"<question_type>=<short_answer>"` for a
        category, a color or the brightness, else `""`: the answer stands for itself.
    """
    if question_type not in _DRAWN_TYPES and question_type != "object":
        return ""
    named = {_WORD_TABLES["object"][word] for word in _words(answer) if word in _WORD_TABLES["object"]}
    if len(named) == 1:
        return f"object={named.pop()}"
    is_plain = question_type in ("category", "dominant_color", "background_color", "brightness")
    return f"{question_type}={short_answer}" if is_plain else ""


def asks_for_object(question: str) -> bool:
    """Whether a question asks what the object is, judged by the whole of its wording.

    For a CSV without types. Recognised, in any case and punctuation, are such as "What is the main object in this
    image?", "What object is shown?", "Which object do you see in the picture?", "What is in this photo?", "What does
    the image show?", "Identify the main object." A question that goes on ("... doing", "... made of") or that asks
    for a property of the object (its color, its size) is not one.
    """
    return _OBJECT_QUESTION.fullmatch(" ".join(_words(question))) is not None


__all__ = [
    "BRIGHTNESS_LEVELS",
    "CATEGORIES",
    "CLASS_NAMES",
    "COLOR_NAMES",
    "COLOR_SHADES",
    "ImageFacts",
    "MAX_QUESTIONS",
    "QUESTION_TYPES",
    "QuestionAnswer",
    "asks_for_object",
    "batch_facts",
    "competing_values",
    "image_facts",
    "is_correct",
    "make_questions",
    "stated_fact",
    "nearest_colors",
    "srgb_to_lab",
]
