import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sigphi.train.facts import (
    CLASS_NAMES,
    COLOR_NAMES,
    COLOR_SHADES,
    ImageFacts,
    batch_facts,
    image_facts,
    nearest_colors,
    srgb_to_lab,
)
from sigphi.train.judging import asks_for_object, competing_values, is_correct
from sigphi.train.questions import QUESTION_TYPES, QuestionAnswer, make_questions

SAMPLE_CSV = Path(__file__).parents[2] / "shared" / "data" / "sample_qa_smolvlm_style.csv"

CAT = ImageFacts(label=3, luminance=50.0, brightness="dark", dominant_color="orange", background_color="gray")


def color_name(*rgb: int) -> str:
    return COLOR_NAMES[nearest_colors(np.array(rgb, dtype=np.uint8))]


def image(background: tuple[int, ...], center: tuple[int, ...], size: int = 32) -> np.ndarray:
    pixels = np.full((size, size, 3), background, dtype=np.uint8)
    pixels[size // 4 : -(size // 4), size // 4 : -(size // 4)] = center
    return pixels


@pytest.fixture(scope="module")
def many_questions() -> list[tuple[ImageFacts, list[QuestionAnswer]]]:
    rng = random.Random(0)
    images = []
    for i in range(3000):
        colors = rng.choice(COLOR_NAMES), rng.choice(COLOR_NAMES)
        facts = ImageFacts(i % 10, 0.0, rng.choice(("dark", "medium", "bright")), *colors)
        images.append((facts, make_questions(facts, rng)))
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Facts


@pytest.mark.parametrize(
    ("rgb", "lab"),
    # The values that are commonly published for sRGB under D65.
    [
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 128), (53.59, 0.0, 0.0)),
    ],
)
def test_srgb_to_lab_has_the_published_values(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    assert srgb_to_lab(np.array(rgb, dtype=np.uint8)) == pytest.approx(np.array(lab), abs=0.06)


def test_every_shade_has_the_name_of_its_color() -> None:
    for name, shades in COLOR_SHADES.items():
        for shade in shades:
            assert color_name(*bytes.fromhex(shade)) == name, shade


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((10, 12, 8), "black"),
        ((250, 250, 245), "white"),
        ((120, 121, 119), "gray"),
        ((200, 20, 20), "red"),
        ((255, 140, 0), "orange"),
        ((240, 220, 40), "yellow"),
        ((40, 120, 40), "green"),
        ((135, 180, 230), "blue"),
        ((110, 40, 150), "purple"),
        ((110, 70, 30), "brown"),
        ((255, 150, 190), "pink"),
    ],
)
def test_colors_have_their_common_name(rgb: tuple[int, ...], name: str) -> None:
    assert color_name(*rgb) == name


def test_facts_follow_the_documented_rules() -> None:
    facts = image_facts(image(background=(3, 67, 223), center=(229, 0, 0)), label=9)
    assert (facts.object_name, facts.category) == ("truck", "vehicle")
    assert (facts.background_color, facts.dominant_color) == ("blue", "red")
    luma_blue, luma_red = 0.2126 * 3 + 0.7152 * 67 + 0.0722 * 223, 0.2126 * 229
    assert facts.luminance == pytest.approx(0.75 * luma_blue + 0.25 * luma_red)
    assert facts.brightness == "dark"


@pytest.mark.parametrize(("value", "level"), [(109, "dark"), (110, "medium"), (134, "medium"), (135, "bright")])
def test_brightness_thresholds(value: int, level: str) -> None:
    gray = (value,) * 3
    assert image_facts(image(gray, gray), 0).brightness == level


def test_background_is_the_median_of_three_border_pixels() -> None:
    pixels = image((255, 255, 255), (0, 0, 0))
    pixels[:3] = (229, 0, 0)  # fewer than half of the border's pixels
    pixels[3:-3, 3:-3] = (21, 176, 26)
    assert image_facts(pixels, 0).background_color == "white"
    pixels[-3:] = pixels[:, :3] = (229, 0, 0)
    assert image_facts(pixels, 0).background_color == "red"


