"""Describe images in detail.

sigphi describe outputs/vlm cat.png dog.png
sigphi describe outputs/vlm --dataset pictures --output descriptions.csv
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from transformers.hf_argparser import HfArg

from sigphi.train.answer_options import AnswerArguments
from sigphi.train.answering import generate_answers
from sigphi.train.bulk_answers import CsvQuestions, DatasetQuestions, PictureFeatures, answer_to_file
from sigphi.train.chat import load_vlm, open_image
from sigphi.train.errors import run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.predictions import ABSTAINED

DESCRIBE = "Describe this image in detail."


@dataclass
class DescribeArguments(AnswerArguments):
    """What to describe, and how."""

    _argument_group_name = "describe"

    max_new_tokens: int = HfArg(help="Longest description in tokens.", default=160)


def main(argv: list[str] | None = None) -> None:
    """`sigphi describe MODEL IMAGE...`: what it is, its colors, background and light, in several sentences."""
    options, model_name, image_names = parse_arguments(
        [DescribeArguments],
        argv,
        "sigphi describe",
        [("model", None, "VLM: a folder or Hub id"), ("image", "*", "pictures, or rows such as test:12")],
    )
    options.check_source(image_names)
    if options.csv is not None:
        sys.stdout.write(answer_to_file(model_name, CsvQuestions(options, DESCRIBE), options))
    elif options.dataset is not None:
        sys.stdout.write(answer_to_file(model_name, DatasetQuestions(options, DESCRIBE), options))
    else:
        images = [open_image(name, options.images) for name in image_names]
        for name, line in zip(image_names, _descriptions(model_name, images, options), strict=True):
            sys.stdout.write(f"{name}: {line}\n" if len(images) > 1 else f"{line}\n")
            sys.stdout.flush()


def _descriptions(model_name: str, images: Sequence[Image.Image], options: DescribeArguments) -> Iterator[str]:
    model, processor = load_vlm(model_name)
    features = PictureFeatures(model, processor, images.__getitem__)
    size = options.batch_size
    for start in range(0, len(images), size):
        rows = range(start, min(start + size, len(images)))
        questions = [DESCRIBE] * len(rows)
        for given in generate_answers(model, processor, features, rows, questions, size, options.max_new_tokens):
            shown = ABSTAINED if options.abstains(given.confidence) else given.text
            yield f"{shown} (confidence {given.confidence:.2f})" if options.show_confidence else shown


__all__ = ["DESCRIBE", "main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.describe")
