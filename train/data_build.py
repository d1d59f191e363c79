"""`sigphi data build`: make a CSV of questions and answers from labels and pixels.

```bash
sigphi data build --images uoft-cs/cifar10 --image-split train --output qa.csv
```
"""

import csv
import logging
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from sigphi.train.errors import UserError
from sigphi.train.facts import ImageFacts, batch_facts
from sigphi.train.images import decode_images, load_images
from sigphi.train.parser import parse_arguments
from sigphi.train.qa_csv import PAIRS
from sigphi.train.questions import make_questions

logger = logging.getLogger(__name__)


def build_csv(
    output: str | Path,
    images: str,
    split: str,
    num_images: int | None = None,
    seed: int = 0,
    questions_per_image: int = 5,
    phrasing: Literal["train", "held-out"] = "train",
) -> None:
    """Write a CSV of questions and answers that follow from labels and pixels, see [`make_questions`].

    It has one row an image, with the columns `Dataset_Index`, `Split`, `Class_Label` and, for each of five pairs,
    question `Q`, answer `A`, type `T` and short answer `S`. The questions about an image depend on nothing but seed,
    phrasing, split, index and the image. The file appears whole or not at all.

    Args:
        output (`str` or `Path`): the file to write; one that exists is replaced.
        images (`str`): where the images are, see [`load_images`].
        split (`str`): `"train"` or `"test"`.
        num_images (`int`, *optional*): only the first so many images.
        seed (`int`, *optional*, defaults to 0): of the draw of questions.
        questions_per_image (`int`, *optional*, defaults to 5): 1 to 5.
        phrasing (`str`, *optional*, defaults to `"train"`): `"train"`, or `"held-out"` for wordings of the questions
            that are for evaluation only.

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
    _write_csv(
        output, [_csv_row(index, split, facts[index], seed, questions_per_image, phrasing) for index in indices]
    )
    logger.info("%s: %d images of %s, split %s.", output, len(indices), images, split)


def _csv_row(
    index: int, split: str, facts: ImageFacts, seed: int, count: int, phrasing: Literal["train", "held-out"]
) -> list[str | int]:
    row: list[str | int] = [index, split, facts.object_name]
    for asked in make_questions(facts, random.Random(f"{seed}:{split}:{index}"), count, phrasing):
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
    phrasing: Literal["train", "held-out"] = HfArg(
        help="Wordings of the questions: those for training, or others for evaluation, which no training should see.",
        default="train",
    )


def main(argv: list[str]) -> None:
    """`sigphi data build`."""
    (arguments,) = parse_arguments([DataBuildArguments], argv, "sigphi data build")
    build_csv(
        arguments.output,
        arguments.images,
        arguments.image_split,
        arguments.num_images,
        arguments.seed,
        phrasing=arguments.phrasing,
    )
    sys.stdout.write(f"{arguments.output}: written\n")


__all__ = ["DataBuildArguments", "build_csv", "main"]
