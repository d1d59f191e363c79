"""Whether an answer in free wording is right, and what a text says of its image.

```python
>>> is_correct("There is a kitten on the sofa.", "cat", "object")
True
>>> sorted(stated_facts("A gray cat. The background is not blue but brown, and the contrast is low."))
[('background_color', 'brown'), ('contrast', 'low'), ('dominant_color', 'gray'), ('object', 'cat')]
```
"""

import re
from collections.abc import Iterator
from functools import lru_cache

from sigphi.train.facts import (
    BRIGHTNESS_LEVELS,
    CATEGORIES,
    CLASS_NAMES,
    COLOR_NAMES,
    CONTRAST_LEVELS,
    HABITAT_NAMES,
    VIVIDNESS_LEVELS,
)
from sigphi.train.questions import DESCRIBED, QUESTION_TYPES, REFUSAL

# What [`stated_fact`] gives for a text that is neither true nor false of an image.
SAYS_NOTHING = "nothing"

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
    "medium": ("moderate",),
    "moderate": ("medium",),
    "dull": ("muted", "pale"),
    "vivid": ("saturated", "vibrant"),
    "sky": ("air",),
    "road": ("street", "highway"),
    "house": ("home",),
    "forest": ("wood",),
    "pond": ("lake", "swamp"),
    "farm": ("pasture", "stable"),
    "sea": ("ocean",),
    "top": ("upper",),
    "bottom": ("lower",),
    "center": ("centre", "middle"),
    "border": ("edge",),
    "zero": ("0", "no", "none"),
    "two": ("2",),
    "four": ("4",),
}
_VALUES: dict[str, tuple[str, ...]] = {
    "object": CLASS_NAMES,
    "category": CATEGORIES,
    "yes_no_class": _YES_NO,
    "living": _YES_NO,
    "habitat": HABITAT_NAMES,
    "can_fly": _YES_NO,
    "can_swim": _YES_NO,
    "carries_people": _YES_NO,
    "counting": ("zero", "two", "four"),
    "dominant_color": COLOR_NAMES,
    "background_color": COLOR_NAMES,
    "brightness": BRIGHTNESS_LEVELS,
    "contrast": CONTRAST_LEVELS,
    "vividness": VIVIDNESS_LEVELS,
    "comparison": CLASS_NAMES,
    "brighter_half": ("top", "bottom"),
    "brighter_area": ("center", "border"),
    "refusal": (REFUSAL,),
}


def competing_values(question_type: str) -> tuple[str, ...]:
    """Every short answer that a question of this type can have: `("yes", "no")`, the ten classes, ...

    Empty for `"description"` and for a type that is not one of `QUESTION_TYPES`.
    """
    return _VALUES.get(question_type, ())


def _plural(noun: str) -> str:
    if re.search("[^aeiou]y$", noun):
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
# Word in lower case -> the class that it names: names, plurals and synonyms.
CLASS_OF_WORD = dict(_WORD_TABLES["object"])


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


_NO_WORD = "a short answer has to hold a word, got {!r}"


def is_correct(answer: str, short_answer: str, question_type: str) -> bool:
    """Whether an answer, in free wording, holds the short answer and no competing value.

    Case and punctuation do not count; whole words are compared, so that "cart" is not "car"; plurals and synonyms
    ("kitten", "plane", "grey") stand for their value. An answer that names two classes is wrong for `object` and
    `comparison`, one with both yes and no is wrong where yes or no is asked for; there a class may be named. For a
    type without [`competing_values`], holding the words of the short answer in a row is enough.

    Two types are judged otherwise. An answer to `refusal` is right when it [`is_refusal`]. A `description` is right
    when it states the object, and every fact that it states ([`stated_facts`]) is among those of the short answer
    ([`checkable_facts`]).

    It judges the value only, not the rest of the sentence: a fluent but false answer can pass.

    Args:
        answer (`str`): what was answered.
        short_answer (`str`): the value to look for, not empty.
        question_type (`str`): one of `QUESTION_TYPES`, or any other name, such as `""` for unknown.

    Raises:
        ValueError: if `short_answer` holds no word: there is nothing to judge.
    """
    wanted = _words(short_answer)
    if not wanted:
        raise ValueError(_NO_WORD.format(short_answer))
    if question_type == "refusal":
        return is_refusal(answer)
    if question_type == "description":
        stated = stated_facts(answer)
        return "object" in dict(stated) and stated <= set(checkable_facts(short_answer).items())
    table = _WORD_TABLES.get(question_type, {})
    words = _words(answer)
    if len(wanted) == 1 and wanted[0] in table:
        return {table[word] for word in words if word in table} == {table[wanted[0]]}
    return f" {' '.join(wanted)} " in f" {' '.join(words)} "


