import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sigphi.train.facts import CLASS_NAMES, COLOR_NAMES, ImageFacts, batch_facts
from sigphi.train.judging import (
    SAYS_NOTHING,
    asks_for_object,
    competing_values,
    is_correct,
    is_refusal,
    known_facts,
    named_classes,
    parse_facts,
    stated_fact,
    stated_facts,
)
from sigphi.train.questions import PHRASINGS, REFUSAL, QuestionAnswer, make_questions
from sigphi.train.synthetic import synthetic_images

SAMPLE_CSV = Path(__file__).parents[2] / "shared" / "data" / "sample_qa_smolvlm_style.csv"


@pytest.fixture(scope="module")
def made() -> list[tuple[ImageFacts, QuestionAnswer]]:
    """Questions of both phrasings about synthetic images, with the facts of these."""
    images = synthetic_images("train", 600)
    pixels = np.stack([np.asarray(row["img"]) for row in images])
    rng = random.Random(0)
    return [
        (facts, question)
        for facts in batch_facts(pixels, images["label"][:])
        for phrasing in PHRASINGS
        for question in make_questions(facts, rng, 10, phrasing)  # type: ignore[arg-type]
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Short answers


@pytest.mark.parametrize(
    ("answer", "short_answer", "question_type", "right"),
    [
        ("The main object is a cat.", "cat", "object", True),
        ("There is a cat, an animal", "cat", "object", True),
        ("CAT!", "cat", "object", True),
        ("Two cats.", "cat", "object", True),
        ("A kitten's face", "cat", "object", True),
        ("Puppies", "dog", "object", True),
        ("A cat or a dog.", "cat", "object", False),
        ("A dog.", "cat", "object", False),
        ("A catalog.", "cat", "object", False),
        ("A cart.", "automobile", "object", False),
        ("A red car.", "automobile", "object", True),
        ("A car and a truck.", "automobile", "object", False),
        ("A car, an automobile.", "automobile", "object", True),
        ("A jet plane", "airplane", "object", True),
        ("Aircraft", "airplane", "object", True),
        ("A sailboat; a boat.", "ship", "object", True),
        ("Shipping", "ship", "object", False),
        ("A car", "car", "object", True),
        ("It does not run.", "deer", "object", False),
        ("", "cat", "object", False),
        ("It is a cat, not a dog.", "cat", "comparison", False),
        ("The cat.", "cat", "comparison", True),
        ("It is an animal, more exactly a cat.", "animal", "category", True),
        ("An animal on a vehicle", "animal", "category", False),
        ("Animals.", "animal", "category", True),
        ("A cat.", "animal", "category", False),
        ("Yes, there is a dog.", "yes", "yes_no_class", True),
        ("No, there is a dog.", "yes", "yes_no_class", False),
        ("yes", "Yes.", "living", True),
        ("Yes and no.", "yes", "living", False),
        ("There is a dog.", "yes", "yes_no_class", False),
        ("Nobody knows", "no", "living", False),
        ("It is grey.", "gray", "background_color", True),
        ("It is gray.", "grey", "dominant_color", True),
        ("Gray and white.", "gray", "background_color", False),
        ("It is reddish.", "red", "dominant_color", False),
        ("The brightness is dark.", "dark", "brightness", True),
        ("Neither dark nor bright.", "dark", "brightness", False),
        ("About two birds.", "two birds", "", True),
        ("Two big birds.", "two birds", "count", False),
        ("A wooden ship.", "wooden ship", "object", True),
        ("No, it cannot fly.", "no", "can_fly", True),
        ("Yes, a deer can swim.", "no", "can_swim", False),
        ("It has 4 legs.", "four", "counting", True),
        ("It has no legs.", "zero", "counting", True),
        ("Two wings and four legs.", "two", "counting", False),
        ("In the air", "sky", "habitat", True),
        ("On the road or on the sea.", "road", "habitat", False),
        ("The contrast is moderate.", "medium", "contrast", True),
        ("The colors are moderate.", "moderate", "vividness", True),
        ("The top half is brighter than the bottom half.", "top", "brighter_half", False),
        ("The upper half.", "top", "brighter_half", True),
        ("The edges are brighter.", "border", "brighter_area", True),
        ("I cannot tell.", REFUSAL, "refusal", True),
        ("It weighs two tons.", REFUSAL, "refusal", False),
        ("A gray cat.", "object=cat; dominant_color=gray", "description", True),
        ("A cat.", "object=cat; dominant_color=gray", "description", True),
        ("A black cat.", "object=cat; dominant_color=gray", "description", False),
        ("The center is gray.", "object=cat; dominant_color=gray", "description", False),
    ],
)
def test_is_correct(answer: str, short_answer: str, question_type: str, right: bool) -> None:
    assert is_correct(answer, short_answer, question_type) is right


def test_an_empty_short_answer_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="a short answer has to hold a word, got '  '"):
        is_correct("A cat.", "  ", "object")


