"""The figures that follow from answers, each beside a naive twin, and beside scikit-learn's where it has one."""

import random

import pytest
from sklearn.metrics import precision_recall_fscore_support

from sigphi.train import answer_scores
from sigphi.train.answer_scores import (
    JudgedRow,
    accuracies,
    description_scores,
    hallucination_rate,
    judged_rows,
    refusal_scores,
)
from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES


def row(kind: str, short: str = "", question: str = "?", answer: str = "", class_name: str = "cat") -> JudgedRow:
    return JudgedRow(question, answer, kind, short, class_name)


@pytest.fixture(autouse=True)
def without_library_metrics(monkeypatch):
    """They have their own tests."""
    monkeypatch.setattr(answer_scores, "text_metrics_available", lambda: False)


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_those_of_the_dataset(toy_dataset):
    rows = judged_rows(toy_dataset)
    assert len(rows) == len(toy_dataset)
    for number in (0, 7, len(rows) - 1):
        source = toy_dataset[number]
        expected = [source[name] for name in ("question", "answer", "question_type", "short_answer")]
        assert rows[number] == JudgedRow(*expected, CLASS_NAMES[source["label"]])


@pytest.mark.parametrize(
    ("judged", "given", "verdict"),
    [
        (row("brightness", "dark"), "It is dark.", True),
        (row("brightness", "dark"), "It is bright.", False),
        (row("object", "cat"), "A kitten.", True),
        (row("refusal", "cannot tell"), "I cannot tell.", True),
        (row("refusal", "cannot tell"), "He is called Tom.", False),
        # A description states many facts, so that no one of them decides.
        (row("description", "object=cat; category=animal"), "A cat.", None),
        # Without a type the class decides where the object is asked for, and nothing else does.
        (row("", question="What is in this image?"), "A cat.", True),
        (row("", question="What is in this image?"), "A dog.", False),
        (row("", question="Is it sharp?"), "A cat.", None),
        (row("", "two", question="How many?"), "There are two.", True),
    ],
)
def test_verdicts(judged, given, verdict):
    assert judged.verdict(given) is verdict


@pytest.mark.parametrize(
    ("kind", "short"), [("description", "a gray cat"), ("object", "?"), ("", "--")], ids=["facts", "word", "plain"]
)
def test_a_short_answer_that_cannot_be_judged_by_is_refused_with_its_question(kind, short, toy_dataset):
    wrong = toy_dataset.select([0]).map(
        lambda row: {"question": "What is it?", "question_type": kind, "short_answer": short},
        load_from_cache_file=False,
    )
    with pytest.raises(UserError, match=r"the short answer to 'What is it\?' cannot be judged by: .*short answer"):
        judged_rows(wrong)


# Accuracies ----------------------------------------------------------------------------------------------------------


def test_accuracies_are_means_over_the_rows_that_have_them():
    rows = [row("object", "cat"), row("object", "cat"), row("category", "animal"), row("description", "object=cat")]
    rows += [row("", question="What is in this image?"), row("", answer="a b")]
    given = ["cat", "dog", "an animal", "cat", "a cat and a dog", "a c"]
    assert accuracies(rows, given) == pytest.approx(
        {
            "answer_accuracy": 2 / 3,
            "accuracy/object": 1 / 2,
            "accuracy/category": 1,
            "class_accuracy": 1 / 3,
            "token_f1": 0.5 / 6,
        }
    )


def test_rows_without_a_type_have_no_figures_of_a_type():
    rows = [row("", "yes"), row("", "No"), row("mood", "calm")]
    answers = {"": ["Yes.", "Yes.", "It is calm."], "_shuffled_image": ["Yes."] * 3, "_blank_image": ["No."] * 3}
    results = answer_scores.answer_scores(rows, answers)
    assert results["answer_accuracy"] == pytest.approx(2 / 3) and results["answer_count"] == 3
    assert [name for name in results if "/" in name] == ["accuracy/mood", "image_gain/mood", "majority/mood"]


def test_one_value_in_several_spellings_is_one_answer_of_the_majority():
    rows = [row("object", short) for short in ("cat", "Cat", "kitten", "a dog")]
    rows += [row("mood", short) for short in ("calm", "Calm.", "sad", "very sad")]
    results = answer_scores.answer_scores(rows, {"": ["cat"] * 8, "_blank_image": ["cat"] * 8})
    assert results["accuracy/object"] == results["majority/object"] == 3 / 4
    assert results["majority/mood"] == 2 / 4


def test_figures_carry_their_suffix_and_gains_are_real_minus_shuffled():
    rows = [row("object", "cat"), row("object", "dog", class_name="dog"), row("brightness", "dark")]
    answers = {"": ["cat", "dog", "dark"], "_blank_image": ["cat"] * 3, "_shuffled_image": ["dog", "cat", "dark"]}
    results = answer_scores.answer_scores(rows, answers)
    assert results["image_gain"] == pytest.approx(1 - 1 / 3)
    assert (results["image_gain/object"], results["image_gain/brightness"], results["class_image_gain"]) == (1, 0, 1)
    assert results["answer_accuracy_blank_image"] == pytest.approx(1 / 3)
    assert (results["majority/object"], results["majority/brightness"], results["majority/class"]) == (0.5, 1, 0.5)
    assert (results["answer_count"], results["class_count"]) == (3, 2)
    assert not [name for name in results if name.startswith("accuracy/") and name.endswith("_image")]
    assert "rougeL" not in results and "refusal_f1" not in results and "description_recall" not in results


