"""The question bank: questions about the facts of an image, in many wordings, and their answers.

Every type has two sets of question wordings. Training sees the first only; the second, `"held-out"`, asks the same in
new sentences made of the same words. So a model that answers these has learnt what the words ask for.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sigphi.train.facts import CLASS_NAMES, ImageFacts

REFUSAL = "cannot tell"
PHRASINGS = ("train", "held-out")

_DESCRIPTION_PROBABILITY = 0.25
_REFUSAL_PROBABILITY = 0.45
_LEAD_PROBABILITY = 0.5
_IMAGE_NOUNS = ("image", "picture", "photo")
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class QuestionAnswer:
    """One question about one image, with its answer.

    Args:
        question (`str`): what is asked.
        answer (`str`): one or more full sentences.
        question_type (`str`): one of `QUESTION_TYPES`.
        short_answer (`str`): the value that [`is_correct`] looks for; for `"description"` the facts that it states,
            as [`parse_facts`] reads them.
    """

    question: str
    answer: str
    question_type: str
    short_answer: str


# Fields in braces are filled by _fields; one that starts with `a_` carries its article.
LEADS = (
    "Look at the {image}.",
    "Look closely.",
    "Here is a small {image}.",
    "This {image} has 32 by 32 pixels.",
    "Please look at this {image}.",
    "One question about this {image}.",
)

TRAIN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "object": (
        "What is the main object in this {image}?",
        "What object does this {image} show?",
        "What is shown in this {image}?",
        "Which object do you see in the {image}?",
        "What kind of object is this?",
        "What can you see in the {image}?",
        "Identify the main object.",
    ),
    "category": (
        "Is the main object an animal or a vehicle?",
        "Which kind of object is this, an animal or a vehicle?",
        "Does this {image} show an animal or a vehicle?",
        "Animal or vehicle: what is in the {image}?",
        "Is it a vehicle or an animal?",
        "To which group does the object belong, vehicles or animals?",
        "What is the category of the main object, animal or vehicle?",
    ),
    "yes_no_class": (
        "Is there {a_asked} in the {image}?",
        "Does this {image} show {a_asked}?",
        "Can you see {a_asked} in this {image}?",
        "Is the main object {a_asked}?",
        "Is this {a_asked}?",
        "Do you see {a_asked} here?",
        "Is it true that this {image} shows {a_asked}?",
    ),
    "living": (
        "Is the main object a living thing?",
        "Is there something alive in this {image}?",
        "Does this {image} show a living creature?",
        "Is the object alive?",
        "Is it a living being?",
        "Would you call the main object alive?",
        "Can you see something living in the {image}?",
    ),
    "habitat": (
        "Where is this kind of object usually found?",
        "Which place is typical for the main object?",
        "In which place would you usually find the object?",
        "What is the usual habitat of this kind of object?",
        "Where does an object of this kind belong?",
        "Where would you look for such an object?",
        "What is the typical habitat of the main object?",
    ),
    "can_fly": (
        "Can the main object fly?",
        "Is this object able to fly?",
        "Can it fly through the air?",
        "Does this kind of object fly?",
        "Would you say that the object can fly?",
        "Is it true that it can fly?",
        "Is the object in the {image} able to fly through the air?",
    ),
    "can_swim": (
        "Can the main object swim?",
        "Is this object able to swim?",
        "Can it swim in water?",
        "Does this kind of object swim?",
        "Would you say that the object can swim?",
        "Is it true that it can swim?",
        "Is the object in the {image} able to swim in water?",
    ),
    "carries_people": (
        "Can the main object carry people?",
        "Is this object able to carry people?",
        "Can it carry a person?",
        "Does this kind of object carry people?",
        "Would you say that the object can carry people?",
        "Is it true that it can carry a person?",
        "Can people travel on it or in it?",
    ),
    "counting": (
        "How many {parts} does the main object have?",
        "How many {parts} does this kind of object have?",
        "What is the number of {parts} of this object?",
        "Count the {parts} of the main object: how many does it usually have?",
        "What number of {parts} does such an object have?",
        "How many {parts} would you usually count here?",
        "How many {parts} has it?",
    ),
    "dominant_color": (
        "What is the dominant color in the center of the {image}?",
        "Which color is most common in the middle of this {image}?",
        "What color covers most of the center?",
        "What is the main color in the middle of the {image}?",
        "Which color do you see most in the center of this {image}?",
        "Tell me the dominant color of the middle.",
        "What color does the center of this {image} have?",
    ),
    "background_color": (
        "What color is the background?",
        "What is the background color of this {image}?",
        "Which color is most common at the edges of the {image}?",
        "Which color does the background have?",
        "What color do you see at the edges?",
        "Tell me the color of the background.",
        "What is the color behind the main object, in the background?",
    ),
    "brightness": (
        "What is the overall brightness of the {image}: dark, medium or bright?",
        "How bright is this {image}: dark, medium or bright?",
        "Is the light in the {image} dark, medium or bright?",
        "Is this {image} bright, medium or dark?",
        "What level of brightness does this {image} have?",
        "How dark or bright is the {image} overall?",
        "Would you call the light dark, medium or bright?",
    ),
    "contrast": (
        "What is the contrast of the {image}: low, medium or high?",
        "How strong is the contrast in this {image}: low, medium or high?",
        "Is the contrast low, medium or high?",
        "What level of contrast does the {image} have?",
        "Does this {image} have a high, medium or low contrast?",
        "How much contrast is there in this {image}?",
        "Would you call the contrast high, medium or low?",
    ),
    "vividness": (
        "How vivid are the colors: dull, moderate or vivid?",
        "Are the colors of this {image} dull, moderate or vivid?",
        "What is the vividness of the colors: dull, moderate or vivid?",
        "How strong and vivid are the colors in the {image}?",
        "Would you call the colors vivid, moderate or dull?",
        "What level of vividness do the colors have?",
        "Does the {image} have vivid, moderate or dull colors?",
    ),
    "comparison": (
        "Is it {a_first} or {a_second}?",
        "Which of the two is in the {image}, {a_first} or {a_second}?",
        "Does the {image} show {a_first} or {a_second}?",
        "Do you see {a_first} or {a_second} here?",
        "Is the main object {a_first} or {a_second}?",
        "What is this, {a_first} or {a_second}?",
        "Which is shown, {a_first} or {a_second}?",
    ),
    "brighter_half": (
        "Which half of the {image} is brighter, the top or the bottom?",
        "Is the top half or the bottom half brighter?",
        "Is the {image} brighter at the top or at the bottom?",
        "Where is more light, in the top half or in the bottom half?",
        "Which half has more light, top or bottom?",
        "Compare the bottom half with the top half: which is brighter?",
        "Is there more light at the bottom or at the top of this {image}?",
    ),
    "brighter_area": (
        "Which area of the {image} is brighter, the center or the border?",
        "Is the center or the border brighter?",
        "Is the {image} brighter in the center or at the border?",
        "Where is more light, in the center or at the border?",
        "Which area has more light, center or border?",
        "Compare the border with the center: which is brighter?",
        "Is there more light at the border or in the center of this {image}?",
    ),
    "refusal": (
        "What happened before this {image} was taken?",
        "What will happen after this {image} was taken?",
        "Who took this {image}?",
        "Which person took the {image}?",
        "What will the weather be tomorrow?",
        "What was the weather the day before?",
        "What text is written on it?",
        "Can you read the text on the object?",
        "In which city was this {image} taken?",
        "What is the city called?",
        "On which day was the {image} taken?",
        "What time of day is it?",
        "How much does it weigh?",
        "What is the weight of the main object?",
        "How old is it?",
        "What is the age of the main object?",
        "Who is the owner of it?",
        "Which person owns the main object?",
        "Do you know who took the {image}?",
        "Which city do you see here?",
        "Do you know the city?",
        "How many years old is it?",
        "Tell me the age of the object.",
        "Tell me the weight of it.",
        "Tell me what the weather will be.",
        "Tell me the day on which this {image} was taken.",
    ),
    "description": (
        "Describe this image in detail.",
        "Give a detailed description of the {image}.",
        "What does this {image} look like? Describe it in detail.",
        "Describe everything that you see in the {image}.",
        "Write a description of this {image} in several sentences.",
        "Please describe the {image}.",
        "Describe in several sentences what the {image} looks like.",
    ),
}
HELD_OUT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "object": (
        "Which main object can you see in this {image}?",
        "Identify the object shown in the {image}.",
        "What kind of object does the {image} show?",
    ),
    "category": (
        "What do you see in this {image}, a vehicle or an animal?",
        "Which group is shown here, animals or vehicles?",
        "Would you call the object a vehicle or an animal?",
    ),
    "yes_no_class": (
        "Is {a_asked} shown in this {image}?",
        "Is it true that there is {a_asked} here?",
        "Would you call the main object {a_asked}?",
    ),
    "living": (
        "Is this thing alive?",
        "Do you see a living creature here?",
        "Is it true that the object is a living being?",
    ),
    "habitat": (
        "Where would you usually find an object of this kind?",
        "What is the typical place of such an object?",
        "In which habitat does this kind of object belong?",
    ),
    "can_fly": (
        "Is the main object able to fly?",
        "Would you say that it is able to fly through the air?",
        "Is it true that this kind of object can fly?",
    ),
    "can_swim": (
        "Is the main object able to swim?",
        "Would you say that it is able to swim in water?",
        "Is it true that this kind of object can swim?",
    ),
    "carries_people": (
        "Is the main object able to carry a person?",
        "Would you say that people can travel on it?",
        "Is it true that this kind of object can carry people?",
    ),
    "counting": (
        "How many {parts} does such an object usually have?",
        "What is the number of {parts} that you would count here?",
        "Tell me how many {parts} the main object has.",
    ),
    "dominant_color": (
        "Which color covers most of the middle of the {image}?",
        "Tell me the main color in the center.",
        "What dominant color does the middle have?",
    ),
    "background_color": (
        "Which color is the background of the {image}?",
        "What color do the edges of this {image} have?",
        "Tell me the background color.",
    ),
    "brightness": (
        "Overall, is the brightness of this {image} dark, medium or bright?",
        "How bright or dark is the light in this {image}?",
        "What is the level of brightness here?",
    ),
    "contrast": (
        "Is this {image} one of low, medium or high contrast?",
        "What is the level of contrast here?",
        "How much contrast does this {image} show?",
    ),
    "vividness": (
        "Is the vividness of the {image} dull, moderate or vivid?",
        "What is the level of vividness here?",
        "How dull or vivid are the colors of this {image}?",
    ),
    "comparison": (
        "Which of the two do you see, {a_first} or {a_second}?",
        "Is {a_first} or {a_second} shown in this {image}?",
        "Which object is this, {a_first} or {a_second}?",
    ),
    "brighter_half": (
        "What is brighter in this {image}, the top half or the bottom half?",
        "Where is the {image} brighter, at the bottom or at the top?",
        "Does the top or the bottom of the {image} have more light?",
    ),
    "brighter_area": (
        "What is brighter in this {image}, the center or the border?",
        "Where is the {image} brighter, at the border or in the center?",
        "Does the center or the border of the {image} have more light?",
    ),
    "refusal": (
        "Tell me who took the {image}.",
        "What was the weather after the {image} was taken?",
        "Which text can you read here?",
        "Which city is this?",
        "What is the weight of it?",
        "Tell me how old the main object is.",
        "Who owns it?",
        "Tell me the owner of the main object.",
        "Do you know how much it would weigh?",
        "What is written here?",
    ),
    "description": (
        "Write in detail what this {image} looks like.",
        "Give a description of everything that you see here.",
        "Please write several sentences that describe the {image}.",
    ),
}
# What cannot be told of an animal and of a vehicle: nobody asks for the license plate of a frog.
TRAIN_REFUSALS = {
    "animal": (
        "What breed is it?",
        "What is the breed of this animal?",
        "What is its name?",
        "Which name does it have?",
    ),
    "vehicle": (
        "What is the license plate number?",
        "Can you read the license plate?",
        "What is the price of it?",
        "How much did it cost?",
    ),
}
HELD_OUT_REFUSALS = {
    "animal": ("Tell me the breed of it.", "What name does this animal have?"),
    "vehicle": ("Which number is written on the license plate?", "What price does it have?"),
}

# Under the key of its type, with the short answer behind it where the wording depends on that. A sentence without the
# name of the class is as true of every image with the same short answer, which the encoder learns from.
ANSWERS: dict[str, tuple[str, ...]] = {
    "object": (
        "The main object in this {image} is {a_object}.",
        "This {image} shows {a_object}.",
        "It is a picture of {a_object}.",
        "There is {a_object} in the {image}.",
    ),
    "category": (
        "The main object is {a_category}.",
        "It is {a_category}, more exactly {a_object}.",
        "This {image} shows {a_category}.",
    ),
    "yes_no_class yes": ("Yes, there is {a_asked} in the {image}.", "Yes, this {image} shows {a_asked}."),
    "yes_no_class no": ("No, there is {a_object} in the {image}.", "No, this {image} shows {a_object}."),
    "living yes": ("Yes, {a_object} is a living thing.", "Yes, it is an animal.", "Yes, the main object is alive."),
    "living no": ("No, {a_object} is a machine.", "No, it is a vehicle.", "No, the main object is not alive."),
    "habitat": (
        "{A_object} is usually found {at_habitat}.",
        "It is usually found {at_habitat}.",
        "Its typical place is the {habitat}.",
    ),
    "can_fly yes": ("Yes, {a_object} can fly.", "Yes, it can fly.", "Yes, the main object is able to fly."),
    "can_fly no": ("No, {a_object} cannot fly.", "No, it cannot fly.", "No, the main object is not able to fly."),
    "can_swim yes": ("Yes, {a_object} can swim.", "Yes, it can swim.", "Yes, the main object is able to swim."),
    "can_swim no": ("No, {a_object} cannot swim.", "No, it cannot swim.", "No, the main object is not able to swim."),
    "carries_people yes": (
        "Yes, {a_object} can carry people.",
        "Yes, it can carry people.",
        "Yes, the main object is able to carry a person.",
    ),
    "carries_people no": (
        "No, {a_object} cannot carry people.",
        "No, it cannot carry people.",
        "No, the main object is not able to carry a person.",
    ),
    "counting": (
        "{A_object} has {counting} {parts}.",
        "It has {counting} {parts}.",
        "The number of {parts} is {counting}.",
    ),
    "dominant_color": (
        "The dominant color in the center of the {image} is {dominant_color}.",
        "The middle of the {image} is mostly {dominant_color}.",
        "The center is mostly {dominant_color}.",
    ),
    "background_color": (
        "The background is {background_color}.",
        "The background color is {background_color}.",
        "The edges of the {image} are mostly {background_color}.",
    ),
    "brightness": (
        "The overall brightness is {brightness}.",
        "The light in this {image} is {brightness}.",
        "Overall, the light is {brightness}.",
    ),
    "contrast": (
        "The contrast is {contrast}.",
        "This {image} has {a_contrast} contrast.",
        "The level of contrast is {contrast}.",
    ),
    "vividness": (
        "The colors are {vividness}.",
        "This {image} has {vividness} colors.",
        "The vividness of the colors is {vividness}.",
    ),
    "comparison": (
        "It is {a_object}.",
        "The {image} shows {a_object}.",
        "Of the two, it is {a_object}.",
    ),
    "brighter_half": (
        "The {brighter_half} half is brighter.",
        "The {image} is brighter at the {brighter_half}.",
        "There is more light at the {brighter_half}.",
    ),
    "brighter_area": (
        "The {brighter_area} is brighter.",
        "The {image} is brighter at the {brighter_area}.",
        "There is more light at the {brighter_area}.",
    ),
    "refusal": (
        "This cannot be seen in such a small {image}.",
        "That cannot be told from the {image}.",
        "I cannot tell from this {image}.",
        "The {image} does not show that.",
        "It is impossible to know from such a small {image}.",
    ),
}
# A description is one of each: the object, then the colors and the light in any order.
DESCRIPTION_PARTS: dict[str, tuple[str, ...]] = {
    "object": (
        "This {image} shows {a_object}, {a_category} usually found {at_habitat}.",
        "The main object is {a_object}. It is {a_category} that is usually found {at_habitat}.",
        "There is {a_object} in the {image}. The object is {a_category} with its typical place {at_habitat}.",
    ),
    "colors": (
        "The center is mostly {dominant_color} and the background is {background_color}.",
        "The background is {background_color}. The middle of the {image} is mostly {dominant_color}.",
        "The dominant color in the center is {dominant_color}, in front of {a_background_color} background.",
    ),
    "light": (
        "The light is {brightness}, the contrast is {contrast} and the colors are {vividness}.",
        "The overall brightness is {brightness}, with {vividness} colors and {a_contrast} contrast.",
        "The {image} has {a_contrast} contrast. Its colors are {vividness} and the light is {brightness}.",
    ),
}
DESCRIBED = (
    "object",
    "category",
    "habitat",
    "dominant_color",
    "background_color",
    "brightness",
    "contrast",
    "vividness",
)

_AT_HABITAT = {
    "sky": "in the sky",
    "road": "on the road",
    "house": "in the house",
    "forest": "in the forest",
    "pond": "in the pond",
    "farm": "on the farm",
    "sea": "on the sea",
}

QUESTION_TYPES = tuple(TRAIN_QUESTIONS)
YES_NO_TYPES = ("yes_no_class", "living", "can_fly", "can_swim", "carries_people")
# Types that some images leave open.
_OPEN_TYPES = ("can_swim", "brighter_half", "brighter_area")
# An image has one question of a type, and `object` is always among them; two types are drawn apart.
_DRAWN_TYPES = tuple(name for name in QUESTION_TYPES if name not in ("object", "description", "refusal"))
# Those that every image answers.
COMMON_TYPES = tuple(name for name in ("object", *_DRAWN_TYPES) if name not in _OPEN_TYPES)
MAX_QUESTIONS = len(COMMON_TYPES)

# How readily a type is drawn for an image where the answer is yes or no: two of ten classes fly, and so on. Found by
# simulation over classes of equal size, so that the answers come out even.
_WEIGHTS: dict[str, dict[str, float]] = {
    "living": {"yes": 1.0, "no": 1.6},
    "can_fly": {"yes": 3.0, "no": 0.5},
    "can_swim": {"yes": 1.2, "no": 1.7},
}


def make_questions(
    facts: ImageFacts,
    rng: random.Random,
    count: int = 5,
    phrasing: Literal["train", "held-out"] = "train",
    types: Collection[str] = QUESTION_TYPES,
) -> list[QuestionAnswer]:
    """Draw questions about one image, of distinct types, in random order.

    All are of `types`. One is always of type `object`, one is a `description` with probability 1/4 and one a `refusal`
    with probability 0.45 (when `count` leaves room), the others are drawn from the remaining types. Over many images,
    of classes of equal size, yes and no are equally frequent in each type that they answer: `yes_no_class` asks for
    the right class half the time, and where the class decides the answer (`living`, `can_fly`, `can_swim`) the type
    is drawn more often for classes with the rarer answer. `can_swim` is left out where the class does not decide it,
    `brighter_half` and `brighter_area` where no part is clearly brighter. `counting` asks for wings as often where
    there are two as where there are none.

    Args:
        facts (`ImageFacts`): what is known of the image.
        rng (`random.Random`): the source of every draw; the same state gives the same questions.
        count (`int`, *optional*, defaults to 5): how many, 1 to 14.
        phrasing (`str`, *optional*, defaults to `"train"`): `"train"`, or `"held-out"` for the wordings that no
            training sees. The types drawn are the same.
        types (`Collection[str]`, *optional*): only these of `QUESTION_TYPES`; `count` of them have to be types that
            every image answers.

    Raises:
        ValueError: if `count`, `phrasing` or `types` is out of range.
    """
    unknown = sorted(set(types) - set(QUESTION_TYPES))
    if unknown:
        raise ValueError(f"`types` has to be of {', '.join(QUESTION_TYPES)}, got {unknown[0]!r}.")
    most = len(set(types) & set(COMMON_TYPES))
    if not 1 <= count <= most:
        raise ValueError(f"`count` has to lie in 1 to {most}, the number of types that every image has, got {count}.")
    if phrasing not in PHRASINGS:
        raise ValueError(f"`phrasing` has to be one of {', '.join(PHRASINGS)}, got {phrasing!r}.")
    values = _values(facts)
    drawn = _draw_types(values, rng, count, types)
    return [_make_question(question_type, facts, values, rng, phrasing) for question_type in drawn]


def _draw_types(values: dict[str, str], rng: random.Random, count: int, wanted: Collection[str]) -> list[str]:
    types = ["object"] if "object" in wanted else []
    for name, probability in (("description", _DESCRIPTION_PROBABILITY), ("refusal", _REFUSAL_PROBABILITY)):
        if rng.random() < probability and len(types) < count and name in wanted:
            types.append(name)
    names = [name for name in _DRAWN_TYPES if name in wanted and (name not in _OPEN_TYPES or values[name])]
    weights = {name: _weight(name, values) for name in names}
    # Weighted draws without replacement: an exponential race (Efraimidis & Spirakis, 2006).
    arrival = {name: rng.expovariate(weight) for name, weight in weights.items()}
    types += sorted(arrival, key=arrival.__getitem__)[: count - len(types)]
    rng.shuffle(types)
    return types


def _weight(question_type: str, values: dict[str, str]) -> float:
    return _WEIGHTS[question_type][values[question_type]] if question_type in _WEIGHTS else 1.0


def _values(facts: ImageFacts) -> dict[str, str]:
    """The true short answer of every type that has one whatever is asked; empty where the image leaves it open."""
    values = {
        "object": facts.object_name,
        "category": facts.category,
        "living": facts.living,
        "habitat": facts.habitat,
        "can_fly": facts.can_fly,
        "can_swim": facts.can_swim,
        "carries_people": facts.carries_people,
        "dominant_color": facts.dominant_color,
        "background_color": facts.background_color,
        "brightness": facts.brightness,
        "contrast": facts.contrast,
        "vividness": facts.vividness,
        "comparison": facts.object_name,
        "brighter_half": facts.brighter_half,
        "brighter_area": facts.brighter_area,
        "refusal": REFUSAL,
    }
    return values | {"description": "; ".join(f"{name}={values[name]}" for name in DESCRIBED)}


def _make_question(
    question_type: str, facts: ImageFacts, values: dict[str, str], rng: random.Random, phrasing: str
) -> QuestionAnswer:
    fields = _fields(facts, values, rng)
    question = rng.choice(_wordings(question_type, values["category"], phrasing))
    if rng.random() < _LEAD_PROBABILITY:
        question = f"{rng.choice(LEADS)} {question}"
    short_answer = fields[question_type]
    answer = _answer_wording(question_type, short_answer, rng)
    return QuestionAnswer(question.format(**fields), answer.format(**fields), question_type, short_answer)


def _wordings(question_type: str, category: str, phrasing: str) -> tuple[str, ...]:
    is_train = phrasing == "train"
    wordings = (TRAIN_QUESTIONS if is_train else HELD_OUT_QUESTIONS)[question_type]
    if question_type == "refusal":
        return wordings + (TRAIN_REFUSALS if is_train else HELD_OUT_REFUSALS)[category]
    return wordings


def _answer_wording(question_type: str, short_answer: str, rng: random.Random) -> str:
    if question_type == "description":
        start, *others = (rng.choice(wordings) for wordings in DESCRIPTION_PARTS.values())
        rng.shuffle(others)
        return " ".join([start, *others])
    return rng.choice(ANSWERS[f"{question_type} {short_answer}" if short_answer in _YES_NO else question_type])


def _fields(facts: ImageFacts, values: dict[str, str], rng: random.Random) -> dict[str, str]:
    name = facts.object_name
    other = rng.choice([other for other in CLASS_NAMES if other != name])
    asked = rng.choice((name, other))
    first, second = rng.sample((name, other), 2)
    # Two of ten classes have wings: they are asked for them four times as often as the others.
    parts = "wings" if rng.random() < (0.5 if facts.wings == "two" else 0.125) else "legs"
    articled = {
        "object": name,
        "asked": asked,
        "first": first,
        "second": second,
        "category": facts.category,
        "background_color": facts.background_color,
        "contrast": facts.contrast,
    }
    return (
        values
        | {f"a_{field}": _with_article(value) for field, value in articled.items()}
        | {
            "A_object": _with_article(name).capitalize(),
            "image": rng.choice(_IMAGE_NOUNS),
            "parts": parts,
            "counting": facts.wings if parts == "wings" else facts.legs,
            "at_habitat": _AT_HABITAT[facts.habitat],
            "yes_no_class": "yes" if asked == name else "no",
        }
    )


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


__all__ = [
    "ANSWERS",
    "COMMON_TYPES",
    "DESCRIBED",
    "DESCRIPTION_PARTS",
    "HELD_OUT_QUESTIONS",
    "HELD_OUT_REFUSALS",
    "LEADS",
    "MAX_QUESTIONS",
    "PHRASINGS",
    "QUESTION_TYPES",
    "REFUSAL",
    "TRAIN_QUESTIONS",
    "TRAIN_REFUSALS",
    "YES_NO_TYPES",
    "QuestionAnswer",
    "make_questions",
]
