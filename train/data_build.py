"""`sigphi data build`: make a CSV of questions and answers from labels and pixels.

```bash
sigphi data build --images uoft-cs/cifar10 --image-split train --output qa.csv
```
"""

import csv
import logging
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from sigphi.hub_card.files import written_aside
from sigphi.train.errors import UserError
from sigphi.train.facts import ImageFacts, batch_facts
from sigphi.train.images import decode_images, load_images
from sigphi.train.parser import parse_arguments
from sigphi.train.qa_csv import PAIRS
from sigphi.train.questions import COMMON_TYPES, QUESTION_TYPES, QuestionAnswer, make_questions

logger = logging.getLogger(__name__)


def build_csv(
    output: str | Path,
    images: str,
    split: str,
    num_images: int | None = None,
    seed: int = 0,
    questions_per_image: int = 5,
    phrasing: Literal["train", "held-out"] = "train",
    question_types: Collection[str] = QUESTION_TYPES,
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
        question_types (`Collection[str]`, *optional*): only these of `QUESTION_TYPES`.

    Raises:
        UserError: if the images cannot be loaded, the file cannot be written, or a number is out of range.
    """
    output = Path(output)
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; create it first.")
    if not 1 <= questions_per_image <= len(PAIRS):
        raise UserError(f"`questions_per_image` is {questions_per_image}; a row holds 1 to {len(PAIRS)} questions.")
    _check_types(question_types, questions_per_image)
    image_set = load_images(images, split)
    if num_images is not None and not 1 <= num_images <= len(image_set):
        raise UserError(f"--num-images {num_images}: {images}, split {split}, has 1 to {len(image_set)} to give.")
    indices = range(len(image_set) if num_images is None else num_images)
    pixels = decode_images(image_set, indices).permute(0, 2, 3, 1).numpy()  # (num_images, height, width, 3)
    facts = batch_facts(pixels, image_set.select(indices)["label"][:])
    rows: list[list[str | int]] = []
    for index in indices:
        rng = random.Random(f"{seed}:{split}:{index}")
        asked = make_questions(facts[index], rng, questions_per_image, phrasing, question_types)
        rows.append(_csv_row(index, split, facts[index], asked))
    _write_csv(output, rows)
    logger.info("%s: %d images of %s, split %s.", output, len(indices), images, split)


def _check_types(types: Collection[str], count: int) -> None:
    unknown = [name for name in types if name not in QUESTION_TYPES]
    if unknown:
        raise UserError(f"--question-types {unknown[0]}: it has to be of {', '.join(QUESTION_TYPES)}.")
    common = [name for name in COMMON_TYPES if name in types]
    if len(common) < count:
        raise UserError(
            f"--question-types: {len(common)} of these fit every image, and each has {count} questions; add some of "
            f"{', '.join(name for name in COMMON_TYPES if name not in types)}."
        )


def _csv_row(index: int, split: str, facts: ImageFacts, questions: Sequence[QuestionAnswer]) -> list[str | int]:
    row: list[str | int] = [index, split, facts.object_name]
    for asked in questions:
        row += [asked.question, asked.answer, asked.question_type, asked.short_answer]
    return row + [""] * (4 * (len(PAIRS) - len(questions)))


def _write_csv(output: Path, rows: Sequence[Sequence[str | int]]) -> None:
    header = ["Dataset_Index", "Split", "Class_Label", *(f"{letter}{pair}" for pair in PAIRS for letter in "QATS")]
    try:
        with written_aside(output) as aside, aside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from error


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
    question_types: list[str] | None = HfArg(help="Only questions of these types; without it all.", default=None)


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
        question_types=arguments.question_types or QUESTION_TYPES,
    )
    sys.stdout.write(f"{arguments.output}: written\n")


__all__ = ["DataBuildArguments", "build_csv", "main"]
