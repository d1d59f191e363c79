"""How far two models say the same: what exporting a model has changed of its answers and of its logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import torch
from transformers.hf_argparser import HfArg

from sigphi.train.arguments import QaArguments
from sigphi.train.collators import VlmCollator
from sigphi.train.data import distinct_images, load_cifar10_qa
from sigphi.train.data_build import build_csv
from sigphi.train.errors import UserError
from sigphi.train.evaluation import load_for_evaluation
from sigphi.train.images import decode_images
from sigphi.train.prompts import tokenize_questions
from sigphi.train.vlm_evaluation import encode_images, generate_answers

# Numbers that are kept of one model's logits until the other's are there: 1 GB in float32.
LOGITS_KEPT = 2**28
_QUESTIONS_AN_IMAGE = 5


@dataclass
class ParityArguments(QaArguments):
    """By which questions the result is compared with what it was made of."""

    _argument_group_name = "comparison"

    parity_questions: int = HfArg(
        help="Questions that both models answer, drawn from --input-csv, or without it asked about drawn pictures; "
        "0: no comparison.",
        default=200,
    )
    parity_batch_size: int = HfArg(help="Questions in a step of the comparison.", default=32)
    max_new_tokens: int = HfArg(help="Longest answer in tokens.", default=80)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parity_questions < 0:
            raise UserError(f"--parity-questions must be 0 (no comparison) or more, got {self.parity_questions}.")
        for name in ("parity_batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")

    def check_source(self) -> None:
        """Without a CSV the pictures are drawn, so that an image set would have no use."""
        if not self.input_csv and (self.images, self.image_split) != (QaArguments.images, QaArguments.image_split):
            raise UserError(
                "--images and --image-split have no use without --input-csv: give it too, or leave them out."
            )


@dataclass(frozen=True)
class Questions:
    """
    What is asked.

    Args:
        pixels (`torch.ByteTensor` of shape `(images, 3, height, width)`): decoded images.
        image_indices (`Sequence[int]`): for each question the row of `pixels`.
        texts (`Sequence[str]`): the questions.
        source (`str`): where they come from.
    """

    pixels: torch.Tensor
    image_indices: Sequence[int]
    texts: Sequence[str]
    source: str


def load_questions(arguments: ParityArguments, seed: int = 0) -> Questions:
    """
    `arguments.parity_questions` of a CSV, or about drawn pictures.

    Args:
        arguments (`ParityArguments`): their number and source.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Raises:
        UserError: if the CSV or its images cannot be read.
    """
    count = arguments.parity_questions
    if arguments.input_csv:
        options = (arguments.image_split, 1.0, 0, arguments.on_faulty_answers)
        dataset = load_cifar10_qa(arguments.input_csv, arguments.images, *options)["eval"]
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True)
        return questions_of(dataset.select(range(min(count, len(dataset)))), Path(arguments.input_csv).name)
    num_images = -(-count // _QUESTIONS_AN_IMAGE)
    with TemporaryDirectory() as folder:
        csv, images = Path(folder, "qa.csv"), f"synthetic:{max(num_images, 10)}"
        build_csv(csv, images, "train", num_images, seed, _QUESTIONS_AN_IMAGE)
        dataset = load_cifar10_qa(csv, images, eval_fraction=1.0)["eval"]
        return questions_of(dataset.select(range(count)), "drawn pictures")


def questions_of(dataset: datasets.Dataset, source: str) -> Questions:
    """The questions of a split of [`load_cifar10_qa`]."""
    images, positions = distinct_images(dataset)
    return Questions(decode_images(images, range(len(images))), positions, dataset["question"][:], source)


@dataclass
class Transcript:
    """
    What a model answers, and how likely it holds what is answered.

    Args:
        answers (`list[str]`): greedy, one a question.
        logits (`list[torch.Tensor]`): for each of the first questions those of the tokens of an answer and of its
            end, `(tokens, vocab_size)` in float32; of as many questions as `LOGITS_KEPT` allows.
    """

    answers: list[str]
    logits: list[torch.Tensor] = field(default_factory=list)


@torch.no_grad()
def transcript(
    model: Any,
    processor: Any,
    questions: Questions,
    answers: Sequence[str] | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 80,
) -> Transcript:
    """
    Let a model answer, and take down its logits along the answers of another, or its own.

    Args:
        model, processor: of the VLM, in evaluation mode.
        questions (`Questions`): what is asked.
        answers (`Sequence[str]`, *optional*): one a question, for the logits; the model's own by default.
        batch_size (`int`, *optional*, defaults to 32): questions in a step.
        max_new_tokens (`int`, *optional*, defaults to 80): longest answer in tokens.
    """
    features = encode_images(model, processor, questions.pixels)
    asked = (features, questions.image_indices, questions.texts)
    given = generate_answers(model, processor, *asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
    own = [answer.text for answer in given]
    result = Transcript(own)
    kept = 0
    for logits in _answer_logits(model, processor, *asked, own if answers is None else answers, batch_size):
        kept += logits.numel()
        if kept > LOGITS_KEPT:
            break
        result.logits.append(logits)
    return result


def _answer_logits(
    model: Any,
    processor: Any,
    features: torch.Tensor,
    image_indices: Sequence[int],
    questions: Sequence[str],
    answers: Sequence[str],
    batch_size: int,
) -> Iterator[torch.Tensor]:
    tokenizer = processor.tokenizer
    prompts = tokenize_questions(processor, questions)
    ids = tokenizer([f" {answer}" for answer in answers], add_special_tokens=False)["input_ids"]
    rows = [
        {"image_index": image, "prompt_ids": prompt, "answer_ids": answer + [tokenizer.eos_token_id]}
        for image, prompt, answer in zip(image_indices, prompts, ids, strict=True)
    ]
    collate = VlmCollator(pad_token_id=tokenizer.pad_token_id, image_features=features)
    for start in range(0, len(rows), batch_size):
        batch = {name: part.to(model.device) for name, part in collate(rows[start : start + batch_size]).items()}
        supervised = batch.pop("labels")[:, 1:] != -100  # (batch, length - 1)
        logits = model(**batch).logits[:, :-1]  # (batch, length - 1, vocab_size)
        for row, where in zip(logits, supervised, strict=True):
            yield row[where].float().cpu()  # (tokens, vocab_size)


def compare(before: Transcript, after: Transcript) -> dict[str, float]:
    """
    How far two transcripts of the same questions, along the same answers, agree.

    Returns:
        `dict`: `questions`, and of these `identical_answers`; `logit_questions`, whose logits were compared at
        `logit_positions` tokens: `next_token_agreement` (share of the positions at which both find the same token
        likeliest), `mean_kl` (Kullback-Leibler divergence of after from before, nats), `max_abs_logit_difference` and
        `mean_abs_logit_difference`.
    """
    same = sum(one == other for one, other in zip(before.answers, after.answers, strict=True))
    agreed = divergence = total = largest = 0.0
    positions = numbers = 0
    for one, other in zip(before.logits, after.logits, strict=True):
        difference = (one - other).abs()
        largest, total = max(largest, difference.max().item()), total + difference.sum(dtype=torch.float64).item()
        agreed += (one.argmax(-1) == other.argmax(-1)).sum().item()
        log_before, log_after = one.log_softmax(-1), other.log_softmax(-1)
        divergence += (log_before.exp() * (log_before - log_after)).sum(dtype=torch.float64).item()
        positions, numbers = positions + len(one), numbers + one.numel()
    return {
        "questions": len(before.answers),
        "identical_answers": same,
        "logit_questions": len(before.logits),
        "logit_positions": positions,
        "next_token_agreement": agreed / positions,
        "mean_kl": divergence / positions,
        "max_abs_logit_difference": largest,
        "mean_abs_logit_difference": total / numbers,
    }


def parity(before: str, after: str, questions: Questions, **options: Any) -> dict[str, float]:
    """
    [`compare`] two models, each loaded as a stranger would, one after the other.

    Args:
        before, after (`str`): folders or Hub ids.
        questions (`Questions`): what both are asked.
        options: `batch_size` and `max_new_tokens` of [`transcript`].
    """
    first = transcript(*load_for_evaluation(before), questions, **options)
    second = transcript(*load_for_evaluation(after), questions, first.answers, **options)
    return compare(first, second)


__all__ = [
    "ParityArguments",
    "Questions",
    "Transcript",
    "compare",
    "load_questions",
    "parity",
    "questions_of",
    "transcript",
]
