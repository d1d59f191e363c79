import random
import re
from collections import Counter, defaultdict

import pytest

from sigphi.train.facts import (
    BRIGHTNESS_LEVELS,
    CLASS_NAMES,
    COLOR_NAMES,
    CONTRAST_LEVELS,
    HABITAT_NAMES,
    VIVIDNESS_LEVELS,
    ImageFacts,
)
from sigphi.train.questions import (
    ANSWERS,
    DESCRIBED,
    DESCRIPTION_PARTS,
    HELD_OUT_QUESTIONS,
    HELD_OUT_REFUSALS,
    LEADS,
    MAX_QUESTIONS,
    QUESTION_TYPES,
    REFUSAL,
    TRAIN_QUESTIONS,
    TRAIN_REFUSALS,
    YES_NO_TYPES,
    QuestionAnswer,
    make_questions,
)

Made = list[tuple[ImageFacts, list[QuestionAnswer]]]


def random_facts(label: int, rng: random.Random) -> ImageFacts:
    return ImageFacts(
        label=label,
        luminance=0.0,
        brightness=rng.choice(BRIGHTNESS_LEVELS),
        contrast=rng.choice(CONTRAST_LEVELS),
        vividness=rng.choice(VIVIDNESS_LEVELS),
        dominant_color=rng.choice(COLOR_NAMES),
        background_color=rng.choice(COLOR_NAMES),
        brighter_half=rng.choice(("top", "top", "bottom", "bottom", "")),
        brighter_area=rng.choice(("center", "center", "border", "border", "")),
    )


CAT = random_facts(3, random.Random(0))


@pytest.fixture(scope="module", params=["train", "held-out"])
def made(request: pytest.FixtureRequest) -> Made:
    rng = random.Random(0)
    images = [random_facts(i % 10, rng) for i in range(10_000)]
    return [(facts, make_questions(facts, rng, phrasing=request.param)) for facts in images]


def asked_classes(question: str) -> list[str]:
    return [name for name in CLASS_NAMES if re.search(rf"\b{name}\b", question)]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9_]+", text.lower())


def templates(by_type: dict[str, tuple[str, ...]], refusals: dict[str, tuple[str, ...]]) -> list[str]:
    return [wording for wordings in (*by_type.values(), *refusals.values()) for wording in wordings]


# ---------------------------------------------------------------------------------------------------------------------
# The wordings


def test_every_type_has_wordings_enough() -> None:
    assert len(QUESTION_TYPES) >= 14
    assert TRAIN_QUESTIONS.keys() == HELD_OUT_QUESTIONS.keys()
    for name in QUESTION_TYPES:
        assert len(set(TRAIN_QUESTIONS[name])) >= 6 and len(set(HELD_OUT_QUESTIONS[name])) >= 2, name
    for key, wordings in (ANSWERS | DESCRIPTION_PARTS).items():
        assert len(set(wordings)) >= 2, key


def test_no_wording_of_a_question_is_held_out_and_trained_on() -> None:
    train = [" ".join(words(text)) for text in templates(TRAIN_QUESTIONS, TRAIN_REFUSALS)]
    held_out = [" ".join(words(text)) for text in templates(HELD_OUT_QUESTIONS, HELD_OUT_REFUSALS)]
    assert len(set(train)) == len(train) >= 40 and len(set(held_out)) == len(held_out)
    # Behind a lead, too: no held-out wording is the end of one that is trained on, or the other way round.
    for text in held_out:
        assert not [other for other in train if text.endswith(other) or other.endswith(text)], text


def test_held_out_wordings_are_made_of_the_words_of_training() -> None:
    known = {word for text in (*templates(TRAIN_QUESTIONS, TRAIN_REFUSALS), *LEADS) for word in words(text)}
    unknown = {word for text in templates(HELD_OUT_QUESTIONS, HELD_OUT_REFUSALS) for word in words(text)} - known
    assert unknown == set()