def test_dominant_color_is_the_most_frequent_name_not_the_mean() -> None:
    pixels = image((0, 0, 0), (255, 255, 255))
    pixels[8:14, 8:24] = (0, 0, 0)  # six of sixteen rows: the mean would be gray
    assert image_facts(pixels, 0).dominant_color == "white"


def test_a_batch_gives_the_facts_of_its_images_in_other_sizes_too() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2003, 8, 6, 3), dtype=np.uint8)
    labels = [i % 10 for i in range(2003)]
    facts = batch_facts(pixels, labels)
    for i in (0, 1, 1999, 2000, 2002):
        assert facts[i] == image_facts(pixels[i], labels[i])


def test_pixels_and_labels_out_of_range_are_refused() -> None:
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"got float32 of shape \(2, 32, 32, 3\)"):
        batch_facts(pixels.astype(np.float32), [0, 1])
    with pytest.raises(ValueError, match="and 1 labels"):
        batch_facts(pixels, [0])
    with pytest.raises(ValueError, match="got 0 to 10"):
        batch_facts(pixels, [0, 10])


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def test_an_image_has_distinct_types_and_questions_and_always_the_object(
    many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]],
) -> None:
    for _, questions in many_questions:
        types = [question.question_type for question in questions]
        assert len(questions) == len(set(types)) == len({question.question for question in questions}) == 5
        assert "object" in types and set(types) <= set(QUESTION_TYPES)
    share = Counter(question.question_type for _, questions in many_questions for question in questions)
    assert share["description"] / 3000 == pytest.approx(0.25, abs=0.03)
    for name in QUESTION_TYPES[1:-1]:
        assert share[name] / 3000 == pytest.approx(3.75 / 7, abs=0.04), name
    positions = Counter([q.question_type for q in questions].index("object") for _, questions in many_questions)
    assert min(positions.values()) > 500


def test_yes_and_no_are_balanced_within_every_wording_of_a_class(
    many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]],
) -> None:
    answers: dict[str, Counter[str]] = {"yes_no_class": Counter(), "living": Counter()}
    asked_cat: Counter[str] = Counter()
    for _, questions in many_questions:
        for question in questions:
            if question.question_type in answers:
                answers[question.question_type][question.short_answer] += 1
                if question.question_type == "yes_no_class" and " cat" in question.question:
                    asked_cat[question.short_answer] += 1
    for counts in (*answers.values(), asked_cat):
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.12 if counts is asked_cat else 0.04)


def test_short_answers_are_the_facts(many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]]) -> None:
    for facts, questions in many_questions:
        expected = {
            "object": facts.object_name,
            "category": "animal" if facts.label in (2, 3, 4, 5, 6, 7) else "vehicle",
            "dominant_color": facts.dominant_color,
            "background_color": facts.background_color,
            "brightness": facts.brightness,
            "comparison": facts.object_name,
            "description": "",
        }
        for question in questions:
            named = [name for name in CLASS_NAMES if re.search(rf"\b{name}\b", question.question)]
            if question.question_type == "yes_no_class":
                assert question.short_answer == ("yes" if named == [facts.object_name] else "no")
            elif question.question_type == "living":
                asks_for_life = re.search(r"living|alive", question.question) is not None
                assert question.short_answer == ("yes" if asks_for_life == (facts.category == "animal") else "no")
            else:
                assert question.short_answer == expected[question.question_type]
            if question.question_type == "comparison":
                assert len(named) == 2 and facts.object_name in named


