"""What can be wrong with questions and answers: with single ones, and with all of a file together."""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sigphi.train.check_report import Findings
from sigphi.train.judging import asks_for_object, competing_values, is_correct
from sigphi.train.lenient_csv import iterate_rows
from sigphi.train.qa_csv import IMAGE_PLACEHOLDER
from sigphi.train.questions import QUESTION_TYPES

# A question that is asked less often may have one answer by chance.
_MIN_ASKED = 50
_MAX_SHARE = 0.95
# Asked for what a picture of 32x32 pixels cannot show, there is one honest answer.
_CONSTANT_TYPES = ("refusal",)

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
    r"|\bi (?:cannot|can't|can’t|can not|am unable to|am not able to) (?:see|view|access|open|process|assist)\b"
)
_MARKUP = (
    r"<\|[\w ]+\|>|</?s>|<pad>|<end_of_utterance>|\[/?INST\]|^(?i:assistant|user|question|answer)\s*:"
    r"|&(?:amp|lt|gt|quot|nbsp|#\d+);"
)
_STAND_IN = r"(?i)^(?:nan|null|none|n/?a|<na>|undefined|unknown|todo|tbd|[[:punct:]\s]+)$"


def _matches(texts: pd.Series, pattern: str) -> np.ndarray:
    # Not `str.contains`, which leaves most patterns to Python's `re` and then takes ten times as long.
    return pc.match_substring_regex(pa.array(texts), pattern).to_numpy(zero_copy_only=False)


def _report_rows(findings: Findings, kind: str, rows: pd.DataFrame, letter: str, example: str) -> None:
    """Report one problem a row, in column `letter` and the number of the row's pair, unless there are no rows."""
    if not rows.empty:
        places = (f"line {line} column {letter}{pair}" for line, pair in zip(rows["line"], rows["pair"], strict=True))
        findings.add_all(kind, len(rows), places, example)


def check_texts(rows: pd.DataFrame, max_characters: int, findings: Findings) -> pd.DataFrame:
    """Report what is wrong with the texts of pairs, and return the pairs that can be used.

    Args:
        rows (`pandas.DataFrame`): with the columns of `QaTable.rows`.
        max_characters (`int`): a longer question or answer is reported.
        findings (`Findings`): gets the problems.

    Returns:
        `pandas.DataFrame`: the rows that have question and answer, without answers that are failures.
    """
    has_question, has_answer = rows["question"] != "", rows["answer"] != ""
    _report_texts(findings, "empty pair", rows[~has_question & ~has_answer], "Q", "question")
    _report_texts(findings, "half-empty pair", rows[~has_question & has_answer], "Q", "answer")
    _report_texts(findings, "half-empty pair", rows[has_question & ~has_answer], "A", "question")
    rows = rows[has_question & has_answer]
    is_failure = _matches(rows["answer"], _FAILURE)
    _report_texts(findings, "failure as answer", rows[is_failure], "A", "answer")
    rows = rows[~is_failure]
    for name, letter in (("question", "Q"), ("answer", "A")):
        texts = rows[name]
        for kind, is_bad in (
            ("damaged text", _matches(texts, _DAMAGED)),
            ("image placeholder", texts.str.contains(IMAGE_PLACEHOLDER, regex=False)),
            ("leftover markup", _matches(texts, _MARKUP)),
            ("over-long text", texts.str.len() > max_characters),
        ):
            _report_texts(findings, kind, rows[is_bad], letter, name)
    answers = rows["answer"]
    _report_texts(findings, "talk of an assistant", rows[_matches(answers, _ASSISTANT)], "A", "answer")
    _report_texts(findings, "no answer", rows[_matches(answers, _STAND_IN)], "A", "answer")
    return rows


def _report_texts(findings: Findings, kind: str, rows: pd.DataFrame, letter: str, name: str) -> None:
    if not rows.empty:
        _report_rows(findings, kind, rows, letter, rows[name].iloc[0])


def check_answers(rows: pd.DataFrame, findings: Findings) -> None:
    """Report answers that contradict the class of their image, or the short answer beside them.

    Args:
        rows (`pandas.DataFrame`): with the columns of `QaTable.rows` and `class_name`, empty where it is not known.
        findings (`Findings`): gets the problems.
    """
    names = ["question", "answer", "question_type", "short_answer", "class_name"]
    verdicts = [_verdict(*values) for values in rows[names].itertuples(index=False, name=None)]
    kinds = np.array([kind for kind, _ in verdicts], dtype=object)
    for kind in ("contradicted label", "unclear answer", "missed short answer"):
        bad = np.flatnonzero(kinds == kind)
        if len(bad):
            _report_rows(findings, kind, rows.iloc[bad], "A", verdicts[bad[0]][1])


def _verdict(question: str, answer: str, question_type: str, short_answer: str, class_name: str) -> tuple[str, str]:
    """The kind of problem of an answer and a sentence about it, two empty texts where there is none."""
    judged_as, expected = _expected_answer(question, question_type, class_name)
    if expected and not _is_correct(answer, expected, judged_as):
        names_another = any(_is_correct(answer, value, judged_as) for value in competing_values(judged_as))
        kind = "contradicted label" if names_another else "unclear answer"
        return kind, f"{question!r} is answered by {answer!r}, but the image is of class {class_name}"
    if short_answer and competing_values(question_type) and not _is_correct(answer, short_answer, question_type):
        return "missed short answer", f"the answer is {answer!r}, but the short answer {short_answer!r}"
    return "", ""