@pytest.mark.parametrize(
    ("question_type", "keys"),
    [
        ("category", r"animal"),
        ("yes_no_class", r"\{a_asked\}"),
        ("living", r"living|alive"),
        ("habitat", r"where|place|habitat"),
        ("can_fly", r"\bfly\b"),
        ("can_swim", r"\bswim\b"),
        ("carries_people", r"people|person"),
        ("counting", r"\{parts\}"),
        ("dominant_color", r"center|middle"),
        ("background_color", r"background|edges"),
        ("brightness", r"bright|light"),
        ("contrast", r"contrast"),
        ("vividness", r"vivid"),
        ("comparison", r"\{a_first\} or \{a_second\}"),
        ("brighter_half", r"\btop\b.*\bbottom\b|\bbottom\b.*\btop\b"),
        ("brighter_area", r"center.*border|border.*center"),
        ("description", r"[Dd]escri|[Ww]rite"),
    ],
)
def test_a_wording_says_by_its_words_what_it_asks_for(question_type: str, keys: str) -> None:
    for text in TRAIN_QUESTIONS[question_type] + HELD_OUT_QUESTIONS[question_type]:
        assert re.search(keys, text, re.IGNORECASE), text
    own = {"can_fly", "can_swim", "contrast", "vividness", "counting", "yes_no_class", "comparison", "description"}
    if question_type in own:
        others = [
            text
            for table in (TRAIN_QUESTIONS, HELD_OUT_QUESTIONS)
            for name, texts in table.items()
            for text in texts
            if name != question_type and re.search(keys, text)
        ]
        assert others == []


# ---------------------------------------------------------------------------------------------------------------------
# The draw


def test_an_image_has_distinct_types_and_questions_and_always_the_object(made: Made) -> None:
    for _, questions in made:
        types = [question.question_type for question in questions]
        assert len(questions) == len(set(types)) == len({question.question for question in questions}) == 5
        assert "object" in types and set(types) <= set(QUESTION_TYPES)
    positions = Counter([q.question_type for q in questions].index("object") for _, questions in made)
    assert min(positions.values()) > 1800


def test_types_have_their_shares(made: Made) -> None:
    count = Counter(question.question_type for _, questions in made for question in questions)
    assert count["description"] / len(made) == pytest.approx(0.25, abs=0.02)
    assert count["refusal"] / count.total() == pytest.approx(0.09, abs=0.01)
    for name in QUESTION_TYPES:
        if name not in ("object", "description", "refusal"):
            assert 0.03 < count[name] / count.total() < 0.055, name


def test_yes_and_no_are_balanced_in_every_type_and_for_every_class_asked(made: Made) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in made:
        for question in questions:
            if question.short_answer in ("yes", "no"):
                answers[question.question_type][question.short_answer] += 1
            if question.question_type == "yes_no_class":
                answers[asked_classes(question.question)[0]][question.short_answer] += 1
    assert answers.keys() == {*YES_NO_TYPES, *CLASS_NAMES}
    for name, counts in answers.items():
        assert set(counts) == {"yes", "no"}
        assert counts["yes"] / counts.total() == pytest.approx(0.5, abs=0.12 if name in CLASS_NAMES else 0.05), name


def test_no_answer_is_right_nearly_always_but_a_refusal(made: Made) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, questions in made:
        for question in questions:
            answers[question.question_type][question.short_answer] += 1
    assert answers.pop("refusal") == {REFUSAL: pytest.approx(4500, abs=150)}
    for name, counts in answers.items():
        assert counts.most_common(1)[0][1] < 0.7 * counts.total(), name


def test_wings_are_asked_for_where_there_are_none_as_often(made: Made) -> None:
    wings = Counter(
        question.short_answer
        for _, questions in made
        for question in questions
        if question.question_type == "counting" and "wings" in question.question
    )
    assert wings["two"] / wings.total() == pytest.approx(0.5, abs=0.1)


def test_the_state_of_the_generator_decides_the_questions() -> None:
    assert make_questions(CAT, random.Random(7)) == make_questions(CAT, random.Random(7))
    assert make_questions(CAT, random.Random(7)) != make_questions(CAT, random.Random(8))


def test_held_out_questions_ask_for_the_same_types() -> None:
    for seed in range(50):
        train, held_out = (make_questions(CAT, random.Random(seed), phrasing=name) for name in ("train", "held-out"))
        assert [q.question_type for q in train] == [q.question_type for q in held_out]
        assert not {q.question for q in train} & {q.question for q in held_out}


