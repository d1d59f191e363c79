"""Answers about many images, written to a CSV by a run that goes on where it was killed: `ask` and `describe`."""

import csv
import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedConfig

from sigphi.configuration.configuration_sigphi import SigPhiConfig
from sigphi.processing.processing_sigphi import SigPhiProcessor
from sigphi.train.annotator import ModelSource, model_fingerprint
from sigphi.train.answer_options import AnswerArguments
from sigphi.train.answering import check_compilable, generate_answers
from sigphi.train.batch_log import discard, write_durably
from sigphi.train.chat import load_vlm
from sigphi.train.checkpoints import loading, read_config
from sigphi.train.errors import UserError
from sigphi.train.image_texts import check_column, check_image_column, image_digests, read_set
from sigphi.train.images import load_images
from sigphi.train.pictures import PictureError, decode_picture, encoded_bytes
from sigphi.train.predictions import Given
from sigphi.train.prompts import context_length, tokenize_questions
from sigphi.train.qa_csv import PAIRS, REQUIRED_COLUMNS, questions_of, read_wide, with_checked_indices
from sigphi.train.records import durable_name, environment

logger = logging.getLogger(__name__)


# What is asked -------------------------------------------------------------------------------------------------------


class Asked(Protocol):
    """
    Questions about images.

    Attributes:
        pictures (`datasets.Dataset`): each image once, undecoded, in the column `image`.
        places (`list[str]`): what messages call each of them.
        images (`list[int]`): for each question the row of its image.
        questions (`list[str]`): what is asked.
        source (`dict[str, str]`): what they come from, by the names that the user knows.
    """

    pictures: datasets.Dataset
    places: list[str]
    images: list[int]
    questions: list[str]
    source: dict[str, str]

    def text(self, given: Sequence[Given], arguments: AnswerArguments) -> str:
        """The file that holds the answers."""


class CsvQuestions:
    """
    The questions of a CSV about the images of a set.

    Args:
        arguments (`AnswerArguments`): the options.
        question (`str`, *optional*): asked about each image of the file, instead of the questions in it.

    Raises:
        UserError: for anything wrong with the file or the image set.
    """

    def __init__(self, arguments: AnswerArguments, question: str | None = None) -> None:
        assert arguments.csv is not None
        path = Path(arguments.csv)
        required = ("Dataset_Index", "Q1") if question is None else ("Dataset_Index",)
        self.wide, self.lines = read_wide(path, arguments.image_split, "--csv", required)
        if question is not None:
            is_again = self.wide.duplicated(["Split", "Dataset_Index"])
            self.lines = [line for line, again in zip(self.lines, is_again, strict=True) if not again]
            self.wide = self.wide.loc[~is_again, ["Dataset_Index", "Split"]].reset_index(drop=True).assign(Q1=question)
        self.rows = questions_of(path, self.wide, self.lines)
        sets = {split: load_images(arguments.images, split) for split in sorted(set(self.rows["split"]))}
        self.rows = with_checked_indices(self.rows, path, {split: len(rows) for split, rows in sets.items()})
        keys = list(zip(self.rows["split"], self.rows["dataset_index"], strict=True))
        distinct = sorted(set(keys))
        number = {key: position for position, key in enumerate(distinct)}
        parts = [rows.select([index for of, index in distinct if of == split]) for split, rows in sets.items()]
        self.pictures = _undecoded(datasets.concatenate_datasets(parts), "img")
        self.places = [f"{split} image {index} of --images {arguments.images}" for split, index in distinct]
        self.images, self.questions = [number[key] for key in keys], self.rows["question"].tolist()
        self.source = {"--images": durable_name(arguments.images)}

    def text(self, given: Sequence[Given], arguments: AnswerArguments) -> str:
        """The same file with the answers in A1 to A5 and their confidence, whatever stood there before."""
        table = self.wide.copy()
        for name in REQUIRED_COLUMNS:
            if name not in table:
                table[name] = ""
        row_of = {line: row for row, line in enumerate(self.lines)}
        for pair in PAIRS:
            of_pair = (self.rows["pair"] == pair).tolist()
            cells = {name: [""] * len(table) for name in (f"A{pair}", *_added_names(arguments, str(pair)))}
            for line, one in zip(self.rows["line"][of_pair], _chosen(given, of_pair), strict=True):
                for column, cell in zip(cells.values(), _cells(one, arguments), strict=True):
                    column[row_of[line]] = cell
            for name, column in cells.items():
                table[name] = column
        return _csv_text(list(table), table.itertuples(index=False, name=None))


