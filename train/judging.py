"""Whether an answer in free wording is right, and what a text says of its image.

```python
>>> is_correct("There is a kitten on the sofa.", "cat", "object")
True
```
"""

import re

from sigphi.train.facts import BRIGHTNESS_LEVELS, CATEGORIES, CLASS_NAMES, COLOR_NAMES
from sigphi.train.questions import QUESTION_TYPES

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
    if question_type not in QUESTION_TYPES or question_type == "description":
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


__all__ = ["asks_for_object", "competing_values", "is_correct", "stated_fact"]
