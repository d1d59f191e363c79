"""Describe images in detail.

sigphi describe outputs/vlm cat.png dog.png
"""

import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from sigphi.train.chat import Conversation, load_vlm, open_image
from sigphi.train.errors import run_command
from sigphi.train.parser import parse_arguments

DESCRIBE = "Describe this image in detail."


@dataclass
class DescribeArguments:
    """How to describe."""

    _argument_group_name = "describe"

    images: str = HfArg(help="Image set that rows such as test:12 count in.", default="uoft-cs/cifar10")
    max_new_tokens: int = HfArg(help="Longest description in tokens.", default=160)


def main(argv: list[str] | None = None) -> None:
    """`sigphi describe MODEL IMAGE...`: what it is, its colors, background and light, in several sentences."""
    options, model_name, image_names = parse_arguments(
        [DescribeArguments],
        argv,
        "sigphi describe",
        [("model", None, "VLM: a folder or Hub id"), ("image", "+", "pictures, or rows such as test:12")],
    )
    images = [open_image(name, options.images) for name in image_names]
    model, processor = load_vlm(model_name)
    for name, image in zip(image_names, images, strict=True):
        description = Conversation(model, processor, image, options.max_new_tokens).ask(DESCRIBE)
        sys.stdout.write(f"{name}: {description}\n" if len(images) > 1 else f"{description}\n")


__all__ = ["DESCRIBE", "main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.describe")