# Invented objects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judged", "given", "invented"),
    [
        (row("object", answer="A cat."), "A dog.", True),
        (row("object", answer="A cat."), "A cat.", False),
        (row("object", answer="A cat."), "A cat beside a dog.", True),
        (row("object", answer="A cat."), "It is gray.", False),
        (row("object", answer="A cat."), "A cat, not a dog.", False),
        (row("", answer="Yes, there is a kitten."), "Yes, there is a puppy.", True),
        # Where the question names a class, or the true answer another one or none, a class is no invention.
        (row("comparison", question="Is it a cat or a dog?", answer="A cat."), "A dog.", None),
        (row("", answer="A dog."), "A dog.", None),
        (row("", answer="A cat and a dog."), "A dog.", None),
        (row("brightness", answer="It is dark."), "A dark dog.", None),
    ],
)
def test_what_counts_as_invented(judged, given, invented):
    expected = {} if invented is None else {"hallucination_rate": float(invented), "hallucination_count": 1}
    assert hallucination_rate([judged], [given]) == expected


def test_the_rate_is_a_share_of_the_rows_that_count():
    rows = [row("object", answer="A cat.")] * 4 + [row("brightness", answer="It is dark.")]
    given = ["A cat.", "A dog.", "A ship.", "Nothing.", "A truck."]
    assert hallucination_rate(rows, given) == {"hallucination_rate": 0.5, "hallucination_count": 4}


# Refusals ------------------------------------------------------------------------------------------------------------

REFUSED, ANSWERED = "I cannot tell that from this image.", "It is a cat."


@pytest.mark.parametrize("seed", range(4))
def test_refusals_are_scored_as_scikit_learn_does(seed):
    rng = random.Random(seed)
    due = [rng.random() < 0.4 for _ in range(50)]
    refused = [rng.random() < (0.8 if one else 0.3) for one in due]
    rows = [row("refusal", "cannot tell") if one else row("object", "cat") for one in due]
    results = refusal_scores(rows, [REFUSED if one else ANSWERED for one in refused])
    expected = precision_recall_fscore_support(due, refused, average="binary")[:3]
    assert [results[f"refusal_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(expected)
    assert results["refusal_count"] == sum(due)


@pytest.mark.parametrize(
    ("given", "scores"),
    [([ANSWERED] * 3, (0, 0, 0)), ([REFUSED] * 3, (1 / 3, 1, 0.5)), ([REFUSED, ANSWERED, ANSWERED], (1, 1, 1))],
)
def test_refusing_never_always_and_where_due(given, scores):
    rows = [row("refusal", "cannot tell"), row("object", "cat"), row("description", "object=cat")]
    results = refusal_scores(rows, given)
    assert [results[f"refusal_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(scores)


def test_refusals_count_among_typed_rows_alone():
    assert refusal_scores([row("object", "cat")], [REFUSED]) == {}
    rows = [row("refusal", "cannot tell"), row("", question="Who?")]
    assert refusal_scores(rows, [REFUSED, REFUSED])["refusal_precision"] == 1


# Descriptions --------------------------------------------------------------------------------------------------------

FACTS = "object=cat; category=animal; dominant_color=gray; background_color=brown"


@pytest.mark.parametrize(
    ("given", "precision", "recall"),
    [
        ("This image shows a cat, which is an animal. The center is mostly gray. The background is brown.", 1, 1),
        ("This image shows a cat. The background is blue.", 1 / 2, 1 / 4),
        ("This image shows a dog, which is an animal. The center is mostly gray.", 2 / 3, 1 / 2),
        # The brightness is not among the facts, so nobody knows.
        ("A cat. The overall brightness is dark.", 1, 1 / 4),
        ("", 0, 0),
    ],
)
def test_facts_of_one_description(given, precision, recall):
    results = description_scores([row("description", FACTS)], [given])
    assert results == pytest.approx({"description_precision": precision, "description_recall": recall})


def test_facts_count_by_what_they_mean_and_only_where_a_text_can_state_them():
    # A text is not read for its mood, and "kitten" is what it calls a cat.
    facts = "object=Kitten; mood=calm; brightness=very odd; dominant_color=grey"
    given = "This image shows a kitten. The center is mostly gray."
    results = description_scores([row("description", facts)], [given])
    assert results == {"description_precision": 1, "description_recall": 1}
    assert description_scores([row("description", "mood=calm")], [given]) == {}


def test_facts_are_counted_over_all_descriptions():
    rows = [row("description", FACTS), row("description", "object=dog"), row("object", "cat"), row("", "object=cat")]
    given = ["A cat. The background is blue.", "A dog.", "A ship.", "A ship."]
    results = description_scores(rows, given)
    assert results == pytest.approx({"description_precision": 2 / 3, "description_recall": 2 / 5})
    assert description_scores(rows[2:], given[2:]) == {}
