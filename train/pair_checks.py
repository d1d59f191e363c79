"""What can be wrong with questions and answers: with single ones, and with all of a file together."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sigphi.train.check_report import Findings
from sigphi.train.facts import CLASS_NAMES, image_facts
from sigphi.train.judging import (
    CLASS_OF_WORD,
    asks_for_object,
    competing_values,
    is_correct,
    named_classes,
    plain_value,
)
from sigphi.train.lenient_csv import iterate_rows
from sigphi.train.qa_csv import IMAGE_PLACEHOLDER, faulty_short_answers
from sigphi.train.questions import QUESTION_TYPES
from sigphi.train.row_checks import Lines, first_lines, image_numbers

_TEXTS = {"Q": "question", "A": "answer"}
_JUDGED = ("question", "answer", "question_type", "short_answer", "class_name")

# A question that is asked less often may have one answer by chance.
_MIN_ASKED = 50
_MAX_SHARE = 0.95
# Asked for what a picture of 32x32 pixels cannot show, there is one honest answer.
_CONSTANT_TYPE = "refusal"

# All of these are for RE2, which knows no look-around; \w, \s and \b are those of ASCII.
_FAILURE = (
    r"^ERROR|^\W{0,3}(?i:error|exception|failure|failed)\s*:|Traceback \(most recent call last\)"
    r"|CUDA (?:out of memory|error)|\b[A-Z][A-Za-z]+(?:Error|Exception):"
)
# Bytes of UTF-8 that were read as Windows-1252 (their first one and one of those that follow), control characters,
# and characters without width.
_FOLLOWING = "[\u0080-\u00bf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_DAMAGED = (
    f"[ÂÃ]{_FOLLOWING}|â€{_FOLLOWING}|â‚¬|ï»¿|ï¿½|ðŸ{_FOLLOWING}"
    "|[\ufffd\ufeff\u200b\u2060\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)
_ASSISTANT = (
    r"(?i)\bas an? (?:ai|artificial intelligence|(?:large )?language model|assistant)\b"
    r"|\bi(?: a|['’])m an? (?:ai|(?:large )?language model)\b"
    r"|\bi (?:cannot|can't|can’t|can not|am unable to|am not able to) "
    r"(?:assist|(?:see|view|access|open|process|analyze) (?:\w+ ){0,2}(?:image|picture|photo|attachment|file)s?)\b"
)
_MARKUP = (
    r"<\|[\w ]+\|>|</?s>|<pad>|<end_of_utterance>|\[/?INST\]|^(?i:assistant|user|question|answer)\s*:"
    r"|&(?:amp|lt|gt|quot|nbsp|#\d+);"
)
_STAND_IN = r"(?i)^(?:nan|null|none|n/?a|<na>|undefined|todo|tbd|[[:punct:]\s]+)$"
_PLACEHOLDER = re.escape(IMAGE_PLACEHOLDER)
_CLASS_WORD = rf"(?i)\b(?:{'|'.join(CLASS_OF_WORD)})\b"
_OF_ALL_TEXTS = {"damaged text": _DAMAGED, "leftover markup": _MARKUP, "image placeholder": _PLACEHOLDER}
_OF_ANSWERS = {"failure as answer": _FAILURE, "talk of an assistant": _ASSISTANT, "no answer": _STAND_IN}
# Most texts have none of these, and need not be searched for each.
_ANY = {
    letter: "|".join(f"(?:{pattern})" for pattern in patterns.values())
    for letter, patterns in (("Q", _OF_ALL_TEXTS), ("A", _OF_ALL_TEXTS | _OF_ANSWERS))
}
# How the last sentence of a question begins if [`asks_for_object`].
_OBJECT_QUESTION_START = r"(?i)(?:^|[.?!]\s+)[^a-z0-9]*(?:what|which|please|name|identify)\b[^.?!]*[.?!]*\s*$"


def _matches(texts: pd.Series, pattern: str) -> np.ndarray:
    # Not `str.contains`, which leaves most patterns to Python's `re` and then takes ten times as long.
    return pc.match_substring_regex(pa.array(texts), pattern).to_numpy(zero_copy_only=False)


def check_texts(rows: pd.DataFrame, max_characters: int, findings: Findings) -> pd.DataFrame:
    """Report what is wrong with the texts of pairs, and return the pairs that can be used.

    Args:
        rows (`pandas.DataFrame`): with the columns of `QaTable.rows`.
        max_characters (`int`): a longer question or answer is reported.
        findings (`Findings`): gets the problems.

    Returns:
        `pandas.DataFrame`: the rows that have question and answer, without answers that are failures; a short answer
        that nothing can be judged by is emptied.
    """
    is_empty = {letter: rows[name] == "" for letter, name in _TEXTS.items()}
    _report_texts(findings, "empty pair", rows, {"Q": is_empty["Q"] & is_empty["A"]})
    _report_texts(
        findings, "half-empty pair", rows, {"Q": is_empty["Q"] & ~is_empty["A"], "A": is_empty["A"] & ~is_empty["Q"]}
    )
    rows = rows[~is_empty["Q"] & ~is_empty["A"]]
    is_suspect = {letter: _matches(rows[name], _ANY[letter]) for letter, name in _TEXTS.items()}
    is_failure = _matches_among(is_suspect["A"], rows["answer"], _FAILURE)
    _report_texts(findings, "failure as answer", rows, {"A": is_failure})
    rows = rows[~is_failure]
    is_suspect = {letter: found[~is_failure] for letter, found in is_suspect.items()}
    for kind, pattern in _OF_ALL_TEXTS.items():
        matches = {letter: _matches_among(is_suspect[letter], rows[name], pattern) for letter, name in _TEXTS.items()}
        _report_texts(findings, kind, rows, matches)
    is_long = {letter: rows[name].str.len() > max_characters for letter, name in _TEXTS.items()}
    _report_texts(findings, "over-long text", rows, is_long)
    for kind in ("talk of an assistant", "no answer"):
        matches = {"A": _matches_among(is_suspect["A"], rows["answer"], _OF_ANSWERS[kind])}
        _report_texts(findings, kind, rows, matches)
    return _without_bad_short_answers(rows, findings)


def _matches_among(is_suspect: np.ndarray, texts: pd.Series, pattern: str) -> np.ndarray:
    found = np.zeros(len(texts), dtype=bool)
    found[is_suspect] = _matches(texts[is_suspect], pattern)
    return found


def _without_bad_short_answers(rows: pd.DataFrame, findings: Findings) -> pd.DataFrame:
    faults = faulty_short_answers(rows)
    if faults.empty:
        return rows
    places = (f"line {line} column S{pair}" for line, pair in _tuples(rows.loc[faults.index], "line", "pair"))
    findings.add_all("bad short answer", len(faults), places, faults.iloc[0])
    return rows.assign(short_answer=rows["short_answer"].mask(rows.index.isin(faults.index), ""))


def _report_texts(findings: Findings, kind: str, rows: pd.DataFrame, is_bad: dict[str, np.ndarray]) -> None:
    """Report the cells of the columns Q, A or both for which `is_bad` is true, row by row."""
    bad = pd.concat([rows[mask].assign(letter=letter) for letter, mask in is_bad.items()])
    bad = bad.sort_values(["line", "pair"], kind="stable")
    if not bad.empty:
        cells = _tuples(bad, "line", "letter", "pair")
        findings.add_all(
            kind,
            len(bad),
            (f"line {line} column {letter}{pair}" for line, letter, pair in cells),
            _example(bad.iloc[0]),
        )


def _example(row: pd.Series) -> str:
    """The bad cell, or its partner where it is empty."""
    return row[_TEXTS[row["letter"]]] or row["question"] or row["answer"]


def _tuples(rows: pd.DataFrame, *names: str) -> Iterator[tuple]:
    return zip(*(rows[name].tolist() for name in names), strict=True)


def check_answers(rows: pd.DataFrame, findings: Findings) -> None:
    """Report answers that contradict the class of their image, or the short answer beside them.

    Args:
        rows (`pandas.DataFrame`): with the columns of `QaTable.rows` and `class_name`, empty where it is not known.
        findings (`Findings`): gets the problems.
    """
    is_typed = rows["question_type"].isin(QUESTION_TYPES)
    has_class = rows["class_name"] != ""
    judged = rows[is_typed | (has_class & _matches(rows["question"], _OBJECT_QUESTION_START))]
    # The type says what most questions ask for, and then their wordings can share a verdict.
    is_worded = ~judged["question_type"].isin(QUESTION_TYPES) | (judged["question_type"] == "yes_no_class")
    asked = judged.assign(question=judged["question"].where(is_worded, ""))
    verdicts = _verdicts(asked)
    for kind in ("contradicted label", "unclear answer", "missed short answer"):
        _report_answers(findings, kind, judged[verdicts == kind])
    others = rows.drop(verdicts.index[verdicts != ""])
    others = others[(others["class_name"] != "") & _matches(others["answer"], _CLASS_WORD) & ~_name_own_class(others)]
    is_foreign = [bool(named_classes(answer)) for answer in others["answer"].tolist()]
    _report_answers(findings, "foreign class", others[is_foreign])


def _verdicts(asked: pd.DataFrame) -> pd.Series:
    """That of each pair; pairs that are equal in all that counts are judged once."""
    number = np.zeros(len(asked), np.int64)
    for name in _JUDGED:
        codes, values = pd.factorize(asked[name])
        number, _ = pd.factorize(number * len(values) + codes)
    _, first = np.unique(number, return_index=True)  # in the order of the numbers, which begin at 0
    distinct = [_verdict(*cells) for cells in _tuples(asked.iloc[first], *_JUDGED)]
    return pd.Series(np.array(distinct, dtype=object)[number], index=asked.index, dtype=object)


def _name_own_class(rows: pd.DataFrame) -> pd.Series:
    """Whether the answers have a word for the class of their image, be it denied."""
    names_it = pd.Series(False, index=rows.index)
    for class_name, group in rows.groupby("class_name"):
        words = "|".join(word for word, meant in CLASS_OF_WORD.items() if meant == class_name)
        names_it[group.index] = _matches(group["answer"], rf"(?i)\b(?:{words})\b")
    return names_it


def _report_answers(findings: Findings, kind: str, rows: pd.DataFrame) -> None:
    if not rows.empty:
        question, answer, _, short_answer, class_name = next(_tuples(rows, *_JUDGED))
        example = f"{question!r} is answered by {answer!r}"
        example += f", the short answer is {short_answer!r}" if short_answer else ""
        example += f", the image is of class {class_name}" if class_name else ""
        places = (f"line {line} column A{pair}" for line, pair in _tuples(rows, "line", "pair"))
        findings.add_all(kind, len(rows), places, example)


# Answers repeat, and most need no look at the text.
@lru_cache(maxsize=200_000)
def _verdict(question: str, answer: str, question_type: str, short_answer: str, class_name: str) -> str:
    """The kind of problem of an answer to a question with a type or to one for the object, empty where it has none."""
    judged_as, expected = _expected_answer(question, question_type, class_name)
    if expected and not _is_correct(answer, expected, judged_as):
        return "contradicted label" if _names_another(answer, expected, judged_as) else "unclear answer"
    if short_answer and question_type in QUESTION_TYPES and not _is_correct(answer, short_answer, question_type):
        return "missed short answer"
    return ""


def _names_another(answer: str, expected: str, question_type: str) -> bool:
    if question_type in ("object", "comparison"):
        named = named_classes(answer)
        return bool(named) and expected not in named
    return any(_is_correct(answer, value, question_type) for value in competing_values(question_type))


def _expected_answer(question: str, question_type: str, class_name: str) -> tuple[str, str]:
    """The type to judge an answer by, and what it has to be for an image of this class, empty where that is open."""
    if not class_name:
        return question_type, ""
    if question_type in QUESTION_TYPES:
        if question_type == "yes_no_class":
            asked = named_classes(question)
            return question_type, ("yes" if asked == {class_name} else "no") if len(asked) == 1 else ""
        return question_type, _FACTS_OF_CLASS[class_name].get(question_type, "")
    return "object", class_name if asks_for_object(question) else ""


def _facts_of_class(label: int) -> dict[str, str]:
    """Question type -> answer, for the types whose answer follows from the class alone."""
    facts = image_facts(np.zeros((8, 8, 3), np.uint8), label)
    return {
        "object": facts.object_name,
        "comparison": facts.object_name,
        "category": facts.category,
        "living": facts.living,
        "habitat": facts.habitat,
        "can_fly": facts.can_fly,
        "can_swim": facts.can_swim,
        "carries_people": facts.carries_people,
    }


_FACTS_OF_CLASS = {name: _facts_of_class(label) for label, name in enumerate(CLASS_NAMES)}


def _is_correct(answer: str, short_answer: str, question_type: str) -> bool:
    try:
        return is_correct(answer, short_answer, question_type)
    except ValueError:  # the short answer holds nothing to judge by
        return False


class Repetitions:
    """Finds questions that are asked twice of an image, and questions that nearly always have the same answer.

    Texts are compared without regard to case and white space, and by 64-bit hashes: those of a million rows take less
    than the texts of a chunk.
    """

    def __init__(self) -> None:
        self._chunks: list[dict[str, np.ndarray]] = []
        self._values_of_type: Counter[tuple[str, str]] = Counter()

    def add(self, rows: pd.DataFrame) -> None:
        """Take in the usable pairs of the next rows of the file.

        Args:
            rows (`pandas.DataFrame`): with the columns of `QaTable.rows`, -1 for an index that is not known.
        """
        is_typed = (rows["question_type"] != "") & (rows["short_answer"] != "")
        values = _hashes(rows["answer"].where(~is_typed, rows["short_answer"]))
        # A number of its own for each answer that may be the same everywhere.
        own = (8 * rows["line"] + rows["pair"]).to_numpy(np.int64)
        self._chunks.append(
            {
                "line": rows["line"].to_numpy(np.int32),
                "pair": rows["pair"].to_numpy(np.int8),
                "image": image_numbers(rows["split"], rows["dataset_index"]),
                "question": _hashes(rows["question"]),
                "value": np.where(rows["question_type"] == _CONSTANT_TYPE, own, values),
            }
        )
        typed = rows[is_typed]
        self._values_of_type.update(_tuples(typed, "question_type", "short_answer"))

    def report(self, path: Path, findings: Findings) -> Lines:
        """Report what all rows together show; `path` is read again for the texts of what is found.

        Returns:
            `dict`: split and index of each image -> the first line that asks about it.
        """
        if not self._chunks:
            return {}
        pairs = {name: np.concatenate([chunk.pop(name) for chunk in self._chunks]) for name in list(self._chunks[0])}
        _report_repeated(pairs, path, findings)
        lines = first_lines(pairs["image"], pairs["line"])
        del pairs["image"]
        _report_constant(pairs, path, findings)
        self._report_constant_types(findings)
        return lines

    def _report_constant_types(self, findings: Findings) -> None:
        totals: Counter[str] = Counter()
        values: Counter[tuple[str, str]] = Counter()
        for (question_type, short_answer), count in self._values_of_type.items():
            totals[question_type] += count
            values[question_type, plain_value(short_answer, question_type)] += count
        for (question_type, value), count in values.items():
            total = totals[question_type]
            if total >= _MIN_ASKED and count > _MAX_SHARE * total and question_type != _CONSTANT_TYPE:
                place = f"type {question_type}: {value!r} {count} of {total} times"
                findings.add("constant answer", place, place)


def _hashes(texts: pd.Series) -> np.ndarray:
    plain = texts.str.lower()
    is_odd = _matches(plain, r"\s\s|[\t\n\v\f\r]")
    words = plain.tolist()
    for position in np.flatnonzero(is_odd):
        words[position] = " ".join(words[position].split())
    return np.fromiter(map(hash, words), np.int64, len(words))


def _report_repeated(pairs: dict[str, np.ndarray], path: Path, findings: Findings) -> None:
    known = np.flatnonzero(pairs["image"] >= 0)
    asked = _joined(pairs["image"][known], pairs["question"][known])
    order = np.argsort(asked, kind="stable")  # equal ones stay in the order of the file
    is_again = asked[order[1:]] == asked[order[:-1]]
    again, before = known[order[1:][is_again]], known[order[:-1][is_again]]
    if len(again):
        in_file_order = np.argsort(again)[: findings.max_places]
        shown = zip(again[in_file_order], before[in_file_order], strict=True)
        places = [f"{_place(pairs, second)} asks the same as {_place(pairs, first)}" for second, first in shown]
        [(_, _, question, answer)] = _pairs_at(path, [(pairs["line"][again.min()], pairs["pair"][again.min()])])
        findings.add_all("repeated question", len(again), places, f"{question!r}, here answered by {answer!r}")


def _joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One number for two, at least one of them a hash; integers of numpy wrap around."""
    return first * 31 + second