def test_answers_are_sentences_that_the_judge_takes(
    many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]],
) -> None:
    wordings: dict[str, set[str]] = {name: set() for name in QUESTION_TYPES}
    for _, questions in many_questions:
        for question in questions:
            assert question.answer[0].isupper() and question.answer.endswith(".")
            assert question.question.endswith(("?", "."))
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", f"{question.question} {question.answer}")
            if question.short_answer:
                assert is_correct(question.answer, question.short_answer, question.question_type), question
            values = rf"\b({'|'.join((*CLASS_NAMES, *COLOR_NAMES, 'dark|medium|bright|animal|vehicle|Yes|No|an?'))})\b"
            wordings[question.question_type].add(re.sub(values, "", question.question) + "|")
            wordings[question.question_type].add(re.sub(values, "", question.answer))
    for name, texts in wordings.items():
        assert sum(text.endswith("|") for text in texts) >= 3, name
        assert sum(not text.endswith("|") for text in texts) >= 2, name


def test_descriptions_hold_every_fact_and_no_other_value(
    many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]],
) -> None:
    for facts, questions in many_questions:
        for description in (question for question in questions if question.question_type == "description"):
            words = set(re.findall(r"[a-z]+", description.answer.lower()))
            assert words & set(COLOR_NAMES) == {facts.dominant_color, facts.background_color}
            assert words & set(CLASS_NAMES) == {facts.object_name}
            assert words & {"dark", "medium", "bright"} == {facts.brightness}
            assert words & {"animal", "vehicle"} == {facts.category}
            assert 3 <= description.answer.count(".") <= 4
            background = facts.background_color
            assert re.search(rf"{background} background|background (color )?is {background}", description.answer)


def test_the_state_of_the_generator_decides_the_questions() -> None:
    assert make_questions(CAT, random.Random(7)) == make_questions(CAT, random.Random(7))
    assert make_questions(CAT, random.Random(7)) != make_questions(CAT, random.Random(8))


@pytest.mark.parametrize("count", [1, 3, 8])
def test_count_questions_are_made(count: int) -> None:
    for seed in range(20):
        types = {question.question_type for question in make_questions(CAT, random.Random(seed), count)}
        assert len(types) == count and "object" in types


@pytest.mark.parametrize("count", [0, 9])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"`count` has to lie in 1 to 8, .* got {count}"):
        make_questions(CAT, random.Random(0), count)


# ---------------------------------------------------------------------------------------------------------------------
# Judging


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
    ],
)
def test_is_correct(answer: str, short_answer: str, question_type: str, right: bool) -> None:
    assert is_correct(answer, short_answer, question_type) is right


def test_an_empty_short_answer_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="`short_answer` has to hold a word, got '  '"):
        is_correct("A cat.", "  ", "object")


def test_competing_values_are_the_values_of_the_type() -> None:
    assert competing_values("object") == competing_values("comparison") == CLASS_NAMES
    assert competing_values("living") == ("yes", "no")
    assert competing_values("background_color") == COLOR_NAMES
    assert competing_values("description") == competing_values("") == ()


@pytest.mark.parametrize(
    "question",
    [
        "What is the main object in this image?",
        "what's the main object in the picture",
        "What is the main subject of the image?",
        "What object is shown in this photo?",
        "What is this object?",
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
        "",
    ],
)
def test_other_questions_are_not(question: str) -> None:
    assert not asks_for_object(question)


def test_own_questions_are_recognised_by_wording(
    many_questions: list[tuple[ImageFacts, list[QuestionAnswer]]],
) -> None:
    for _, questions in many_questions:
        for question in questions:
            assert asks_for_object(question.question) is (question.question_type == "object"), question


@pytest.mark.skipif(not SAMPLE_CSV.is_file(), reason=f"no sample at {SAMPLE_CSV}")
def test_one_question_of_the_sample_asks_for_the_object() -> None:
    table = pd.read_csv(SAMPLE_CSV, dtype=str, keep_default_na=False)
    asked = {question for pair in range(1, 6) for question in table[f"Q{pair}"] if asks_for_object(question)}
    assert asked == {"What is the main object in this image?"}