_IMPOSSIBLE = "(?:unable to|impossible to|not possible to|hard to|no way to)"
_CANNOT = f"(?:cannot|can not|can t|could not|couldn t|not able to|{_IMPOSSIBLE})"
_LEARN = "(?:tell|say|know|determine|answer|identify|recogni[sz]e|judge|infer|decide|guess|find out|make out)"
_LEARNT = "(?:told|said|known|determined|answered|identified|recogni[sz]ed|judged|inferred|decided|guessed|made out)"
_DOES_NOT = "(?:do not|don t|does not|doesn t|did not|didn t)"
_IMAGE = "(?:image|picture|photo|photograph)"
# What is said of the power to know, whatever comes first.
_STRONG_REFUSAL = re.compile(
    rf"\b(?:{_CANNOT} (?:really |possibly |reliably )?(?:{_LEARN}|be {_LEARNT})|{_DOES_NOT} (?:know|tell)"
    r"|unknown|not known|unclear|not clear|not sure|no idea|no information|not enough (?:information|details?|pixels)"
    rf"|{_IMAGE} (?:is |s )?(?:far |much )?too (?:small|blurry|coarse))\b"
)
# The same words deny an object after "no": "No, a dog cannot be seen."
_WEAK_REFUSAL = re.compile(
    rf"\b(?:{_CANNOT} be (?:seen|read)|(?:i|we|you|one) {_CANNOT} (?:see|read)|{_IMPOSSIBLE} (?:see|read)"
    rf"|{_IMAGE} {_DOES_NOT} (?:show|say|contain|reveal) (?:that|this|it|such|enough|what|who|how)"
    r"|(?:is not|are not|isn t|aren t) (?:visible|shown|readable|legible|given))\b"
)


def is_refusal(answer: str) -> bool:
    """Whether an answer, in free wording, says that the question cannot be answered from the image.

    Recognised are the inability to tell, know, determine, identify ... ("I cannot tell", "It is impossible to say",
    "Unknown", "The picture is too small"), and, unless the answer begins with yes or no, that something cannot be seen
    or read or is not shown. "No, it cannot swim." and "No, a dog cannot be seen." answer their question. Of several
    sentences those that refuse have to hold half of the words: an aside at the end of an answer is no refusal.
    """
    parts = [_words(part) for part in re.split("[.!?;]", answer)]
    patterns = [_STRONG_REFUSAL]
    if _words(answer)[:1] not in (["yes"], ["no"]):
        patterns.append(_WEAK_REFUSAL)
    refusing = sum(len(part) for part in parts if any(pattern.search(" ".join(part)) for pattern in patterns))
    return refusing > 0 and 2 * refusing >= sum(map(len, parts))


def parse_facts(short_answer: str) -> dict[str, str]:
    """Read the facts that a description's short answer holds, `"object=cat; category=animal"`.

    Raises:
        ValueError: if it is written otherwise. The empty string holds no facts.
    """
    pairs = [pair.split("=") for pair in short_answer.split(";") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "the short answer of a description has to be of the form 'object=cat; category=animal', got "
            f"{short_answer!r}"
        )
    return {name.strip(): value.strip() for name, value in pairs}


def plain_value(short_answer: str, question_type: str) -> str:
    """A short answer in the one spelling in which answers are compared: "cat" for "Cat" and "kitten", else its words.

    Empty for one without a word.
    """
    words = _words(short_answer)
    table = _WORD_TABLES.get(question_type, {})
    return table.get(words[0], words[0]) if len(words) == 1 else " ".join(words)


def checkable_facts(short_answer: str) -> dict[str, str]:
    """
    Those of [`parse_facts`] that [`stated_facts`] can find in a text, each with its [`plain_value`].

    Raises:
        ValueError: as [`parse_facts`] does.
    """
    facts = {name: plain_value(value, name) for name, value in parse_facts(short_answer).items()}
    return {name: value for name, value in facts.items() if name in DESCRIBED and value in competing_values(name)}


def check_short_answer(question_type: str, short_answer: str) -> None:
    """Whether answers can be judged by a short answer that is not empty.

    Raises:
        ValueError: if it holds no word, or is that of a description and no list of facts; it says what it has to be.
    """
    if question_type == "description":
        parse_facts(short_answer)
    elif not _words(short_answer):
        raise ValueError(_NO_WORD.format(short_answer))


