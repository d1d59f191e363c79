"""The question bank: questions about the facts of an image, in many wordings, and their answers."""

import random
from dataclasses import dataclass

from sigphi.train.facts import CLASS_NAMES, ImageFacts

_DESCRIPTION_PROBABILITY = 0.25
_YES_NO = ("yes", "no")


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


__all__ = ["MAX_QUESTIONS", "QUESTION_TYPES", "QuestionAnswer", "make_questions"]