def _place(pairs: dict[str, np.ndarray], position: int) -> str:
    return f"line {pairs['line'][position]} column Q{pairs['pair'][position]}"


def _report_constant(pairs: dict[str, np.ndarray], path: Path, findings: Findings) -> None:
    questions, times_asked = np.unique(pairs["question"], return_counts=True)
    is_frequent = times_asked >= _MIN_ASKED
    questions, times_asked = questions[is_frequent], times_asked[is_frequent]
    if len(questions) == 0:
        return
    # Most questions of a large file may be rare: what follows is of the frequent ones.
    number = np.searchsorted(questions, pairs["question"]).clip(max=len(questions) - 1)
    frequent = np.flatnonzero(questions[number] == pairs["question"])
    answered = _joined(pairs["question"][frequent], pairs["value"][frequent])
    _, first, given = np.unique(answered, return_index=True, return_counts=True)
    first = frequent[first]
    asked = times_asked[number[first]]
    is_constant = given > _MAX_SHARE * asked
    constant = sorted(zip(first[is_constant], given[is_constant], asked[is_constant], strict=True))
    if not constant:
        return
    shown = constant[: findings.max_places]
    texts = _pairs_at(path, [(pairs["line"][position], pairs["pair"][position]) for position, _, _ in shown])
    places = [
        f"line {line} column Q{pair}, {question!r}: {given} of {asked} times"
        for (line, pair, question, _), (_, given, asked) in zip(texts, shown, strict=True)
    ]
    _, _, question, answer = texts[0]
    findings.add_all("constant answer", len(constant), places, f"{question!r} is answered by {answer!r}")


def _pairs_at(path: Path, places: list[tuple[int, int]]) -> list[tuple[int, int, str, str]]:
    """Line, pair, question and answer of the pairs at these lines and numbers, all of which are there."""
    rows = iterate_rows(path, lambda kind, line, example: None)
    _, header = next(rows)
    wanted = {line for line, _ in places}
    cells: dict[int, tuple[str, ...]] = {}
    while len(cells) < len(wanted):
        line, row = next(rows)
        if line in wanted:
            cells[line] = row
    return [
        (line, pair, cells[line][header.index(f"Q{pair}")], cells[line][header.index(f"A{pair}")])
        for line, pair in places
    ]


__all__ = ["Repetitions", "check_answers", "check_texts"]
