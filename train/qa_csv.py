"""The CSV of questions and answers about CIFAR-10 images: read it and check it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sigphi.train.csv_lines import MOST_COLUMNS, bounded_lines, bounded_rows
from sigphi.train.errors import UserError, printable
from sigphi.train.judging import check_short_answer

PAIRS = (1, 2, 3, 4, 5)
IMAGE_SPLITS = ("train", "test")
# What an image is in the text of a prompt; inside a question it would be taken for a second image.
IMAGE_PLACEHOLDER = "<image>"

REQUIRED_COLUMNS = ("Dataset_Index", *(f"{letter}{pair}" for pair in PAIRS for letter in "QA"))
OPTIONAL_COLUMNS = ("Split", *(f"{letter}{pair}" for pair in PAIRS for letter in "TS"))
_NUM_PLACES_SHOWN = 3


@dataclass(frozen=True)
class QaTable:
    """The sound question-answer pairs of a CSV.

    Args:
        rows (`pandas.DataFrame`):
            One row a pair, in the order of the file, with the columns `line` (int, of the file, the header is 1),
            `pair` (int, 1 to 5), `split` (str), `dataset_index` (int), and as str `question`, `answer`,
            `question_type`, `short_answer`; these two are empty where the file has none.
        num_empty (`int`): pairs left out because neither question nor answer is there.
        num_faulty (`int`): pairs left out by `on_faulty="skip"`.
    """

    rows: pd.DataFrame
    num_empty: int
    num_faulty: int


def read_qa_csv(
    path: str | Path,
    image_split: str | None,
    num_images: Mapping[str, int],
    on_faulty: str = "error",
) -> QaTable:
    """Read and check a CSV of questions and answers.

    The columns `Dataset_Index`, `Q1` to `Q5` and `A1` to `A5` have to be there. `Split` says for each row which split
    of the images `Dataset_Index` counts in, `T1` to `T5` give question types and `S1` to `S5` short answers; other
    columns are ignored. An image may have several rows. White space around a cell does not count.

    Args:
        path (`str` or `Path`): a CSV file in UTF-8.
        image_split (`str`, *optional*): `"train"` or `"test"`, for a file without the column `Split`.
        num_images (`Mapping[str, int]`): for each split that the file uses, how many images it has.
        on_faulty (`str`, *optional*, defaults to `"error"`):
            What to do with pairs that miss their question or their answer, or whose answer starts with `ERROR`, as
            an annotator leaves them: `"error"` or `"skip"`.

    Raises:
        UserError: for anything wrong with the file, with file, line and column. Lines count from 1, the header's.
    """
    rows, num_empty, num_faulty = read_pairs(Path(path), image_split, on_faulty)
    return QaTable(with_checked_indices(rows, path, num_images), num_empty, num_faulty)


def read_pairs(path: Path, image_split: str | None, on_faulty: str) -> tuple[pd.DataFrame, int, int]:
    """The kept pairs with `dataset_index` still as text, and how many were empty and faulty."""
    if on_faulty not in ("error", "skip"):
        raise UserError(f"--on-faulty-answers {on_faulty}: it has to be error or skip.")
    header, lines, cells = _read_cells(path, "--input-csv", REQUIRED_COLUMNS)
    wide = pd.DataFrame(cells, columns=header, dtype=str)
    wide["Split"] = _row_splits(path, wide, lines, image_split)
    rows = one_row_a_pair(wide, lines)
    has_question, has_answer = rows["question"] != "", rows["answer"] != ""
    is_empty = ~has_question & ~has_answer
    is_faulty = (has_question != has_answer) | rows["answer"].str.startswith("ERROR")
    if on_faulty == "error":
        _raise_on_faulty(path, rows[is_faulty])
    kept = rows[~is_empty & ~is_faulty].reset_index(drop=True)
    if kept.empty:
        raise UserError(f"{path} holds no pair of a question and an answer; fill Q1 and A1.")
    _check_placeholder(path, kept)
    _check_short_answers(path, kept)
    return kept, int(is_empty.sum()), int(is_faulty.sum())


def read_questions(path: Path, image_split: str | None) -> pd.DataFrame:
    """The questions of a CSV whose answers are missing or do not count, see [`read_wide`] and [`questions_of`]."""
    return questions_of(path, *read_wide(path, image_split, "--questions-csv"))


def read_wide(
    path: Path, image_split: str | None, option: str, required: Sequence[str] = ("Dataset_Index", "Q1")
) -> tuple[pd.DataFrame, list[int]]:
    """
    A CSV as it is: a row a row.

    Args:
        path (`Path`): a CSV file in UTF-8.
        image_split (`str`, *optional*): `"train"` or `"test"`, for a file without the column `Split`.
        option (`str`): what names the file to the user.
        required (`Sequence[str]`): the columns that have to be there.

    Returns:
        `tuple`: all columns as str, in order, and `Split` where it is missing; and the line of each row.

    Raises:
        UserError: if the file is no CSV, or lacks a column or says nothing of the split.
    """
    header, lines, cells = _read_cells(path, option, required)
    wide = pd.DataFrame(cells, columns=header, dtype=str)
    wide["Split"] = _row_splits(path, wide, lines, image_split)
    return wide, lines


def questions_of(path: Path, wide: pd.DataFrame, lines: list[int]) -> pd.DataFrame:
    """
    The questions of a CSV.

    Args:
        path (`Path`): the file, for messages.
        wide, lines: of [`read_wide`].

    Returns:
        `pandas.DataFrame`: the columns of `QaTable.rows`, with `dataset_index` still as text and `answer` empty.

    Raises:
        UserError: for anything wrong with the questions but their indices, see [`with_checked_indices`].
    """
    rows = one_row_a_pair(wide, lines).assign(answer="")
    rows = rows[rows["question"] != ""].reset_index(drop=True)
    if rows.empty:
        raise UserError(f"{path} holds no question; fill Q1.")
    _check_placeholder(path, rows)
    return rows


def _read_cells(path: Path, option: str, required: Sequence[str]) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, and for each further row that is not blank the line it starts on and its cells."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = bounded_rows(file, path)
            header = [name.strip() for name in next(rows, (1, []))[1]]
            if header:
                # First, since the rows of a file with another separator look broken, too.
                _check_columns(path, header, required)
            lines, cells = _read_rows(path, rows, len(header))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a CSV file by {option}.") from error
    except UnicodeDecodeError as error:
        line = _first_line_of_no_utf8(path)
        raise UserError(f"{path}, line {line}, is not text in UTF-8; save it as CSV in UTF-8.") from error
    if not cells:
        raise UserError(f"{path} is empty; it needs a header and at least one row.")
    return header, lines, cells


def _first_line_of_no_utf8(path: Path) -> int:
    # What the decoder says counts from where it last read, not from the start of the file.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        lines = enumerate(bounded_lines(file, path), 1)
        return next(number for number, line in lines if re.search("[\udc80-\udcff]", line))


def _read_rows(
    path: Path, rows: Iterator[tuple[int, list[str]]], num_columns: int
) -> tuple[list[int], list[list[str]]]:
    lines, cells = [], []
    for line, row in rows:
        if row and len(row) != num_columns:
            raise UserError(
                f"{path}, line {line}: {len(row)} cells, but the header has {num_columns}; "
                "put cells with commas or line breaks in double quotes."
            )
        if row:
            lines.append(line)
            cells.append([cell.strip() for cell in row])
    return lines, cells


def _check_columns(path: Path, header: list[str], required: Sequence[str]) -> None:
    if len(header) > MOST_COLUMNS:
        raise UserError(f"{path}: the header has {len(header)} columns; leave out what is not needed.")
    missing = [name for name in required if name not in header]
    if missing:
        found = printable(", ".join(header)[:300])
        raise UserError(f"{path}: no column {', '.join(missing)}; the header has {found}.")
    for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS):
        if header.count(name) > 1:
            raise UserError(f"{path}: {header.count(name)} columns are named {name}; rename or remove all but one.")


def _row_splits(path: Path, wide: pd.DataFrame, lines: list[int], image_split: str | None) -> list[str]:
    if image_split is not None and image_split not in IMAGE_SPLITS:
        raise UserError(f"--image-split {image_split}: it has to be train or test.")
    if "Split" not in wide:
        if image_split is None:
            raise UserError(
                f"{path} has no column Split, so say which split Dataset_Index counts in: --image-split train or "
                "--image-split test. Files made for earlier versions of these scripts index the test split."
            )
        return [image_split] * len(wide)
    splits = wide["Split"].tolist()
    for line, split in zip(lines, splits, strict=True):
        if split not in IMAGE_SPLITS:
            raise UserError(f"{path}, line {line}, column Split: {_quoted(split)} has to be train or test.")
        if image_split is not None and split != image_split:
            raise UserError(
                f"{path}, line {line}, column Split: {_quoted(split)}, but --image-split says {image_split}; "
                "leave that option out, the column decides."
            )
    return splits


def one_row_a_pair(wide: pd.DataFrame, lines: list[int]) -> pd.DataFrame:
    """The columns of `QaTable.rows`, with `dataset_index` still as text; empty cells where `wide` has no column."""
    parts = []
    for pair in PAIRS:
        part = pd.DataFrame({"line": lines, "pair": pair, "split": wide["Split"]})
        part["dataset_index"] = wide["Dataset_Index"]
        columns = {
            "question": f"Q{pair}",
            "answer": f"A{pair}",
            "question_type": f"T{pair}",
            "short_answer": f"S{pair}",
        }
        for name, column in columns.items():
            part[name] = wide[column] if column in wide else ""
        parts.append(part)
    return pd.concat(parts).sort_values(["line", "pair"], ignore_index=True)


def _raise_on_faulty(path: Path, faulty: pd.DataFrame) -> None:
    if faulty.empty:
        return
    places = []
    for line, pair, question in faulty[["line", "pair", "question"]].head(_NUM_PLACES_SHOWN).itertuples(index=False):
        places.append(f"line {line} column {'Q' if question == '' else 'A'}{pair}")
    raise UserError(
        f"{path}: {len(faulty)} questions or answers are missing, or answers start with ERROR: {', '.join(places)}"
        f"{', ...' if len(faulty) > len(places) else ''}.\nMend them, or leave them out by --on-faulty-answers skip."
    )


def _check_placeholder(path: Path, rows: pd.DataFrame) -> None:
    for name, letter in (("question", "Q"), ("answer", "A")):
        bad = rows[rows[name].str.contains(IMAGE_PLACEHOLDER, regex=False)]
        if not bad.empty:
            raise UserError(
                f"{path}, line {bad.iloc[0]['line']}, column {letter}{bad.iloc[0]['pair']}: the text holds "
                f"{IMAGE_PLACEHOLDER}, which stands for the image itself; remove it."
            )


def faulty_short_answers(rows: pd.DataFrame) -> pd.Series:
    """
    What is wrong with the short answers that no answer can be judged by.

    Args:
        rows (`pandas.DataFrame`): with `question_type` and `short_answer`, empty where there is none.

    Returns:
        `pandas.Series` of str: one a faulty row, with its index.
    """
    key = ["question_type", "short_answer"]
    distinct = rows.loc[rows["short_answer"] != "", key].drop_duplicates()
    distinct["fault"] = [_short_answer_fault(*cells) for cells in distinct.itertuples(index=False, name=None)]
    distinct = distinct[distinct["fault"] != ""]
    suspects = rows[rows["short_answer"].isin(distinct["short_answer"])]
    faults = suspects[key].merge(distinct, "left", key)["fault"].set_axis(suspects.index)
    return faults.dropna()


def _short_answer_fault(question_type: str, short_answer: str) -> str:
    try:
        check_short_answer(question_type, short_answer)
    except ValueError as error:
        return str(error)
    return ""


def _check_short_answers(path: Path, rows: pd.DataFrame) -> None:
    faults = faulty_short_answers(rows)
    if not faults.empty:
        first = rows.loc[faults.index[0]]
        raise UserError(
            f"{path}, line {first['line']}, column S{first['pair']}: {faults.iloc[0][:300]}; empty the cell where "
            "nothing short can be said."
        )


def _quoted(cell: str) -> str:
    """A cell as a message shows it: a cell may hold anything."""
    return repr(cell if len(cell) <= 80 else f"{cell[:80]} ...")


def parse_indices(texts: pd.Series) -> pd.Series:
    """`Dataset_Index` as int64, with -1 for what is no number from 0 on."""
    # 18 digits fit into an int64.
    return texts.where(texts.str.fullmatch(r"\d{1,18}"), "-1").astype("int64")


def with_checked_indices(rows: pd.DataFrame, path: str | Path, num_images: Mapping[str, int]) -> pd.DataFrame:
    size = rows["split"].map(dict(num_images))  # (num_rows,)
    index = parse_indices(rows["dataset_index"])
    bad = rows[(index < 0) | ~(index < size)]
    if not bad.empty:
        first = bad.iloc[0]
        num_images_of_split = num_images.get(first["split"], 0)
        raise UserError(
            f"{path}, line {first['line']}, column Dataset_Index: {_quoted(first['dataset_index'])} is no row of "
            f"the {first['split']} split, which has {num_images_of_split} images: 0 to {num_images_of_split - 1}."
        )
    rows = rows.assign(dataset_index=index)
    _check_duplicates(path, rows)
    return rows


def _check_duplicates(path: str | Path, rows: pd.DataFrame) -> None:
    key = ["split", "dataset_index", "question"]
    again = rows[rows.duplicated(key)]
    if again.empty:
        return
    second = again.iloc[0]
    first = rows[(rows[key] == second[key]).all(axis=1)].iloc[0]
    raise UserError(
        f"{path}: line {first['line']} (Q{first['pair']}) and line {second['line']} (Q{second['pair']}) ask the same "
        f"of {second['split']} image {second['dataset_index']}: {second['question'][:80]!r}; remove one."
    )


__all__ = [
    "IMAGE_PLACEHOLDER",
    "IMAGE_SPLITS",
    "OPTIONAL_COLUMNS",
    "PAIRS",
    "QaTable",
    "faulty_short_answers",
    "REQUIRED_COLUMNS",
    "one_row_a_pair",
    "parse_indices",
    "questions_of",
    "read_pairs",
    "read_qa_csv",
    "read_questions",
    "read_wide",
    "with_checked_indices",
]