class DatasetQuestions:
    """
    One question about each image of a set, or the questions in a column of it.

    Args:
        arguments (`AnswerArguments`): the options.
        question (`str`, *optional*): asked about each image.
        question_column (`str`, *optional*): the column with the questions, when there is no `question`.

    Raises:
        UserError: if there is no such set or column, or nothing in it to ask about.
    """

    def __init__(
        self, arguments: AnswerArguments, question: str | None = None, question_column: str | None = None
    ) -> None:
        assert arguments.dataset is not None
        place = f"--dataset {arguments.dataset}"
        rows = read_set(arguments.dataset, arguments.dataset_config, arguments.dataset_split)
        check_image_column(rows, place, arguments.image_column)
        if question_column is not None:
            check_column(rows, place, "--question-column", question_column)
            _check_texts(rows, place, question_column)
        asked = [question] * len(rows) if question_column is None else rows[question_column][:]
        undecoded = _undecoded(rows, arguments.image_column)
        digests = image_digests(undecoded)
        self.numbers = [row for row, image in enumerate(digests) if image and (asked[row] or "").strip()]
        if not self.numbers:
            raise UserError(f"{place}, split {arguments.dataset_split}: no row has an image and a question.")
        if len(self.numbers) < len(rows):
            logger.warning(
                "%d of %d rows have no image or no question: left out", len(rows) - len(self.numbers), len(rows)
            )
        first: dict[str, int] = {}  # row of each image, by digest
        for row in self.numbers:
            first.setdefault(digests[row], row)
        number = {image: position for position, image in enumerate(first)}
        self.pictures = undecoded.select(list(first.values()))
        self.places = [f"{place}, row {row}: the image" for row in first.values()]
        self.images = [number[digests[row]] for row in self.numbers]
        self.questions = [str(asked[row]).strip() for row in self.numbers]
        self.source = {
            "--dataset": durable_name(arguments.dataset),
            "the images of --dataset (--dataset-config, --dataset-split, --image-column)": _hash(list(first)),
        }

    def text(self, given: Sequence[Given], arguments: AnswerArguments) -> str:
        """A line for each row of the set that has an image and a question."""
        header = ["Row", "Question", "Answer", *_added_names(arguments, "")]
        lines = zip(self.numbers, self.questions, given, strict=True)
        return _csv_text(header, ([row, question, *_cells(one, arguments)] for row, question, one in lines))


