"""The CSV of questions and answers about CIFAR-10 images: read it, check it, join it with its images, make one.

```bash
sigphi data build --images uoft-cs/cifar10 --image-split train --output qa.csv
```
"""

import csv
import hashlib
import json
import logging
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
from transformers.hf_argparser import HfArg

from sigphi.train.arguments import DataArguments
from sigphi.train.errors import UserError, run_command
from sigphi.train.images import decode_images, load_images
from sigphi.train.parser import parse_arguments
from sigphi.train.questions import CLASS_NAMES, ImageFacts, batch_facts, make_questions

logger = logging.getLogger(__name__)

PAIRS = (1, 2, 3, 4, 5)
IMAGE_SPLITS = ("train", "test")
# What an image is in the text of a prompt; inside a question it would be taken for a second image.
IMAGE_PLACEHOLDER = "<image>"

QA_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=list(CLASS_NAMES)),
        "dataset_index": datasets.Value("int64"),
        "split": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "question_type": datasets.Value("string"),
        "short_answer": datasets.Value("string"),
    }
)

_REQUIRED_COLUMNS = ("Dataset_Index", *(f"{letter}{pair}" for pair in PAIRS for letter in "QA"))
_OPTIONAL_COLUMNS = ("Split", *(f"{letter}{pair}" for pair in PAIRS for letter in "TS"))
_NUM_PLACES_SHOWN = 3
# Arrow's 32-bit offsets hold 2 GB of encoded images in one piece.
_ROWS_A_CHUNK = 10_000


# ---------------------------------------------------------------------------------------------------------------------
# Reading the CSV


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
    rows, num_empty, num_faulty = _read_pairs(Path(path), image_split, on_faulty)
    return QaTable(_with_checked_indices(rows, path, num_images), num_empty, num_faulty)


def _read_pairs(path: Path, image_split: str | None, on_faulty: str) -> tuple[pd.DataFrame, int, int]:
    """The kept pairs with `dataset_index` still as text, and how many were empty and faulty."""
    if on_faulty not in ("error", "skip"):
        raise UserError(f"--on-faulty-answers {on_faulty}: it has to be error or skip.")
    header, lines, cells = _read_cells(path)
    _check_columns(path, header)
    wide = pd.DataFrame(cells, columns=header, dtype=str)
    wide["Split"] = _row_splits(path, wide, lines, image_split)
    rows = _one_row_a_pair(wide, lines)
    has_question, has_answer = rows["question"] != "", rows["answer"] != ""
    is_empty = ~has_question & ~has_answer
    is_faulty = (has_question != has_answer) | rows["answer"].str.startswith("ERROR")
    if on_faulty == "error":
        _raise_on_faulty(path, rows[is_faulty])
    kept = rows[~is_empty & ~is_faulty].reset_index(drop=True)
    if kept.empty:
        raise UserError(f"{path} holds no pair of a question and an answer; fill Q1 and A1.")
    _check_placeholder(path, kept)
    return kept, int(is_empty.sum()), int(is_faulty.sum())


def _read_cells(path: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, and for each further row that is not blank the line it starts on and its cells."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            # Not pandas: it neither knows the line of a row behind cells of several lines nor refuses short rows.
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            lines, cells = _read_rows(path, reader, len(header))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a CSV file by --input-csv.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}); save it as CSV in UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: this is not CSV ({error}).") from error
    if not cells:
        raise UserError(f"{path} is empty; it needs a header and at least one row.")
    return header, lines, cells


def _read_rows(path: Path, reader: Any, num_columns: int) -> tuple[list[int], list[list[str]]]:
    lines, rows = [], []
    line = reader.line_num + 1
    for row in reader:
        if row and len(row) != num_columns:
            raise UserError(
                f"{path}, line {line}: {len(row)} cells, but the header has {num_columns}; "
                "put cells with commas or line breaks in double quotes."
            )
        if row:
            lines.append(line)
            rows.append([cell.strip() for cell in row])
        line = reader.line_num + 1
    return lines, rows


def _check_columns(path: Path, header: list[str]) -> None:
    missing = [name for name in _REQUIRED_COLUMNS if name not in header]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}; the header has {', '.join(header)[:300]}.")
    for name in (*_REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS):
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
            raise UserError(f"{path}, line {line}, column Split: {split!r} has to be train or test.")
        if image_split is not None and split != image_split:
            raise UserError(
                f"{path}, line {line}, column Split: {split!r}, but --image-split says {image_split}; "
                "leave that option out, the column decides."
            )
    return splits


