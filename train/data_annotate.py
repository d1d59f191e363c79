"""`sigphi data annotate`: let a vision-language model answer questions about CIFAR-10 images.

```bash
sigphi data annotate --images uoft-cs/cifar10 --image-split train --output annotated.csv
accelerate launch -m sigphi.train.data_annotate --images uoft-cs/cifar10 --output annotated.csv
```
"""

import csv
import hashlib
import io
import json
import logging
import random
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import datasets
import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg

from sigphi.train.annotator import (
    Annotator,
    Answer,
    ModelSource,
    load_annotator,
    load_processor,
    model_fingerprint,
    read_annotator_config,
)
from sigphi.train.batch_log import BatchLog, discard, finished_batches, write_durably
from sigphi.train.errors import UserError, run_command
from sigphi.train.facts import CLASS_NAMES, batch_facts
from sigphi.train.images import decode_images, load_images
from sigphi.train.judging import asks_for_object, is_correct, plain_value
from sigphi.train.metrics import majority_share
from sigphi.train.parser import parse_arguments
from sigphi.train.pictures import PictureError, decode_picture, encoded_bytes
from sigphi.train.qa_csv import PAIRS, read_questions, with_checked_indices
from sigphi.train.questions import make_questions
from sigphi.train.records import durable_name, environment

logger = logging.getLogger(__name__)

# The slowest process may be this far behind the fastest.
_LONGEST_WAIT = timedelta(days=7)
_FAILURES = ".failures.jsonl"
_AGREEMENT = ".agreement.json"