def _undecoded(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    rows = rows.select_columns([column])
    rows = rows if column == "image" else rows.rename_column(column, "image")
    return rows.cast_column("image", datasets.Image(decode=False))


def _check_texts(rows: datasets.Dataset, place: str, column: str) -> None:
    feature = rows.features[column]
    if not (isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")):
        raise UserError(f"{place}, column {column}: {feature}, it has to be texts.")


def _chosen(given: Sequence[Given], is_chosen: Sequence[bool]) -> list[Given]:
    return [one for one, chosen in zip(given, is_chosen, strict=True) if chosen]


def _added_names(arguments: AnswerArguments, number: str) -> list[str]:
    return [f"Confidence{number}", *([f"Abstained{number}"] if arguments.abstain_below is not None else [])]


def _cells(given: Given, arguments: AnswerArguments) -> list[str]:
    """The answer and what stands beside it; a withheld answer is there, and marked."""
    # Some versions of `csv` leave a lone carriage return without quotes, which then ends the row.
    text = given.text.replace("\r\n", "\n").replace("\r", "\n")
    marks = [] if arguments.abstain_below is None else ["yes" if arguments.abstains(given.confidence) else "no"]
    return [text, f"{given.confidence:.4f}", *marks]


def _csv_text(header: Sequence[str], rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# How it is answered --------------------------------------------------------------------------------------------------


class PictureFeatures:
    """
    What the projector reads of pictures, made when it is asked for, as at inference of one picture.

    Args:
        model, processor: of the VLM.
        picture (`Callable`): gives the picture of a row, RGB.
    """

    def __init__(self, model: Any, processor: SigPhiProcessor, picture: Callable[[int], Image.Image]) -> None:
        self._model, self._processor, self._picture = model, processor, picture

    @torch.no_grad()
    def __getitem__(self, rows: list[int]) -> torch.Tensor:
        """Of these rows, `(len(rows), num_image_tokens, feature_size)`; a picture that occurs twice is read once."""
        distinct = list(dict.fromkeys(rows))
        pictures = [self._picture(row) for row in distinct]
        pixels = self._processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self._model.device, self._model.model.vision_tower.dtype)
        features = self._model.model.get_vision_features(pixels)
        return features[[distinct.index(row) for row in rows]]


def _decoded(asked: Asked, row: int) -> Image.Image:
    try:
        return decode_picture(encoded_bytes(asked.pictures[row]["image"]))
    except (OSError, PictureError) as error:
        raise UserError(
            f"{asked.places[row]} cannot be decoded ({error}); mend or remove it, and give the same command."
        ) from error


def answer_to_file(model_name: str, asked: Asked, arguments: AnswerArguments) -> str:
    """
    Answer all questions and write the file when all are answered, whole or not at all.

    Until then the answers of finished batches lie in the folder `<output>.parts`, from which the same call goes on,
    whatever ended this one. `<output>.json` tells what the answers were made of.

    Args:
        model_name (`str`): the VLM, a folder or Hub id.
        asked (`Asked`): the questions.
        arguments (`AnswerArguments`): the options.

    Returns:
        `str`: one line about what was written.

    Raises:
        UserError: if the output exists and is of other questions or settings, if a question does not fit, or if a
            picture cannot be read.
    """
    assert arguments.output is not None
    output = Path(arguments.output)
    parts, record = (output.with_name(output.name + end) for end in (".parts", ".json"))
    config: Any = read_config(model_name, "MODEL", SigPhiConfig.model_type)
    with loading(f"MODEL {model_name}: its processor"):
        asking = AutoProcessor.from_pretrained(model_name, trust_remote_code=False)
    _check_questions(asked.questions, asking, config, arguments.max_new_tokens)
    if arguments.torch_compile:
        check_compilable(config)
    settings = _settings(model_name, asked, arguments)
    marks = {"--abstain-below": str(arguments.abstain_below)}
    if output.exists() and not parts.exists():
        _check_finished_run(output, record, settings | marks)
        return f"{output} is complete: nothing to do.\n"
    model, processor = load_vlm(model_name)
    features = PictureFeatures(model, processor, lambda row: _decoded(asked, row))
    given = generate_answers(
        model,
        processor,
        features,
        asked.images,
        asked.questions,
        arguments.batch_size,
        arguments.max_new_tokens,
        parts,
        arguments.torch_compile,
        log_settings=settings,
    )
    facts = {"questions": len(given), "settings": settings | marks, "environment": environment()}
    scratch = parts / "results.tmp"
    write_durably(record, json.dumps(facts, indent=2, ensure_ascii=False) + "\n", scratch)
    write_durably(output, asked.text(given, arguments), scratch)
    discard(parts)
    return _summary(output, asked, given, arguments)


def _settings(model_name: str, asked: Asked, arguments: AnswerArguments) -> dict[str, str]:
    """Everything that the answers depend on, by the names that the user knows."""
    return {
        "MODEL": durable_name(model_name),
        "the model's files": model_fingerprint(ModelSource(model_name)),
        **asked.source,
        "the questions": _hash([asked.questions, asked.images, asked.places]),
        "--batch-size": str(arguments.batch_size),
        "--max-new-tokens": str(arguments.max_new_tokens),
        "--torch-compile": str(arguments.torch_compile),
    }


def _check_finished_run(output: Path, record: Path, settings: dict[str, str]) -> None:
    recorded = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if recorded.get("settings") != settings:
        raise UserError(
            f"--output {output} exists, and was not made with these settings; remove it to make it anew, or give "
            "another name."
        )


def _check_questions(questions: Sequence[str], processor: Any, config: PreTrainedConfig, max_new_tokens: int) -> None:
    context = context_length(config.text_config)
    distinct = list(dict.fromkeys(questions))
    for question in distinct:
        if processor.image_token in question:
            raise UserError(
                f"the question {question[:60]!r} holds {processor.image_token}, which stands for the image; leave it "
                "out."
            )
    for question, prompt in zip(distinct, tokenize_questions(processor, distinct), strict=True):
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"the question {question[:60]!r} has {len(prompt)} tokens with its image, and the model reads "
                f"{context} with the answer's --max-new-tokens {max_new_tokens}: shorten it."
            )


def _summary(output: Path, asked: Asked, given: Sequence[Given], arguments: AnswerArguments) -> str:
    num_empty = sum(not one.text for one in given)
    if num_empty:
        logger.warning("%d of %d answers are empty", num_empty, len(given))
    line = f"{output}: {len(given)} questions about {len(set(asked.images))} images"
    if arguments.abstain_below is not None:
        withheld = sum(arguments.abstains(one.confidence) for one in given)
        line += f", {withheld} answers with less confidence than {arguments.abstain_below}"
    return line + "\n"


__all__ = [
    "Asked",
    "CsvQuestions",
    "DatasetQuestions",
    "PictureFeatures",
    "answer_to_file",
]
