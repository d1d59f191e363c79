"""What an encoder is trained on: images with all their texts, from a CSV or from any `datasets` set."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import psutil

from sigphi.train.arguments import EncoderDataArguments
from sigphi.train.collators import Images
from sigphi.train.data import distinct_images, load_data
from sigphi.train.errors import UserError
from sigphi.train.image_texts import StoredImages, hold_out, load_image_texts
from sigphi.train.judging import known_facts, stated_fact


@dataclass(frozen=True)
class EncoderData:
    """
    Rows for [`SiglipCollator`], and their images.

    Args:
        rows (`datasets.DatasetDict`): `"train"`, and `"eval"` where images are held out. A row is an image, with
            `image_index` (`int`), `texts`, `facts` (what each text states), `known` (all that the texts state of the
            image; list of `str` each), and `label` (`int`) where the source is a CSV.
        images (`torch.ByteTensor` of shape `(images, 3, size, size)`, or `StoredImages`): what `image_index` counts.
        source (`datasets.DatasetDict`): the parts of [`load_data`] or [`hold_out`] that the rows were made of.
    """

    rows: datasets.DatasetDict
    images: Images
    source: datasets.DatasetDict

    def texts(self) -> Iterator[str]:
        """All texts of all rows."""
        return (text for rows in self.rows.values() for texts in rows["texts"] for text in texts)


def load_encoder_data(arguments: EncoderDataArguments, image_processor: Any) -> EncoderData:
    """
    The data that the options name, split by image.

    Args:
        arguments (`EncoderDataArguments`): the options.
        image_processor (`SiglipImageProcessor`): of the model, whose size the images get.

    Raises:
        UserError: if the data cannot be read or are not sound, or the images do not fit in memory.
    """
    source, make_rows = encoder_source(arguments)
    rows, pictures, start = datasets.DatasetDict(), [], 0
    for name, part in source.items():
        texts, images = make_rows(part)
        rows[name] = texts.add_column("image_index", list(range(start, start + len(texts))))
        pictures.append(images)
        start += len(texts)
    stored = StoredImages(datasets.concatenate_datasets(pictures), image_processor)
    if arguments.image_store == "arrow":
        return EncoderData(rows, stored, source)
    _check_memory(len(stored), image_processor.size)
    return EncoderData(rows, stored.all(), source)


def encoder_source(arguments: EncoderDataArguments) -> tuple[datasets.DatasetDict, Any]:
    """The parts that the options name, and the function of [`qa_rows`] and [`text_rows`] that reads one of them."""
    if arguments.dataset is None:
        return load_data(arguments), qa_rows
    pairs = load_image_texts(
        arguments.dataset,
        arguments.dataset_config,
        arguments.dataset_split,
        arguments.image_column,
        arguments.text_column,
    )
    return hold_out(pairs, arguments.eval_fraction, arguments.split_seed), text_rows


def qa_rows(part: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    One row an image with all its answers.

    Args:
        part (`datasets.Dataset`): a split of [`load_cifar10_qa`].

    Returns:
        `tuple`: rows of [`EncoderData`], and a `datasets.Dataset` with the column `image`, in one order.
    """
    images, positions = distinct_images(part)
    texts, facts = defaultdict(list), defaultdict(list)
    known: defaultdict[int, set[str]] = defaultdict(set)
    columns = (positions, part["answer"], part["question_type"], part["short_answer"])
    for position, answer, question_type, short_answer in zip(*columns, strict=True):
        texts[position].append(answer)
        facts[position].append(stated_fact(answer, question_type, short_answer))
        known[position] |= known_facts(answer, question_type, short_answer)
    rows = {
        "texts": [texts[position] for position in range(len(images))],
        "facts": [facts[position] for position in range(len(images))],
        "known": [sorted(known[position]) for position in range(len(images))],
        "label": images["label"],
    }
    return datasets.Dataset.from_dict(rows), images.select_columns(["img"]).rename_column("img", "image")


def text_rows(part: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    As [`qa_rows`], of a part of [`hold_out`]: nothing is known of its texts but whether they are equal.
    """
    texts = part["texts"][:]
    rows = {"texts": texts, "facts": [[""] * len(some) for some in texts], "known": [[]] * len(texts)}
    features = {name: datasets.List(datasets.Value("string")) for name in rows}
    return datasets.Dataset.from_dict(rows, datasets.Features(features)), part.select_columns(["image"])


def _check_memory(num_images: int, size: dict[str, int]) -> None:
    needed, free = 3 * num_images * size["height"] * size["width"], psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--image-store memory: {num_images} images of {size['width']}x{size['height']} pixels take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; use --image-store arrow."
        )


__all__ = ["EncoderData", "encoder_source", "load_encoder_data", "qa_rows", "text_rows"]
