"""Options of the commands that answer: `ask` and `describe`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from sigphi.train.errors import UserError

# Options that have no use without another one.
_NEEDS = {
    "image_split": "csv",
    "dataset_config": "dataset",
    "dataset_split": "dataset",
    "image_column": "dataset",
    "torch_compile": "output",
}


@dataclass
class AnswerArguments:
    """What is answered about, and how."""

    _argument_group_name = "answers"

    images: str = HfArg(
        help="Image set that rows such as test:12 and the Dataset_Index of --csv count in.", default="uoft-cs/cifar10"
    )
    csv: str | None = HfArg(
        aliases=["--input-csv", "--input_csv"],
        help="Instead of IMAGE: a CSV with Dataset_Index and Q1..Q5 (see docs/data.md).",
        default=None,
    )
    image_split: Literal["train", "test"] | None = HfArg(
        help="The split that Dataset_Index counts in; needed when the --csv has no Split column.", default=None
    )
    dataset: str | None = HfArg(help="Instead of IMAGE: a set of images, a Hub id or a folder.", default=None)
    dataset_config: str | None = HfArg(help="Configuration of a --dataset that has several.", default=None)
    dataset_split: str = HfArg(help="Split of --dataset.", default="train")
    image_column: str = HfArg(help="Column of --dataset with the images.", default="image")
    output: str | None = HfArg(
        help="CSV file to write the answers about a --csv or --dataset to. A command that was killed goes on where it "
        "stopped.",
        default=None,
    )
    batch_size: int = HfArg(help="Questions in a step.", default=64)
    max_new_tokens: int = HfArg(help="Longest answer in tokens.", default=80)
    show_confidence: bool = HfArg(
        help="Write behind each answer how sure the model is of it, 0 to 1; an --output always says it.", default=False
    )
    abstain_below: float | None = HfArg(
        help="Say that the model is not sure in place of answers with less confidence than this, 0 to 1; an --output "
        "keeps them, and marks them.",
        default=None,
    )
    torch_compile: bool = HfArg(
        help="Compile the step from one token to the next: takes minutes once, pays for many questions.", default=False
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{_option(name)} {getattr(self, name)}: it has to be at least 1.")
        if self.abstain_below is not None and not 0 < self.abstain_below <= 1:
            raise UserError(f"--abstain-below {self.abstain_below}: it has to be above 0, and at most 1.")
        for name, needed in _NEEDS.items():
            if getattr(self, needed) is None and getattr(self, name) != getattr(AnswerArguments, name):
                raise UserError(f"{_option(name)} has no use without {_option(needed)}: leave it out.")
        if self.output is not None and self.show_confidence:
            raise UserError("--show-confidence has no use with --output, which always says it: leave it out.")

    def check_source(self, images: Sequence[str]) -> None:
        """
        Raise a [`UserError`] unless it is said once what to answer about, and where to if that is much.

        Args:
            images (`Sequence[str]`): the pictures that were named.
        """
        given = {"IMAGE": bool(images), "--csv": self.csv is not None, "--dataset": self.dataset is not None}
        names = [name for name, is_given in given.items() if is_given]
        if len(names) != 1:
            raise UserError(f"give one of IMAGE, --csv and --dataset{', not ' if names else ''}{' and '.join(names)}.")
        if self.dataset is not None and self.images != AnswerArguments.images:
            raise UserError("--images has no use with --dataset: leave one of them out.")
        if images and self.output is not None:
            raise UserError(f"--output {self.output} is for a --csv or --dataset; leave it out.")
        if not images and self.output is None:
            raise UserError(f"{names[0]} needs --output FILE.csv, the file to write the answers to.")
        if self.output is not None and not Path(self.output).parent.is_dir():
            folder = Path(self.output).parent
            raise UserError(f"--output {self.output}: there is no folder {folder}; create it first.")

    def abstains(self, confidence: float) -> bool:
        """Whether an answer of this confidence is withheld."""
        return self.abstain_below is not None and confidence < self.abstain_below


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


__all__ = ["AnswerArguments"]