@lru_cache(maxsize=100_000)
def _is_correct(answer: str, short_answer: str, question_type: str) -> bool:
    return re.search("[A-Za-z0-9]", short_answer) is not None and is_correct(answer, short_answer, question_type)


def _expected_answer(question: str, question_type: str, class_name: str) -> tuple[str, str]:
    """The type to judge an answer by, and what it has to be for an image of this class, empty where that is open."""
    if not class_name:
        return "", ""
    if question_type in ("object", "comparison"):
        return question_type, class_name
    if question_type not in QUESTION_TYPES and _asks_for_object(question):
        return "object", class_name
    return "", ""


@lru_cache(maxsize=100_000)
def _asks_for_object(question: str) -> bool:
    return asks_for_object(question)


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
        value = rows["answer"].where(~is_typed, rows["short_answer"])
        self._chunks.append(
            {
                "line": rows["line"].to_numpy(np.int32),
                "pair": rows["pair"].to_numpy(np.int8),
                "image": _image_numbers(rows),
                "question": _hashes(rows["question"]),
                "value": _hashes(value),
                "may_repeat": rows["question_type"].isin(_CONSTANT_TYPES).to_numpy(),
            }
        )
        typed = rows.loc[is_typed, ["question_type", "short_answer"]]
        self._values_of_type.update(typed.itertuples(index=False, name=None))

    def report(self, path: Path, findings: Findings) -> None:
        """Report what all rows together show; `path` is read again for the texts of what is found."""
        if not self._chunks:
            return
        pairs = {name: np.concatenate([chunk.pop(name) for chunk in self._chunks]) for name in list(self._chunks[0])}
        _report_repeated(pairs, findings)
        _report_constant(pairs, path, findings)
        self._report_constant_types(findings)

    def _report_constant_types(self, findings: Findings) -> None:
        totals: Counter[str] = Counter()
        for (question_type, _), count in self._values_of_type.items():
            totals[question_type] += count
        for (question_type, value), count in self._values_of_type.items():
            total = totals[question_type]
            if total >= _MIN_ASKED and count > _MAX_SHARE * total and question_type not in _CONSTANT_TYPES:
                place = f"type {question_type}: {value!r} {count} of {total} times"
                findings.add("constant answer", place, place)


def _image_numbers(rows: pd.DataFrame) -> np.ndarray:
    """An int64 for each row, equal for equal images, negative for an unknown one."""
    split = rows["split"].map({"train": 1, "test": 2}).fillna(0)
    return (rows["dataset_index"] * 3 + split).to_numpy(np.int64)


def _hashes(texts: pd.Series) -> np.ndarray:
    plain = texts.str.lower()
    is_odd = _matches(plain, r"\s\s|[\t\n\v\f\r]")
    words = plain.tolist()
    for position in np.flatnonzero(is_odd):
        words[position] = " ".join(words[position].split())
    return np.fromiter(map(hash, words), np.int64, len(words))


def _report_repeated(pairs: dict[str, np.ndarray], findings: Findings) -> None:
    order = np.lexsort((pairs["question"], pairs["image"]))  # stable: equal ones stay in the order of the file
    image, question = pairs["image"][order], pairs["question"][order]
    is_again = (image[1:] == image[:-1]) & (question[1:] == question[:-1]) & (image[1:] >= 0)
    again, before = order[1:][is_again], order[:-1][is_again]
    if len(again) == 0:
        return
    in_file_order = np.argsort(again)
    places = (
        f"{_place(pairs, again[position])} asks the same as {_place(pairs, before[position])}"
        for position in in_file_order
    )
    findings.add_all("repeated question", len(again), places, "")


def _place(pairs: dict[str, np.ndarray], position: int) -> str:
    return f"line {pairs['line'][position]} column Q{pairs['pair'][position]}"


def _report_constant(pairs: dict[str, np.ndarray], path: Path, findings: Findings) -> None:
    rows = pd.DataFrame({"question": pairs["question"], "value": pairs["value"]})[~pairs["may_repeat"]]
    asked = rows["question"].map(rows["question"].value_counts())  # (num_rows,)
    rows = rows[asked >= _MIN_ASKED].assign(asked=asked)
    rows["given"] = rows.groupby(["question", "value"])["value"].transform("size")
    constant = rows[rows["given"] > _MAX_SHARE * rows["asked"]].drop_duplicates("question")
    if constant.empty:
        return
    first = constant.head(findings.max_places)
    texts = _pairs_at(path, [(int(pairs["line"][row]), int(pairs["pair"][row])) for row in first.index])
    places = [
        f"line {line} column Q{pair}, {question!r}: {given} of {asked} times"
        for (line, pair, question, _), given, asked in zip(texts, first["given"], first["asked"], strict=True)
    ]
    _, _, question, answer = texts[0]
    findings.add_all("constant answer", len(constant), places, f"{question!r} is answered by {answer!r}")


def _pairs_at(path: Path, places: list[tuple[int, int]]) -> list[tuple[int, int, str, str]]:
    """Line, pair, question and answer of the pairs at these lines and numbers, all of which are there."""
    rows = iterate_rows(path, lambda kind, line, example: None)
    _, header = next(rows)
    wanted = {line for line, _ in places}
    cells: dict[int, list[str]] = {}
    while len(cells) < len(wanted):
        line, row = next(rows)
        if line in wanted:
            cells[line] = row
    return [
        (line, pair, cells[line][header.index(f"Q{pair}")], cells[line][header.index(f"A{pair}")])
        for line, pair in places
    ]


__all__ = ["Repetitions", "check_answers", "check_texts"]