# Words that say what a value in the same clause is said of.
_KEYS: dict[str, str] = {
    **dict.fromkeys(("center", "centre", "middle", "central", "dominant"), "dominant_color"),
    **dict.fromkeys(("background", "edge", "edges", "border", "borders", "behind"), "background_color"),
    **dict.fromkeys(("light", "lighting", "brightness", "overall"), "brightness"),
    "contrast": "contrast",
    **dict.fromkeys(("colors", "colours", "vividness", "saturation"), "vividness"),
    **dict.fromkeys(("usual", "usually", "typical", "typically", "lives", "live", "habitat"), "habitat"),
}
_VALUE_ATTRIBUTES = tuple(dict.fromkeys(_KEYS.values()))
_SHADES = ("dark", "bright", "light", "pale")
_SCENES = ("image", "picture", "photo", "photograph", "scene")
_COPULAS = ("is", "are", "looks", "appears")
_FILLERS = ("a", "an", "the", "mostly", "mainly", "partly", "very", "rather", "quite", "some", "also", "overall")
_CLAUSE_ENDS = re.compile(r",|:|\b(?:and|but|while|with|whereas|which|that|in front of|against)\b")
_NEGATIONS = ("no", "not", "never", "neither", "nor", "without", "cannot")


def _sentences(text: str) -> list[str]:
    return re.split(r"[.!?;\n]+", re.sub("n['\u2019]t\\b", " not", text.lower()))


def _clauses(sentence: str) -> Iterator[list[str]]:
    """The clauses of a sentence, each as words up to a negation: what follows is denied."""
    for clause in _CLAUSE_ENDS.split(sentence):
        words = _words(clause)
        yield words[: next((i for i, word in enumerate(words) if word in _NEGATIONS), len(words))]


def named_classes(text: str) -> set[str]:
    """The classes of CIFAR-10 that a text says are there, by name, plural or synonym ("kitten", "planes").

    Not counted is a class behind a negation in its clause: "not a dog", "no cats", but "a cat cannot fly".
    """
    table = _WORD_TABLES["object"]
    words = (word for sentence in _sentences(text) for clause in _clauses(sentence) for word in clause)
    return {table[word] for word in words if word in table}


def stated_facts(text: str) -> set[tuple[str, str]]:
    """The facts that a description in free wording states: pairs of attribute and value such as `("object", "cat")`.

    Sentences are read clause by clause (between commas, "and", "with" ...), and what follows a negation in its clause
    is not stated. The rules:

    - `object`: [`named_classes`]. `category`: an animal or a vehicle is named.
    - `background_color`, `dominant_color`, `brightness`, `contrast`, `vividness`, `habitat`: a value of the attribute
      in a clause with a word of it, such as "background" or "edges", "center" or "dominant", "light", "contrast",
      "colors", "usually". Where a clause has words of several attributes that the value may belong to ("medium"), the
      one right behind the value counts, else the nearest before it, else the nearest after it. A clause of values
      alone belongs to what came before: "The background is blue and white" states two.
    - A color also is the `dominant_color` right before the object ("a gray cat") or as its state ("the cat is gray").
    - `brightness` is stated by a dark or bright image, too, but not by shades as in "dark green".

    Another value of the same attribute is another pair: a text that contradicts itself states both.
    """
    return {fact for sentence in _sentences(text) for fact in _facts_of_sentence(sentence)}


# Descriptions of many images share most of their sentences.
@lru_cache(maxsize=20_000)
def _facts_of_sentence(sentence: str) -> frozenset[tuple[str, str]]:
    facts = set()
    before = ""
    for words in _clauses(sentence):
        for position, word in enumerate(words):
            attribute = _attribute_of(words, position, before)
            stated = [name for name in ("object", "category", attribute) if word in _WORD_TABLES.get(name, ())]
            facts |= {(name, _WORD_TABLES[name][word]) for name in stated}
            before = attribute or before
        before = next((_KEYS[word] for word in reversed(words) if word in _KEYS), before)
    return frozenset(facts)


def _attribute_of(words: list[str], position: int, before: str) -> str:
    """What the word at `position` is a value of, `""` for nothing; `before` is what the sentence spoke of last."""
    word, following = words[position], words[position + 1 : position + 2]
    candidates = [name for name in _VALUE_ATTRIBUTES if word in _WORD_TABLES[name] and word not in _KEYS]
    is_shade = word in _SHADES and following and following[0] in _WORD_TABLES["dominant_color"]
    if not candidates or is_shade:
        return ""
    keys = [(i, _KEYS[other]) for i, other in enumerate(words) if _KEYS.get(other) in candidates]
    behind = [name for i, name in keys if i == position + 1]
    earlier = [name for i, name in reversed(keys) if i < position]
    later = [name for i, name in keys if i > position]
    if behind or earlier or later:
        return (behind + earlier + later)[0]
    subject = _subject_of(words, position)
    if "dominant_color" in candidates and subject in (*_WORD_TABLES["object"], *_WORD_TABLES["category"], "object"):
        return "dominant_color"
    if "brightness" in candidates and subject in _SCENES:
        return "brightness"
    is_list = all(other in _FILLERS + _SHADES or other in _WORD_TABLES[candidates[0]] for other in words)
    return before if is_list and before in candidates else ""


