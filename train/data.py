"""Questions and answers joined with their images, as `datasets`; and the command `sigphi data`.

```bash
sigphi data build --images uoft-cs/cifar10 --image-split train --output qa.csv
```
"""

import hashlib
import importlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from sigphi.train.errors import UserError, run_command
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.qa_csv import read_pairs, with_checked_indices

if TYPE_CHECKING:
    # Takes seconds, because the options of a Trainer bring PEFT and bitsandbytes with them.
    from sigphi.train.arguments import DataArguments

logger = logging.getLogger(__name__)

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

# Arrow's 32-bit offsets hold 2 GB of encoded images in one piece.
_ROWS_A_CHUNK = 10_000


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
    pairs, num_empty, num_faulty = read_pairs(path, image_split, on_faulty)
    image_sets = {split: load_images(images, split) for split in sorted(set(pairs["split"]))}
    rows = with_checked_indices(pairs, path, {split: len(image_set) for split, image_set in image_sets.items()})
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


def load_data(arguments: "DataArguments") -> datasets.DatasetDict:
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


# Subcommand -> its module and one line of help.
COMMANDS = {
    "build": ("sigphi.train.data_build", "make a CSV of questions and answers from labels and pixels"),
    "check": ("sigphi.train.data_check", "find every problem of such a CSV"),
    "annotate": ("sigphi.train.data_annotate", "let a vision-language model answer the questions"),
    "push": ("sigphi.train.data_push", "publish a CSV as a `datasets` repository on the Hub"),
}


def main(argv: list[str] | None = None) -> None:
    """Run `sigphi data`.

    Args:
        argv (`list[str]`, *optional*): the words behind `sigphi data`, by default those of this process.

    Raises:
        UserError: for an unknown subcommand or option, and as the subcommand does.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        lines = "".join(f"{name:{width}}  {line}\n" for name, (_, line) in COMMANDS.items())
        sys.stdout.write(f"usage: sigphi data SUBCOMMAND [options]\n\n{lines}")
        sys.exit(0)
    if not words or words[0] not in COMMANDS:
        given = f"there is no subcommand {words[0]!r}" if words else "a subcommand is missing"
        raise UserError(f"{given}; `sigphi data` has: {', '.join(COMMANDS)}.")
    module, _ = COMMANDS[words[0]]
    importlib.import_module(module).main(words[1:])


__all__ = ["QA_FEATURES", "data_facts", "distinct_images", "held_out", "load_cifar10_qa", "load_data", "main"]

if __name__ == "__main__":
    run_command(main, "sigphi data")