@pytest.mark.parametrize("count", [1, 3, MAX_QUESTIONS])
def test_count_questions_are_made(count: int) -> None:
    for seed in range(40):
        facts = random_facts(seed % 10, random.Random(seed))
        types = {question.question_type for question in make_questions(facts, random.Random(seed), count)}
        assert len(types) == count and "object" in types


@pytest.mark.parametrize("count", [0, MAX_QUESTIONS + 1])
def test_a_count_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"`count` has to lie in 1 to 14, .* got {count}"):
        make_questions(CAT, random.Random(0), count)


def test_an_unknown_phrasing_is_refused() -> None:
    with pytest.raises(ValueError, match="`phrasing` has to be one of train, held-out, got 'test'"):
        make_questions(CAT, random.Random(0), phrasing="test")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers


def test_short_answers_are_the_facts(made: Made) -> None:
    for facts, questions in made:
        for question in questions:
            kind, named = question.question_type, asked_classes(question.question)
            if kind in ("object", "comparison"):
                assert question.short_answer == facts.object_name
            elif kind == "yes_no_class":
                assert len(named) == 1
                assert question.short_answer == ("yes" if named == [facts.object_name] else "no")
            elif kind == "counting":
                assert question.short_answer == (facts.wings if "wings" in question.question else facts.legs)
            elif kind == "refusal":
                assert question.short_answer == REFUSAL
            elif kind == "description":
                pairs = [("object", facts.object_name), *((name, getattr(facts, name)) for name in DESCRIBED[1:])]
                assert question.short_answer == "; ".join(f"{name}={value}" for name, value in pairs)
            else:
                assert question.short_answer == getattr(facts, kind) != ""
            if kind == "comparison":
                assert len(named) == 2 and facts.object_name in named


def test_questions_and_answers_are_sentences(made: Made) -> None:
    for _, questions in made:
        for question in questions:
            for text in (question.question, question.answer):
                assert text[0].isupper() and not re.search(r"[{}_]|  |[.?] [a-z]", text), text
                assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
            assert question.answer.endswith(".") and question.question.endswith(("?", "."))


def test_nobody_asks_for_the_license_plate_of_an_animal(made: Made) -> None:
    refusals = [
        (facts.category, q.question) for facts, questions in made for q in questions if q.question_type == "refusal"
    ]
    assert {category for category, text in refusals if re.search("license|price|cost", text)} == {"vehicle"}
    assert {category for category, text in refusals if re.search("breed|name", text)} == {"animal"}


def test_descriptions_hold_every_fact_and_no_other_value(made: Made) -> None:
    for facts, questions in made:
        for description in (question for question in questions if question.question_type == "description"):
            found = set(words(description.answer))
            assert found & set(COLOR_NAMES) == {facts.dominant_color, facts.background_color}
            assert found & set(CLASS_NAMES) == {facts.object_name}
            assert found & {"dark", "medium", "bright", "low", "high"} == {facts.brightness, facts.contrast}
            assert found & set(VIVIDNESS_LEVELS) == {facts.vividness}
            assert found & set(HABITAT_NAMES) == {facts.habitat}
            assert found & {"animal", "vehicle"} == {facts.category}
            assert 3 <= description.answer.count(".") <= 6
            background = facts.background_color
            assert re.search(rf"{background} background|background is {background}", description.answer)


def test_only_the_types_that_are_wanted_are_asked() -> None:
    wanted = ("object", "category", "habitat", "description", "can_swim")
    seen = set()
    for seed in range(200):
        asked = make_questions(CAT, random.Random(seed), count=3, types=wanted)
        assert len({one.question_type for one in asked}) == 3
        seen |= {one.question_type for one in asked}
    assert {"object", "category", "habitat", "description"} <= seen <= set(wanted)


@pytest.mark.parametrize(
    ("types", "count", "message"),
    [(("object", "smell"), 1, "got 'smell'"), (("object", "description", "can_swim"), 2, "1 to 1, .* got 2")],
)
def test_types_that_do_not_suffice_are_refused(types: tuple[str, ...], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_questions(CAT, random.Random(0), count=count, types=types)