@dataclass
class DataAnnotateArguments:
    """Options of `sigphi data annotate`."""

    _argument_group_name = "data annotate"

    output: str = HfArg(help="CSV file to write. Beside it stand its failures and its agreement with the truth.")
    model: str = HfArg(
        help="A model that answers questions about images: a Hub id or a folder, one of ours included.",
        default="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    )
    revision: str = HfArg(help="Revision of a Hub id.", default="main")
    trust_remote_code: bool = HfArg(help="Run code that comes with the model. Read it first.", default=False)
    images: str = HfArg(
        help="Images: a Hub id, a folder in the same schema, torchvision's download folder, or 'synthetic'.",
        default="uoft-cs/cifar10",
    )
    image_split: Literal["train", "test"] | None = HfArg(
        help="Split of the images, by default train; a --questions-csv without the column Split needs it.",
        default=None,
    )
    num_images: int | None = HfArg(
        help="Only the first so many images of the split or of --questions-csv; without it all.", default=None
    )
    questions_csv: str | None = HfArg(
        help="CSV with Dataset_Index and Q1..Q5: the questions to ask; without it they come from the question bank, "
        "those that `sigphi data build` asks.",
        default=None,
    )
    seed: int | None = HfArg(help="Seed of the draw from the question bank; without it 0.", default=None)
    batch_size: int = HfArg(help="Questions in a step.", default=32)
    max_new_tokens: int = HfArg(help="Longest answer in tokens; one that is cut there is a failure.", default=256)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        help="Precision of the model; 'auto' is that of its file.", default="auto"
    )
    image_options: str = HfArg(
        help="Settings of the model's image processor to change, as a JSON object. SmolVLM enlarges an image and cuts "
        """it into many pieces unless told '{"do_image_splitting": false}'.""",
        default="{}",
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: it has to be at least 1.")
        if self.questions_csv is not None and self.seed is not None:
            raise UserError("--seed is of the draw from the question bank, and --questions-csv brings the questions.")
        if not self.output_path.parent.is_dir():
            raise UserError(f"--output {self.output}: there is no folder {self.output_path.parent}; create it first.")
        if not isinstance(_parsed_json(self.image_options), dict):
            raise UserError(f"--image-options {self.image_options}: it has to be a JSON object.")

    @property
    def output_path(self) -> Path:
        """The CSV."""
        return Path(self.output)

    @property
    def source(self) -> ModelSource:
        """The model."""
        return ModelSource(self.model, self.revision, self.trust_remote_code)

    def beside(self, ending: str) -> Path:
        """A path beside the CSV, with `ending` behind its whole name."""
        return self.output_path.with_name(self.output_path.name + ending)


def _parsed_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def annotate(arguments: DataAnnotateArguments) -> dict[str, Any] | None:
    """Answer every question, each process its share, and write the CSV when all are answered.

    The CSV is written last, whole or not at all. Until then the finished batches lie in the folder
    `<output>.parts`, from which a later call goes on, whatever ended this one and however many processes either has:
    the result is the same, byte for byte, on the same software, hardware and number of threads. The questions are cut
    into batches once and for all, and batch `b` belongs to process `b % processes`.

    Returns:
        `dict`: what `<output>.agreement.json` holds, in the first process; `None` in the others.

    Raises:
        UserError: before any weights load, if the options, the model, the images or the questions do not fit
            together, or if there is an output or an unfinished run that was made with other settings.
    """
    read_annotator_config(arguments.source)
    processor = load_processor(arguments.source, json.loads(arguments.image_options))
    image_sets, questions = _load_questions(arguments)
    settings = _settings(arguments, questions)
    parts = arguments.beside(".parts")
    # Without `cpu` a launcher's processes do not find each other on a machine without accelerator.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    if arguments.output_path.exists():
        report = _report_of_finished_run(arguments, settings)
    else:
        with BatchLog(parts, settings, state.process_index) as log:
            _answer_batches(arguments, processor, image_sets, questions, log, state)
        state.wait_for_everyone()
        if state.is_main_process:
            report = _write_results(arguments, settings, questions)
    if not state.is_main_process:
        return None
    discard(parts)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What is asked


def _load_questions(arguments: DataAnnotateArguments) -> tuple[dict[str, datasets.Dataset], pd.DataFrame]:
    """The images by split, still encoded, and one row a question: the columns of `QaTable.rows` and `class_name`."""
    if arguments.questions_csv is None:
        split: str = arguments.image_split or "train"
        image_sets = {split: _load_encoded(arguments.images, split)}
        questions = bank_questions(image_sets[split], split, arguments.num_images, arguments.seed or 0)
    else:
        path = Path(arguments.questions_csv)
        questions = read_questions(path, arguments.image_split)
        image_sets = {split: _load_encoded(arguments.images, split) for split in sorted(set(questions["split"]))}
        questions = with_checked_indices(questions, path, {split: len(rows) for split, rows in image_sets.items()})
        image_number = questions.groupby(["split", "dataset_index"], sort=False).ngroup()
        questions = questions[image_number < (arguments.num_images or len(questions))]
    labels = {split: rows["label"][:] for split, rows in image_sets.items()}
    keys = zip(questions["split"], questions["dataset_index"], strict=True)
    return image_sets, questions.assign(class_name=[CLASS_NAMES[labels[split][index]] for split, index in keys])


def _load_encoded(images: str, split: str) -> datasets.Dataset:
    return load_images(images, split).cast_column("img", datasets.Image(decode=False))


def bank_questions(images: datasets.Dataset, split: str, num_images: int | None, seed: int) -> pd.DataFrame:
    """The questions that [`build_csv`] asks, without answers.

    Args:
        images (`datasets.Dataset`): as of [`load_images`].
        split (`str`): its name, which is part of the draw.
        num_images (`int`, *optional*): only about the first so many images.
        seed (`int`): of the draw.

    Returns:
        `pandas.DataFrame`: the columns of `QaTable.rows`. An image that cannot be decoded has one row, with an empty
        question: without facts nothing can be drawn for it.

    Raises:
        UserError: if there are not so many images, or their sizes differ.
    """
    if num_images is not None and num_images > len(images):
        raise UserError(f"--num-images {num_images}: split {split} has {len(images)} images.")
    indices = range(len(images) if num_images is None else num_images)
    encoded = images.cast_column("img", datasets.Image(decode=False)).select(indices)
    readable = [index for index, row in enumerate(encoded) if isinstance(_decoded(row["img"]), Image.Image)]
    facts = {}
    if readable:
        pixels = decode_images(images, readable).permute(0, 2, 3, 1).numpy()  # (num_readable, height, width, 3)
        facts = dict(zip(readable, batch_facts(pixels, images.select(readable)["label"][:]), strict=True))
    rows: list[tuple[int, int, str, int, str, str, str, str]] = []
    for index in indices:
        asked = make_questions(facts[index], random.Random(f"{seed}:{split}:{index}")) if index in facts else []
        texts = [(one.question, "", one.question_type, one.short_answer) for one in asked] or [("", "", "", "")]
        rows += [(index + 2, pair, split, index, *text) for pair, text in enumerate(texts, start=1)]
    names = ["line", "pair", "split", "dataset_index", "question", "answer", "question_type", "short_answer"]
    return pd.DataFrame(rows, columns=names)


def _decoded(encoded: dict[str, Any]) -> Image.Image | str:
    """A picture in RGB, or why it cannot be decoded."""
    try:
        return decode_picture(encoded_bytes(encoded))
    except PictureError as error:
        return f"the picture cannot be decoded: {error}"
    except OSError as error:  # no fault of the picture
        raise UserError(f"{encoded['path']} cannot be read: {error.strerror}.") from error


def _settings(arguments: DataAnnotateArguments, questions: pd.DataFrame) -> dict[str, str]:
    """Everything that the answers depend on, by the names that the user knows."""
    asked = questions.to_csv(index=False).encode()
    return {
        "--model": durable_name(arguments.model),
        "--revision": arguments.revision,
        "the model's files": model_fingerprint(arguments.source),
        "--dtype": arguments.dtype,
        "--image-options": arguments.image_options,
        "--images": durable_name(arguments.images),
        "--batch-size": str(arguments.batch_size),
        "--max-new-tokens": str(arguments.max_new_tokens),
        "the questions (--questions-csv, --seed, --image-split, --num-images)": hashlib.sha256(asked).hexdigest(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is answered


def _batches(questions: pd.DataFrame, batch_size: int) -> list[pd.DataFrame]:
    return [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]


def _answer_batches(
    arguments: DataAnnotateArguments,
    processor: Any,
    image_sets: dict[str, datasets.Dataset],
    questions: pd.DataFrame,
    log: BatchLog,
    state: PartialState,
) -> None:
    """Answer what is left of this process's share."""
    batches = _batches(questions, arguments.batch_size)
    share = range(state.process_index, len(batches), state.num_processes)
    finished = finished_batches(log.folder)
    left = [number for number in share if number not in finished]
    if not left:
        return
    annotator = _load(arguments, processor, state)
    done = sum(len(batches[number]) for number in share if number in finished)
    total = sum(len(batches[number]) for number in share)
    if done:
        logger.info("going on: of %d questions of this process %d are answered.", total, done)
    disable = None if state.is_main_process else True
    with tqdm(total=total, initial=done, desc="annotating", unit=" questions", disable=disable) as progress:
        for number in left:
            log.add(number, answer_batch(annotator, image_sets, batches[number]))
            progress.update(len(batches[number]))


def _load(arguments: DataAnnotateArguments, processor: Any, state: PartialState) -> Annotator:
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        logger.warning(
            "one of %d GPUs is used; for all of them: accelerate launch -m sigphi.train.data_annotate ...",
            torch.cuda.device_count(),
        )
    return load_annotator(arguments.source, processor, arguments.dtype, state.device, arguments.max_new_tokens)


def answer_batch(annotator: Annotator, image_sets: dict[str, datasets.Dataset], batch: pd.DataFrame) -> list[Answer]:
    """The answers to one batch of questions; those about a picture that cannot be decoded are faults.

    Args:
        annotator (`Annotator`): answers.
        image_sets (`dict`): for each split its images, with encoded pictures in `img`.
        batch (`pandas.DataFrame`): a row a question, with `split`, `dataset_index` and `question`.
    """
    keys = list(zip(batch["split"], batch["dataset_index"], strict=True))
    pictures = {key: _decoded(image_sets[key[0]][key[1]]["img"]) for key in dict.fromkeys(keys)}
    readable = [
        (pictures[key], question)
        for key, question in zip(keys, batch["question"], strict=True)
        if isinstance(pictures[key], Image.Image)
    ]
    answers = iter(annotator.answer(*map(list, zip(*readable, strict=True))) if readable else [])
    found = [pictures[key] for key in keys]
    return [Answer("", picture) if isinstance(picture, str) else next(answers) for picture in found]


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


def _write_results(
    arguments: DataAnnotateArguments, settings: dict[str, str], questions: pd.DataFrame
) -> dict[str, Any]:
    """Write all files, the CSV last: where it stands, the others stand too."""
    parts = arguments.beside(".parts")
    finished = finished_batches(parts)
    batches = _batches(questions, arguments.batch_size)
    missing = [number for number in range(len(batches)) if number not in finished]
    if missing:
        raise UserError(
            f"{parts} lacks {len(missing)} of {len(batches)} batches; all processes need to write to the same folder. "
            "Run the command again to answer what is left."
        )
    answers = [Answer(*answer) for number in range(len(batches)) for answer in finished[number]]
    failures, scratch = failure_lines(questions, answers), parts / "results.tmp"
    arguments.beside(_FAILURES).unlink(missing_ok=True)
    if failures:
        write_durably(arguments.beside(_FAILURES), failures, scratch)
    report = {
        "questions": len(answers),
        "images": len(questions[["split", "dataset_index"]].drop_duplicates()),
        "failures": sum(answer.fault != "" for answer in answers),
        "agreement": agreement(questions, answers),
        "settings": settings,
        "environment": environment(),
    }
    write_durably(arguments.beside(_AGREEMENT), json.dumps(report, indent=2, ensure_ascii=False) + "\n", scratch)
    write_durably(arguments.output_path, csv_text(questions, answers), scratch)
    return report


def csv_text(questions: pd.DataFrame, answers: Sequence[Answer]) -> str:
    """The CSV of questions and answers, see `docs/data.md`; a pair without a sound answer is left empty."""
    rows: dict[int, list[Any]] = {}
    for asked, answer in zip(questions.itertuples(index=False), answers, strict=True):
        row = rows.setdefault(asked.line, [asked.dataset_index, asked.split, asked.class_name, *[""] * 4 * len(PAIRS)])
        if not answer.fault:
            start = 3 + 4 * (asked.pair - 1)
            row[start : start + 4] = [asked.question, answer.text, asked.question_type, asked.short_answer]
    header = ["Dataset_Index", "Split", "Class_Label", *(f"{letter}{pair}" for pair in PAIRS for letter in "QATS")]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows.values()])
    return text.getvalue()


def failure_lines(questions: pd.DataFrame, answers: Sequence[Answer]) -> str:
    """What has no sound answer, as lines of JSON."""
    lines = [
        {
            "Dataset_Index": asked.dataset_index,
            "Split": asked.split,
            "pair": asked.pair,
            "question": asked.question,
            "reason": answer.fault,
            "generated": answer.text,
        }
        for asked, answer in zip(questions.itertuples(index=False), answers, strict=True)
        if answer.fault
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def agreement(questions: pd.DataFrame, answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """How often the answers agree with what is known, for each question type.

    What is known is the short answer of a question, or CIFAR's label where one without asks for the object. Failures
    do not count, nor do descriptions, which state many facts. It judges the value in an answer, not its sentence, and
    for colors and brightness the measuring rules as much as the model: not a figure to rank annotators of other data
    by.

    Returns:
        `dict`: by question type (`""` for unknown), sorted: `answers`, how many were judged; `agreement`, the share
        of them that [`is_correct`]; `majority`, the share that the commonest truth would get without looking.
    """
    judged: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for asked, answer in zip(questions.itertuples(index=False), answers, strict=True):
        kind, truth = _truth(asked)
        if truth and not answer.fault:
            judged[kind].append((truth, is_correct(answer.text, truth, kind)))
    return {
        kind: {
            "answers": len(pairs),
            "agreement": sum(right for _, right in pairs) / len(pairs),
            "majority": majority_share([plain_value(truth, kind) for truth, _ in pairs]),
        }
        for kind, pairs in sorted(judged.items())
    }


def _truth(asked: Any) -> tuple[str, str]:
    """The type that a question is judged as, and its short answer, empty where there is none."""
    # Nothing can be found of a short answer without a word.
    if asked.question_type != "description" and re.search("[a-z0-9]", asked.short_answer.lower()):
        return asked.question_type, asked.short_answer
    if asked.question_type == "object" or not asked.question_type and asks_for_object(asked.question):
        return "object", asked.class_name
    return asked.question_type, ""


def _report_of_finished_run(arguments: DataAnnotateArguments, settings: dict[str, str]) -> dict[str, Any]:
    path = arguments.beside(_AGREEMENT)
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if report.get("settings") != settings:
        raise UserError(
            f"--output {arguments.output} exists, and was not made with these settings; "
            "remove it to make it anew, or give another name."
        )
    logger.info("%s is complete: nothing to do.", arguments.output)
    return report


def agreement_table(report: dict[str, Any]) -> str:
    """The agreement by question type as aligned lines, each beside what the commonest answer would reach."""
    rows = [
        (kind or "(no type)", f"{figures['answers']}", f"{figures['agreement']:.3f}", f"{figures['majority']:.3f}")
        for kind, figures in report["agreement"].items()
    ]
    header = ("question type", "answers", "agreement", "majority")
    width = max(len(row[0]) for row in [header, *rows])
    lines = [f"{kind:<{width}}  {count:>8}  {share:>9}  {most:>8}\n" for kind, count, share, most in [header, *rows]]
    return "".join(lines)


def main(argv: list[str] | None = None) -> None:
    """`sigphi data annotate`."""
    (arguments,) = parse_arguments([DataAnnotateArguments], argv, "sigphi data annotate")
    report = annotate(arguments)
    PartialState().destroy_process_group()
    if report is None:
        return
    sys.stdout.write(agreement_table(report))
    sys.stdout.write(f"{arguments.output}: {report['questions']} questions about {report['images']} images\n")
    if report["failures"]:
        sys.stdout.write(f"{arguments.beside(_FAILURES)}: {report['failures']} without an answer, left out\n")


__all__ = [
    "DataAnnotateArguments",
    "agreement",
    "agreement_table",
    "annotate",
    "answer_batch",
    "bank_questions",
    "csv_text",
    "failure_lines",
    "main",
]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.data_annotate")
