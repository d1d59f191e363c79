"""Ask a VLM about an image.

sigphi ask outputs/vlm cat.png -q "What is the main object in this image?"
sigphi ask outputs/vlm test:12            # a chat; an empty line ends it
"""

import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from sigphi.train.chat import Conversation, load_vlm, open_image
from sigphi.train.errors import run_command
from sigphi.train.parser import parse_arguments


@dataclass
class AskArguments:
    """What to ask."""

    _argument_group_name = "ask"

    question: str | None = HfArg(aliases=["-q"], help="The question; without it a chat starts.", default=None)
    images: str = HfArg(
        help="Image set that IMAGE counts in when it is a row, such as test:12.", default="uoft-cs/cifar10"
    )
    max_new_tokens: int = HfArg(help="Longest answer in tokens.", default=80)


def main(argv: list[str] | None = None) -> None:
    """`sigphi ask MODEL IMAGE -q "..."`: one answer, or a chat without `-q`."""
    options, model_name, image_name = parse_arguments(
        [AskArguments],
        argv,
        "sigphi ask",
        [("model", None, "VLM: a folder or Hub id"), ("image", None, "a picture, or a row such as test:12")],
    )
    image = open_image(image_name, options.images)
    model, processor = load_vlm(model_name)
    conversation = Conversation(model, processor, image, options.max_new_tokens)
    if options.question is not None:
        sys.stdout.write(conversation.ask(options.question) + "\n")
        return
    sys.stdout.write("Ask about the image; an empty line ends the chat.\n> ")
    sys.stdout.flush()
    for line in sys.stdin:
        if not line.strip():
            break
        sys.stdout.write(conversation.ask(line.strip()) + "\n> ")
        sys.stdout.flush()
    sys.stdout.write("\n")


__all__ = ["main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.ask")
