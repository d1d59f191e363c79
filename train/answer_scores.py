"""How good a VLM's answers are: accuracy, invented objects, refusals, and the facts of descriptions."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import datasets

from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.judging import (
    asks_for_object,
    check_short_answer,
    checkable_facts,
    is_correct,
    is_refusal,
    named_classes,
    plain_value,
    stated_facts,
)
from sigphi.train.metrics import majority_share, token_f1
from sigphi.train.text_metrics import text_metrics_available, wording_scores

SHUFFLED, BLANK = "_shuffled_image", "_blank_image"

# A model that ignores its image gives the same answers with any, so that its gain is 0 but for rounding.
MIN_IMAGE_GAIN = 0.05


@dataclass(frozen=True)
class JudgedRow:
    """
    One question with what its answer is judged by.

    Args:
        question, answer (`str`): the question and its true answer.
        question_type, short_answer (`str`): empty where unknown.
        class_name (`str`): CIFAR's label of the image.
    """

    question: str
    answer: str
    question_type: str
    short_answer: str
    class_name: str

    @property
    def is_checkable(self) -> bool:
        """Whether one short answer decides; a description states many facts."""
        return bool(self.short_answer) and self.question_type != "description"

    @property
    def asks_object(self) -> bool:
        """Whether the question is for the object: by its type, or by its wording where there are no types."""
        return self.question_type == "object" or not self.question_type and asks_for_object(self.question)

    @property
    def expects_class(self) -> bool:
        """Whether the true answer names the image's class and no other, and the question names none."""
        return named_classes(self.answer) == {self.class_name} and not named_classes(self.question)

    def verdict(self, given: str) -> bool | None:
        """Whether `given` is right, by the short answer or else by the class; `None` where neither decides."""
        if self.is_checkable:
            return is_correct(given, self.short_answer, self.question_type)
        return self.names_class(given) if self.asks_object else None

    def facts(self) -> dict[str, str]:
        """What a description may state and be read for, by attribute; empty for any other row."""
        return checkable_facts(self.short_answer) if self.question_type == "description" else {}

    def names_class(self, given: str) -> bool:
        """Whether `given` names CIFAR's class of the image, and no other."""
        return is_correct(given, self.class_name, "object")


def judged_rows(dataset: datasets.Dataset) -> list[JudgedRow]:
    """
    The rows of a split of [`load_cifar10_qa`], in its order.

    Raises:
        UserError: if a short answer cannot be judged by; it names the question.
    """
    columns = ("question", "answer", "question_type", "short_answer", "label")
    rows = [
        JudgedRow(question, answer, kind, short, CLASS_NAMES[label])
        for question, answer, kind, short, label in zip(*(dataset[name] for name in columns), strict=True)
    ]
    for row in rows:
        try:
            if row.short_answer:
                check_short_answer(row.question_type, row.short_answer)
        except ValueError as error:
            raise UserError(f"the short answer to {row.question[:60]!r} cannot be judged by: {error}") from error
    return rows