def test_competing_values_are_the_values_of_the_type() -> None:
    assert competing_values("object") == competing_values("comparison") == CLASS_NAMES
    assert competing_values("living") == ("yes", "no")
    assert competing_values("background_color") == COLOR_NAMES
    assert competing_values("counting") == ("zero", "two", "four")
    assert competing_values("refusal") == (REFUSAL,)
    assert competing_values("description") == competing_values("") == ()


def test_the_judge_takes_every_answer_of_the_bank_and_no_other_value(
    made: list[tuple[ImageFacts, QuestionAnswer]],
) -> None:
    for _, question in made:
        assert is_correct(question.answer, question.short_answer, question.question_type), question
        others = set(competing_values(question.question_type)) - {question.short_answer}
        assert not [other for other in others if is_correct(question.answer, other, question.question_type)], question


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    "answer",
    [
        "This cannot be seen in such a small picture.",
        "I cannot tell.",
        "I can't tell from this image.",
        "I can\u2019t tell that.",
        "It is not possible to determine the breed from the image.",
        "It is impossible to say.",
        "The image does not show that.",
        "The picture doesn't show who took it.",
        "The license plate is not visible.",
        "The number isn't readable.",
        "I don't know.",
        "I do not know its name.",
        "Unknown.",
        "That is unknown.",
        "Its age is unclear.",
        "The image is too small to read any text.",
        "The photo is far too blurry.",
        "There is not enough detail.",
        "One cannot see this here.",
        "Sorry, I am unable to tell what happened.",
        "No idea.",
        "Unable to read the plate.",
        "I'm not sure.",
        "There is no information about its owner.",
        "I didn't know.",
        "This is a small picture. The breed of the dog cannot be told from it.",
        "It is a dog. I cannot tell its breed.",
        "No, I cannot tell.",
        "That could not be determined.",
        "Nobody can say; this cannot be known.",
    ],
)
def test_refusals_are_recognised(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "No, it cannot swim.",
        "No, a truck cannot fly.",
        "No, the main object is not able to carry a person.",
        "No, the main object is not able to swim in water.",
        "No, a dog cannot be seen in the image.",
        "No, I cannot see a dog.",
        "No, the picture does not show a dog.",
        "No, there is no dog.",
        "The image does not show a dog.",
        "It is too small to carry people.",
        "The bird is small.",
        "It is not blue.",
        "It is a cat.",
        "It has zero legs.",
        "Yes, an airplane can fly.",
        "The background is gray.",
        "The light is dark, so the contrast is low.",
        "A ship can be seen on the sea.",
        "It is not alive.",
        "No, a bird cannot read.",
        "A frog cannot read.",
        "It is not possible to fly with wheels.",
        "The picture does not contain an animal.",
        "The contrast is clear and the light is bright.",
        "Darker pixels below it, which may be a shadow or a part of the ground; it's hard to say.",
        "2019",
        "",
    ],
)
def test_ordinary_answers_are_no_refusals(answer: str) -> None:
    assert not is_refusal(answer)


def test_of_the_bank_only_refusals_are_refusals(made: list[tuple[ImageFacts, QuestionAnswer]]) -> None:
    for _, question in made:
        assert is_refusal(question.answer) is (question.question_type == "refusal"), question


# ---------------------------------------------------------------------------------------------------------------------
# Facts of descriptions


def test_facts_of_a_short_answer_are_parsed() -> None:
    assert parse_facts("object=cat; category=animal;dominant_color = gray") == {
        "object": "cat",
        "category": "animal",
        "dominant_color": "gray",
    }
    assert parse_facts("") == {}
    for text in ("cat", "object=cat=dog", "object=cat; gray"):
        with pytest.raises(ValueError, match="of the form 'object=cat; category=animal', got"):
            parse_facts(text)


