"""Ask a VLM about an image, or about many.

sigphi ask outputs/vlm cat.png -q "What is the main object in this image?"
sigphi ask outputs/vlm test:12            # a chat; an empty line ends it
sigphi ask outputs/vlm --csv questions.csv --output answers.csv
sigphi ask outputs/vlm --dataset pictures -q "What is this?" --output answers.csv
"""

import sys
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from sigphi.train.answer_options import AnswerArguments
from sigphi.train.bulk_answers import CsvQuestions, DatasetQuestions, answer_to_file
from sigphi.train.chat import AnswerStreamer, Conversation, load_vlm, open_image
from sigphi.train.errors import UserError, run_command
from sigphi.train.parser import parse_arguments
from sigphi.train.predictions import ABSTAINED


@dataclass
class AskArguments(AnswerArguments):
    """What to ask, and about what."""

    _argument_group_name = "ask"

    question: str | None = HfArg(
        aliases=["-q"],
        help="The question; without it a chat starts. With --dataset: asked of each image.",
        default=None,
    )
    question_column: str | None = HfArg(
        help="Column of --dataset with the questions, instead of --question.", default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.csv is not None and self.question is not None:
            raise UserError("--question has no use with --csv, which brings its questions: leave it out.")
        if self.dataset is None and self.question_column is not None:
            raise UserError("--question-column has no use without --dataset: leave it out.")
        if self.dataset is not None and (self.question is None) == (self.question_column is None):
            raise UserError("--dataset needs what to ask: either --question or --question-column.")
        if self.csv is None and self.dataset is None and self.batch_size != AnswerArguments.batch_size:
            raise UserError("--batch-size has no use without --csv or --dataset: leave it out.")


def main(argv: list[str] | None = None) -> None:
    """`sigphi ask MODEL IMAGE -q "..."`: one answer, a chat without `-q`, or a file of answers without `IMAGE`."""
    options, model_name, image_name = parse_arguments(
        [AskArguments],
        argv,
        "sigphi ask",
        [("model", None, "VLM: a folder or Hub id"), ("image", "?", "a picture, or a row such as test:12")],
    )
    options.check_source([] if image_name is None else [image_name])
    if options.csv is not None:
        sys.stdout.write(answer_to_file(model_name, CsvQuestions(options), options))
    elif options.dataset is not None:
        asked = DatasetQuestions(options, options.question, options.question_column)
        sys.stdout.write(answer_to_file(model_name, asked, options))
    else:
        _converse(model_name, image_name, options)


def _converse(model_name: str, image_name: str, options: AskArguments) -> None:
    image = open_image(image_name, options.images)
    model, processor = load_vlm(model_name)
    conversation = Conversation(model, processor, image, options.max_new_tokens, options.abstain_below or 0.0)
    if options.question is not None:
        _answer(conversation, options.question, options)
        return
    sys.stdout.write("Ask about the image; an empty line ends the chat.\n> ")
    sys.stdout.flush()
    for line in sys.stdin:
        if not line.strip():
            break
        _answer(conversation, line.strip(), options)
        sys.stdout.write("> ")
        sys.stdout.flush()
    sys.stdout.write("\n")


def _answer(conversation: Conversation, question: str, options: AskArguments) -> None:
    """Write the answer while it is made; or when it is whole, where it may have to be withheld."""
    if options.abstain_below is None:
        given = conversation.ask(question, AnswerStreamer(conversation.processor.tokenizer))
    else:
        given = conversation.ask(question)
        sys.stdout.write(f"{ABSTAINED if options.abstains(given.confidence) else given.text}\n")
    if options.show_confidence:
        sys.stdout.write(f"(confidence {given.confidence:.2f})\n")
    sys.stdout.flush()


__all__ = ["main"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.ask")