def _one_row_a_pair(wide: pd.DataFrame, lines: list[int]) -> pd.DataFrame:
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


def _with_checked_indices(rows: pd.DataFrame, path: str | Path, num_images: Mapping[str, int]) -> pd.DataFrame:
    size = rows["split"].map(dict(num_images))  # (num_rows,)
    # 18 digits fit into an int64; what is no number becomes -1.
    is_number = rows["dataset_index"].str.fullmatch(r"\d{1,18}")
    index = rows["dataset_index"].where(is_number, "-1").astype("int64")
    bad = rows[(index < 0) | ~(index < size)]
    if not bad.empty:
        first = bad.iloc[0]
        num_images_of_split = num_images.get(first["split"], 0)
        raise UserError(
            f"{path}, line {first['line']}, column Dataset_Index: {first['dataset_index']!r} is no row of the "
            f"{first['split']} split, which has {num_images_of_split} images: 0 to {num_images_of_split - 1}."
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


# ---------------------------------------------------------------------------------------------------------------------
# Joining it with its images


def held_out(dataset_index: int, split: str, fraction: float, seed: int) -> bool:
    """Whether an image belongs to the evaluation part, whatever questions are asked about it.

    A hash of seed, split and index decides, so the answer is the same for every CSV, machine and version of Python,
    and a larger fraction holds out the images of a smaller one and more.

    Args:
        dataset_index (`int`): the row of the image in its split.
        split (`str`): `"train"` or `"test"`.
        fraction (`float`): the share of images to hold out, 0 to 1.
        seed (`int`): another seed holds out other images.
    """
    digest = hashlib.blake2b(f"{seed}:{split}:{dataset_index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48 < fraction


def load_cifar10_qa(
    input_csv: str | Path,
    images: str = "uoft-cs/cifar10",
    image_split: str | None = None,
    eval_fraction: float = 0.1,
    seed: int = 0,
    on_faulty: str = "error",
) -> datasets.DatasetDict:
    """Join a CSV of questions and answers with its images, and hold out whole images for evaluation.

    Args:
        input_csv (`str` or `Path`): the CSV, see [`read_qa_csv`].
        images (`str`, *optional*, defaults to `"uoft-cs/cifar10"`): where the images are, see [`load_images`].
        image_split (`str`, *optional*): `"train"` or `"test"`, for a CSV without the column `Split`.
        eval_fraction (`float`, *optional*, defaults to 0.1): the share of images to hold out, see [`held_out`].
        seed (`int`, *optional*, defaults to 0): decides which images these are.
        on_faulty (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`, see [`read_qa_csv`].

    Returns:
        `datasets.DatasetDict`: the splits `train` and `eval`, without `train` when `eval_fraction` is 1 and without
        `eval` when it is 0. No image is in both. One row a question, in the order of the file, with the columns
        `image` (`datasets.Image`, as it is encoded in the source), `label` (`ClassLabel`), `dataset_index` (int64),
        and as strings `split`, `question`, `answer`, `question_type` and `short_answer`, these two empty where
        unknown.

    Raises:
        UserError: for anything wrong with the CSV or the images, and when no image is left for a split.
    """
    if not 0 <= eval_fraction <= 1:
        raise UserError(f"--eval-fraction {eval_fraction}: it has to lie in 0 to 1.")
    path = Path(input_csv)
    pairs, num_empty, num_faulty = _read_pairs(path, image_split, on_faulty)
    image_sets = {split: load_images(images, split) for split in sorted(set(pairs["split"]))}
    rows = _with_checked_indices(pairs, path, {split: len(image_set) for split, image_set in image_sets.items()})
    parts = _split_rows(rows, eval_fraction, seed)
    logger.info(
        "%s: %d questions about %d images; left out: %d empty pairs, %d faulty ones.",
        path,
        len(rows),
        len(rows[["split", "dataset_index"]].drop_duplicates()),
        num_empty,
        num_faulty,
    )
    pictures = {split: image_set.with_format("arrow")[:] for split, image_set in image_sets.items()}
    return datasets.DatasetDict({name: _join(part, pictures) for name, part in parts.items()})


def load_data(arguments: DataArguments) -> datasets.DatasetDict:
    """[`load_cifar10_qa`] with the options of a command."""
    return load_cifar10_qa(
        arguments.input_csv,
        arguments.images,
        arguments.image_split,
        arguments.eval_fraction,
        arguments.split_seed,
        arguments.on_faulty_answers,
    )


def _split_rows(rows: pd.DataFrame, eval_fraction: float, seed: int) -> dict[str, pd.DataFrame]:
    keys = list(zip(rows["split"], rows["dataset_index"], strict=True))
    is_held_out = {key: held_out(key[1], key[0], eval_fraction, seed) for key in set(keys)}
    in_eval = np.array([is_held_out[key] for key in keys])  # (num_rows,)
    wanted = {"train": eval_fraction < 1, "eval": eval_fraction > 0}
    parts = {"train": rows[~in_eval], "eval": rows[in_eval]}
    for name, part in parts.items():
        if wanted[name] and part.empty:
            raise UserError(
                f"--eval-fraction {eval_fraction} leaves no image of {len(is_held_out)} for {name}; "
                f"give another fraction, or {0 if name == 'eval' else 1} to do without {name} on purpose."
            )
    return {name: part for name, part in parts.items() if wanted[name]}


def _join(rows: pd.DataFrame, pictures: dict[str, pa.Table]) -> datasets.Dataset:
    first_row = dict(zip(pictures, np.cumsum([0, *(len(table) for table in pictures.values())]), strict=False))
    position = (rows["split"].map(first_row) + rows["dataset_index"]).to_numpy()  # (num_rows,)
    everything = pa.concat_tables(pictures.values())
    chunks = [
        everything.take(pa.array(position[start : start + _ROWS_A_CHUNK]))
        for start in range(0, len(position), _ROWS_A_CHUNK)
    ]
    table = pa.concat_tables(chunks).rename_columns({"img": "image"})
    for name in list(QA_FEATURES)[2:]:
        table = table.append_column(name, pa.array(rows[name], type=QA_FEATURES[name].pa_type))
    return datasets.Dataset(table.cast(QA_FEATURES.arrow_schema), info=datasets.DatasetInfo(features=QA_FEATURES))


def distinct_images(dataset: datasets.Dataset) -> tuple[datasets.Dataset, list[int]]:
    """The images behind the questions, each one once.

    Args:
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].

    Returns:
        `tuple`: a `datasets.Dataset` with the columns `img` and `label`, in the order of first occurrence, and a list
        that gives for each row of `dataset` the position of its image in it.
    """
    keys = dataset.select_columns(["split", "dataset_index"]).to_pandas()
    position = keys.groupby(["split", "dataset_index"], sort=False).ngroup()
    first = np.flatnonzero(~keys.duplicated())
    images = dataset.select_columns(["image", "label"]).select(first).rename_column("image", "img")
    return images, position.tolist()


def data_facts(dataset: datasets.Dataset) -> dict[str, Any]:
    """What was trained on, to be written beside the model as JSON.

    Args:
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].

    Returns:
        `dict`: `fingerprint` (sha256 over split, index, question and answer of every row, in order), `num_rows`,
        `num_images`, `images_per_split` and `rows_per_question_type` (`""` for rows without a type).
    """
    names = ["split", "dataset_index", "question", "answer", "question_type"]
    rows = dataset.select_columns(names).to_pandas()
    digest = hashlib.sha256()
    for values in rows[names[:4]].itertuples(index=False, name=None):
        digest.update(json.dumps(values).encode() + b"\n")
    distinct = rows[["split", "dataset_index"]].drop_duplicates()
    return {
        "fingerprint": digest.hexdigest(),
        "num_rows": len(rows),
        "num_images": len(distinct),
        "images_per_split": {name: int(count) for name, count in distinct["split"].value_counts().items()},
        "rows_per_question_type": {name: int(count) for name, count in rows["question_type"].value_counts().items()},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Making one


def build_csv(
    output: str | Path,
    images: str,
    split: str,
    num_images: int | None = None,
    seed: int = 0,
    questions_per_image: int = 5,
) -> None:
    """Write a CSV of questions and answers that follow from labels and pixels, see [`make_questions`].

    It has one row an image, with the columns `Dataset_Index`, `Split`, `Class_Label` and, for each of five pairs,
    question `Q`, answer `A`, type `T` and short answer `S`. The questions about an image depend on nothing but seed,
    split, index and the image. The file appears whole or not at all.

    Args:
        output (`str` or `Path`): the file to write; one that exists is replaced.
        images (`str`): where the images are, see [`load_images`].
        split (`str`): `"train"` or `"test"`.
        num_images (`int`, *optional*): only the first so many images.
        seed (`int`, *optional*, defaults to 0): of the draw of questions.
        questions_per_image (`int`, *optional*, defaults to 5): 1 to 5.

    Raises:
        UserError: if the images cannot be loaded, the file cannot be written, or a number is out of range.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; create it first.")
    if not 1 <= questions_per_image <= len(PAIRS):
        raise UserError(f"`questions_per_image` is {questions_per_image}; a row holds 1 to {len(PAIRS)} questions.")
    image_set = load_images(images, split)
    if num_images is not None and not 1 <= num_images <= len(image_set):
        raise UserError(f"--num-images {num_images}: {images}, split {split}, has 1 to {len(image_set)} to give.")
    indices = range(len(image_set) if num_images is None else num_images)
    pixels = decode_images(image_set, indices).permute(0, 2, 3, 1).numpy()  # (num_images, height, width, 3)
    facts = batch_facts(pixels, image_set.select(indices)["label"][:])
    rows = [_csv_row(index, split, facts[index], seed, questions_per_image) for index in indices]
    _write_csv(output, rows)
    logger.info("%s: %d images of %s, split %s.", output, len(rows), images, split)


def _csv_row(index: int, split: str, facts: ImageFacts, seed: int, count: int) -> list[str | int]:
    row: list[str | int] = [index, split, facts.object_name]
    for asked in make_questions(facts, random.Random(f"{seed}:{split}:{index}"), count):
        row += [asked.question, asked.answer, asked.question_type, asked.short_answer]
    return row + [""] * (4 * (len(PAIRS) - count))


def _write_csv(output: Path, rows: Sequence[Sequence[str | int]]) -> None:
    header = ["Dataset_Index", "Split", "Class_Label", *(f"{letter}{pair}" for pair in PAIRS for letter in "QATS")]
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
        os.replace(unfinished, output)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


@dataclass
class DataBuildArguments:
    """Options of `sigphi data build`."""

    _argument_group_name = "data build"

    output: str = HfArg(help="CSV file to write; one that exists is replaced.")
    images: str = HfArg(
        help="Images: a Hub id, a folder in the same schema, torchvision's download folder, or 'synthetic' "
        "('synthetic:8000' draws 8000 train images).",
        default="uoft-cs/cifar10",
    )
    image_split: Literal["train", "test"] = HfArg(help="Split of the images.", default="train")
    num_images: int | None = HfArg(help="Only the first so many images of the split; without it all.", default=None)
    seed: int = HfArg(help="Seed of the draw of questions.", default=0)


_USAGE = """usage: sigphi data build [options]

build   make a CSV of questions and answers from labels and pixels; see `sigphi data build --help`
"""


def main(argv: list[str] | None = None) -> None:
    """Run `sigphi data`.

    Args:
        argv (`list[str]`, *optional*): the words behind `sigphi data`, by default those of this process.

    Raises:
        UserError: for an unknown subcommand or option, and as in [`build_csv`].
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(_USAGE)
        sys.exit(0)
    if words[:1] != ["build"]:
        given = f"there is no subcommand {words[0]!r}" if words else "a subcommand is missing"
        raise UserError(f"{given}; `sigphi data` has: build.")
    (arguments,) = parse_arguments([DataBuildArguments], words[1:], "sigphi data build")
    build_csv(arguments.output, arguments.images, arguments.image_split, arguments.num_images, arguments.seed)
    sys.stdout.write(f"{arguments.output}: written\n")


__all__ = [
    "DataBuildArguments",
    "IMAGE_PLACEHOLDER",
    "IMAGE_SPLITS",
    "PAIRS",
    "QA_FEATURES",
    "QaTable",
    "build_csv",
    "data_facts",
    "distinct_images",
    "held_out",
    "load_cifar10_qa",
    "load_data",
    "main",
    "read_qa_csv",
]

if __name__ == "__main__":
    run_command(main, "sigphi data")