def test_descriptions_of_the_bank_state_what_their_short_answer_holds(
    made: list[tuple[ImageFacts, QuestionAnswer]],
) -> None:
    descriptions = [question for _, question in made if question.question_type == "description"]
    assert len(descriptions) > 200
    for question in descriptions:
        assert stated_facts(question.answer) == set(parse_facts(question.short_answer).items()), question


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("A kitten on the grass.", "object=cat"),
        ("It is a cat, not a dog.", "object=cat"),
        ("There are no dogs here, but there is a ship.", "object=ship"),
        ("A cat cannot fly.", "object=cat"),
        ("This isn\u2019t a truck.", ""),
        ("A dog or a cat.", "object=dog; object=cat"),
        ("The animal is a horse.", "category=animal; object=horse"),
        ("The background is blue.", "background_color=blue"),
        ("Behind it is a blue background.", "background_color=blue"),
        ("A background of blue.", "background_color=blue"),
        ("Blue is the color of the background.", "background_color=blue"),
        ("The background is not blue.", ""),
        ("The background is not blue but gray.", "background_color=gray"),
        ("The background is blue and white.", "background_color=blue; background_color=white"),
        ("It is mostly gray in the center and brown at the edges.", "dominant_color=gray; background_color=brown"),
        ("The edges are brown, the center gray.", "dominant_color=gray; background_color=brown"),
        ("A gray cat in front of a brown background.", "object=cat; dominant_color=gray; background_color=brown"),
        ("The truck is bright red.", "object=truck; dominant_color=red"),
        ("A red truck on a gray road.", "object=truck; dominant_color=red"),
        ("A dark green background.", "background_color=green"),
        ("The background is dark green.", "background_color=green"),
        ("The light is dark.", "brightness=dark"),
        ("The picture is dark.", "brightness=dark"),
        ("It is a bright image.", "brightness=bright"),
        ("A dark cat.", "object=cat"),
        ("Brightness: medium. Contrast: low. Vividness: dull.", "brightness=medium; contrast=low; vividness=dull"),
        ("Medium contrast with moderate colors.", "contrast=medium; vividness=moderate"),
        ("The image has a low contrast and dull colors.", "contrast=low; vividness=dull"),
        ("The contrast is low, and so is the sky.", "contrast=low"),
        ("Overall bright, high contrast, vivid colors.", "brightness=bright; contrast=high; vividness=vivid"),
        ("It usually lives in a pond.", "habitat=pond"),
        ("A cat in front of a house.", "object=cat"),
        ("", ""),
    ],
)
def test_facts_stated_in_free_wording(text: str, facts: str) -> None:
    assert stated_facts(text) == {tuple(pair.split("=")) for pair in facts.split("; ") if pair}


def test_classes_are_named_by_synonyms_and_plurals() -> None:
    assert named_classes("Two planes, a puppy and a firetruck.") == {"airplane", "dog", "truck"}
    assert named_classes("No, there is a cat in the image.") == {"cat"}
    assert named_classes("No, it is not a cat.") == named_classes("Something gray.") == set()


# ---------------------------------------------------------------------------------------------------------------------
# What a text says of its image


@pytest.mark.parametrize(
    ("answer", "question_type", "short_answer", "fact"),
    [
        ("It is a cat.", "object", "cat", "object=cat"),
        ("No, there is a cat in the image.", "yes_no_class", "no", "object=cat"),
        ("No, this is not a dog.", "yes_no_class", "no", ""),
        ("No, a cat cannot fly.", "can_fly", "no", "object=cat"),
        ("No, it cannot fly.", "can_fly", "no", "can_fly=no"),
        ("Yes, it is an animal.", "living", "yes", "living=yes"),
        ("The background is blue.", "background_color", "blue", "background_color=blue"),
        ("It has two legs.", "counting", "two", "legs=two"),
        ("The number of wings is two.", "counting", "two", "wings=two"),
        ("A bird has two wings.", "counting", "two", "object=bird"),
        ("Two.", "counting", "two", SAYS_NOTHING),
        ("It has two of them.", "counting", "two", SAYS_NOTHING),
        ("Yes.", "can_swim", "yes", SAYS_NOTHING),
        ("No", "yes_no_class", "no", SAYS_NOTHING),
        ("I cannot tell.", "refusal", REFUSAL, SAYS_NOTHING),
        ("The top half is brighter.", "brighter_half", "top", "brighter_half=top"),
        ("A gray cat.", "description", "object=cat; dominant_color=gray", ""),
        ("A gray cat.", "", "", ""),
    ],
)
def test_stated_fact(answer: str, question_type: str, short_answer: str, fact: str) -> None:
    assert stated_fact(answer, question_type, short_answer) == fact