def answer_scores(rows: Sequence[JudgedRow], answers: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """
    Every figure of [`evaluate_vlm`] that follows from answers.

    Args:
        rows (`Sequence[JudgedRow]`): what was asked.
        answers (`dict[str, Sequence[str]]`): an answer a row, by the suffix of their figures: `""` for the image
            itself, `"_shuffled_image"` (may be absent) and `"_blank_image"`.
    """
    has_text_metrics = text_metrics_available()
    results: dict[str, float] = {}
    for suffix, given in answers.items():
        scores = accuracies(rows, given) | description_scores(rows, given)
        if has_text_metrics:
            scores |= wording_scores(given, [row.answer for row in rows])
        results |= {f"{name}{suffix}": value for name, value in scores.items()}
    results |= _gains(results) | _majorities(rows)
    results |= hallucination_rate(rows, answers[""]) | refusal_scores(rows, answers[""])
    # The figures of a type stand beside each other, behind those of all rows; its gain says what its others would.
    ordered = sorted(results, key=lambda name: name.partition("/")[2])
    return {name: results[name] for name in ordered if "/" not in name or not name.endswith((SHUFFLED, BLANK))}


def accuracies(rows: Sequence[JudgedRow], given: Sequence[str]) -> dict[str, float]:
    """Means of `token_f1`, `answer_accuracy`, `accuracy/<type>` and `class_accuracy`; absent without rows."""
    scores: dict[str, list[float]] = defaultdict(list)
    for row, text in zip(rows, given, strict=True):
        scores["token_f1"].append(token_f1(text, row.answer))
        if row.is_checkable:
            verdict = is_correct(text, row.short_answer, row.question_type)
            scores["answer_accuracy"].append(verdict)
            if row.question_type:
                scores[f"accuracy/{row.question_type}"].append(verdict)
        if row.asks_object:
            scores["class_accuracy"].append(row.names_class(text))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _gains(results: dict[str, float]) -> dict[str, float]:
    """Real minus shuffled, of every accuracy that has both."""
    names = {"answer_accuracy": "image_gain", "class_accuracy": "class_image_gain"}
    names |= {name: name.replace("accuracy", "image_gain") for name in results if name.startswith("accuracy/")}
    return {
        gain: results[name] - results[f"{name}{SHUFFLED}"]
        for name, gain in names.items()
        if f"{name}{SHUFFLED}" in results
    }


def _majorities(rows: Sequence[JudgedRow]) -> dict[str, float]:
    """How many rows the accuracies are over, and what the commonest answer reaches."""
    short_answers: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.is_checkable:
            short_answers[row.question_type].append(plain_value(row.short_answer, row.question_type))
    figures: dict[str, float] = {
        f"majority/{kind}": majority_share(values) for kind, values in sorted(short_answers.items()) if kind
    }
    if short_answers:
        figures["answer_count"] = sum(map(len, short_answers.values()))
    classes = [row.class_name for row in rows if row.asks_object]
    if classes:
        figures |= {"class_count": len(classes), "majority/class": majority_share(classes)}
    return figures


def sees_nothing(rows: Sequence[JudgedRow], given: Sequence[str], given_other: Sequence[str]) -> str:
    """
    Whether a model answers with another image as well as with the right one.

    Over the rows that have a verdict, without refusals, which are due whatever the image shows.

    Args:
        rows (`Sequence[JudgedRow]`): what was asked.
        given, given_other (`Sequence[str]`): an answer a row, with the right image and with that of another class.

    Returns:
        `str`: one line that says so where the gain is below 0.05, else empty; empty also without such rows.
    """
    judged = [
        (row.verdict(text), row.verdict(other))
        for row, text, other in zip(rows, given, given_other, strict=True)
        if row.question_type != "refusal"
    ]
    gains = [int(right) - int(wrong) for right, wrong in judged if right is not None and wrong is not None]
    if not gains or sum(gains) >= MIN_IMAGE_GAIN * len(gains):
        return ""
    return (
        f"the model does not look at its image: over {len(gains)} questions the right one brings "
        f"{sum(gains) / len(gains):+.3f} accuracy against another one (image_gain)."
    )


def hallucination_rate(rows: Sequence[JudgedRow], given: Sequence[str]) -> dict[str, float]:
    """
    Share of answers that name a class which is not in the image, as `hallucination_rate`.

    Over the rows whose true answer names the class of the image and no other, and whose question names none
    (`hallucination_count`): there any other class is the model's own. Naming no class at all is no hallucination, so a
    model that never answers has the best rate; read it beside `class_accuracy`. Empty without such rows.
    """
    invented = [
        bool(named_classes(text) - {row.class_name})
        for row, text in zip(rows, given, strict=True)
        if row.expects_class
    ]
    if not invented:
        return {}
    return {"hallucination_rate": sum(invented) / len(invented), "hallucination_count": len(invented)}


def refusal_scores(rows: Sequence[JudgedRow], given: Sequence[str]) -> dict[str, float]:
    """
    Whether the model refuses where the image cannot show the answer, and only there.

    Over all rows with a type; a refusal is due where this is `"refusal"` (`refusal_count`). `refusal_precision` is the
    due share of the refusals given, `refusal_recall` the given share of those due, `refusal_f1` their harmonic mean; 0
    where nothing is to be divided. Empty when none is due.
    """
    typed = [(row, text) for row, text in zip(rows, given, strict=True) if row.question_type]
    pairs = [(row.question_type == "refusal", is_refusal(text)) for row, text in typed]
    due, refused = sum(one for one, _ in pairs), sum(one for _, one in pairs)
    if not due:
        return {}
    both = sum(one and other for one, other in pairs)
    return {
        "refusal_precision": both / refused if refused else 0.0,
        "refusal_recall": both / due,
        "refusal_f1": 2 * both / (due + refused),
        "refusal_count": due,
    }


def description_scores(rows: Sequence[JudgedRow], given: Sequence[str]) -> dict[str, float]:
    """
    How many of the facts that descriptions state are true, and how many of the true ones they state.

    Over rows of type `"description"`, whose short answer lists facts that a text is read for: `description_precision`
    is the share of all stated facts (of the listed attributes) that are true, 0 when none is stated;
    `description_recall` the share of all listed facts that are stated. Empty without such rows.
    """
    stated = true = both = 0
    described = [(row.facts(), text) for row, text in zip(rows, given, strict=True) if row.facts()]
    for facts, text in described:
        said = {(attribute, value) for attribute, value in stated_facts(text) if attribute in facts}
        stated += len(said)
        true += len(facts)
        both += len(said & facts.items())
    if not described:
        return {}
    return {"description_precision": both / stated if stated else 0.0, "description_recall": both / true}


__all__ = [
    "BLANK",
    "MIN_IMAGE_GAIN",
    "SHUFFLED",
    "JudgedRow",
    "accuracies",
    "answer_scores",
    "description_scores",
    "hallucination_rate",
    "judged_rows",
    "refusal_scores",
    "sees_nothing",
]