def _subject_of(words: list[str], position: int) -> str:
    """The word that the adjective at `position` belongs to: the next one, or the one before an "is"."""
    if position + 1 < len(words):
        return words[position + 1]
    start = [word for word in words[:position] if word not in _FILLERS + _SHADES]
    return start[-2] if len(start) > 1 and start[-1] in _COPULAS else ""


_OBJECT = "(?:main |primary |central )?(?:object|subject|thing)"
_SHOWN = "(?:shown|visible|depicted|pictured|present)"
_IT = "(?:this|the) (?:image|picture|photo|photograph)"
# Matched against the words in lower case with single spaces, where "what's" has become "what s".
_OBJECT_QUESTION = re.compile(
    "|".join(
        (
            f"what (?:is|s) (?:(?:the|this) )?{_OBJECT}(?: {_SHOWN})?(?: (?:in|of|on) {_IT})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} is (?:this|it|{_SHOWN})(?: (?:in|on) {_IT})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} (?:can|do) you see(?: (?:in|on) {_IT})?",
            f"(?:what|which) (?:kind of )?{_OBJECT} (?:does {_IT} (?:show|contain)|is (?:in|on) {_IT})",
            f"what (?:is|s) (?:{_SHOWN} )?(?:in|on) {_IT}",
            f"what does {_IT} (?:show|depict|contain)",
            f"what (?:can|do) you see(?: (?:in|on) {_IT})?",
            f"(?:please )?(?:name|identify) the {_OBJECT}(?: {_SHOWN})?(?: (?:in|of|on) {_IT})?",
        )
    )
)


# Types whose short answer is true of the image whatever was asked, so that it is a fact under the type's name.
_PLAIN_TYPES = (
    "category",
    "living",
    "habitat",
    "can_fly",
    "can_swim",
    "carries_people",
    "dominant_color",
    "background_color",
    "brightness",
    "contrast",
    "vividness",
    "brighter_half",
    "brighter_area",
)


def stated_fact(answer: str, question_type: str, short_answer: str) -> str:
    """What a typed answer says of its image, in a form in which answers of different wording can be compared.

    Args:
        answer (`str`): the sentence.
        question_type (`str`): the type of its question; answers of type `"description"` state many facts at once.
        short_answer (`str`): the value that was asked for.

    Returns:
        `str`: `"object=deer"` when the answer names exactly one class ([`named_classes`]), else
        `"legs=four"` or `"wings=two"` for a number of these, `"<question_type>=<short_answer>"` for another type whose
        short answer is a fact by itself (a color, a level, `"can_fly=no"`). `SAYS_NOTHING` for a refusal, and for a
        bare yes, no or number, which is true or false only together with its question, and for an answer that the
        short answer contradicts. Otherwise `""`: the answer stands for itself.
    """
    if question_type not in QUESTION_TYPES or question_type == "description" or not _words(short_answer):
        return ""
    if not is_correct(answer, short_answer, question_type):
        return SAYS_NOTHING
    words = _words(answer)
    if question_type == "refusal" or set(words) <= {*_YES_NO, *_WORD_TABLES["counting"]}:
        return SAYS_NOTHING
    named = named_classes(answer)
    if len(named) == 1:
        return f"object={named.pop()}"
    if question_type == "counting":
        parts = [part for part in ("legs", "wings") if part in words]
        return f"{parts[0]}={short_answer}" if len(parts) == 1 else SAYS_NOTHING
    return f"{question_type}={short_answer}" if question_type in _PLAIN_TYPES else ""


def known_facts(answer: str, question_type: str, short_answer: str) -> set[str]:
    """What a typed answer tells of its image: its [`stated_fact`], or all facts of a description."""
    if question_type == "description":
        return {f"{attribute}={value}" for attribute, value in parse_facts(short_answer).items()}
    return {stated_fact(answer, question_type, short_answer)} - {"", SAYS_NOTHING}


def asks_for_object(question: str) -> bool:
    """Whether a question asks what the object is, judged by the whole wording of its last sentence.

    For a CSV without types. Recognised, in any case and punctuation, are such as "What is the main object in this
    image?", "What object is shown?", "Which object do you see in the picture?", "What is in this photo?", "What does
    the image show?", "Identify the main object." A question that goes on ("... doing", "... made of") or that asks
    for a property of the object (its color, its size) is not one.
    """
    last_sentence = re.split(r"(?<=[.?!])\s+", question.strip())[-1]
    return _OBJECT_QUESTION.fullmatch(" ".join(_words(last_sentence))) is not None


__all__ = [
    "CLASS_OF_WORD",
    "SAYS_NOTHING",
    "asks_for_object",
    "check_short_answer",
    "checkable_facts",
    "competing_values",
    "is_correct",
    "is_refusal",
    "known_facts",
    "named_classes",
    "parse_facts",
    "plain_value",
    "stated_fact",
    "stated_facts",
]