def test_what_an_answer_of_the_bank_states_is_true_of_its_image(
    made: list[tuple[ImageFacts, QuestionAnswer]],
) -> None:
    kinds = set()
    for facts, question in made:
        stated = stated_fact(question.answer, question.question_type, question.short_answer)
        if stated in ("", SAYS_NOTHING):
            assert question.question_type in ("description", "refusal")
            assert (stated == SAYS_NOTHING) == (question.question_type == "refusal")
            continue
        name, value = stated.split("=")
        kinds.add(name)
        assert value == (facts.object_name if name == "object" else getattr(facts, name)), question
    assert len(kinds) == 16


# ---------------------------------------------------------------------------------------------------------------------
# Questions for the object


@pytest.mark.parametrize(
    "question",
    [
        "What is the main object in this image?",
        "what's the main object in the picture",
        "What is the main subject of the image?",
        "What object is shown in this photo?",
        "What is this object?",
        "Look at the picture. What is the main object?",
        "Identify the object shown in the photo!",
        "Which object is this?",
        "What is in this image?",
        "What is shown in the image?",
        "What does this image show?",
        "What do you see in the image?",
        "What kind of object is this?",
        "Identify the main object in the image.",
    ],
)
def test_questions_for_the_object_are_recognised(question: str) -> None:
    assert asks_for_object(question)


@pytest.mark.parametrize(
    "question",
    [
        "What color is the main object?",
        "What is the color of the main object in this image?",
        "What is the approximate size of the main object?",
        "What is the main object made of?",
        "What is the main object in this image doing?",
        "Are there any animals or living creatures in the image?",
        "How many distinct objects can you identify in the image?",
        "What small details are visible in the image?",
        "What mood does this image convey?",
        "Describe the background of the image.",
        "Is there an object in this image?",
        "What is the main object? Describe it.",
        "What does the image show, a cat or a dog?",
        "",
    ],
)
def test_other_questions_are_not(question: str) -> None:
    assert not asks_for_object(question)


def test_own_questions_are_recognised_by_wording(made: list[tuple[ImageFacts, QuestionAnswer]]) -> None:
    for _, question in made:
        assert asks_for_object(question.question) is (question.question_type == "object"), question


@pytest.mark.skipif(not SAMPLE_CSV.is_file(), reason=f"no sample at {SAMPLE_CSV}")
def test_one_question_of_the_sample_asks_for_the_object() -> None:
    table = pd.read_csv(SAMPLE_CSV, dtype=str, keep_default_na=False)
    asked = {question for pair in range(1, 6) for question in table[f"Q{pair}"] if asks_for_object(question)}
    assert asked == {"What is the main object in this image?"}


def test_what_is_known_by_an_answer_is_its_fact_or_all_facts_of_a_description() -> None:
    assert known_facts("It is a kitten.", "object", "cat") == {"object=cat"}
    assert known_facts("I cannot tell.", "refusal", "cannot tell") == set()
    assert known_facts("A free sentence.", "", "") == set()
    description = known_facts("A cat.", "description", "object=cat; brightness=dark")
    assert description == {"object=cat", "brightness=dark"}


@pytest.mark.parametrize(
    ("answer", "question_type", "short_answer"),
    [
        ("The background is gray.", "background_color", "brown"),
        ("The main object is a dog.", "object", "cat"),
        ("Yes, a cat can fly.", "can_fly", "no"),
    ],
)
def test_an_answer_that_the_truth_contradicts_states_no_fact(
    answer: str, question_type: str, short_answer: str
) -> None:
    assert stated_fact(answer, question_type, short_answer) == SAYS_NOTHING
    assert known_facts(answer, question_type, short_answer) == set()


def test_a_typed_answer_without_its_truth_stands_for_itself() -> None:
    assert stated_fact("The background is gray.", "background_color", "") == ""
