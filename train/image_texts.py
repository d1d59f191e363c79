"""Images with texts from any `datasets` set: captions, alt texts, labels in words."""

import json
import logging
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetNotFoundError
from tqdm.auto import tqdm

from sigphi.train.collators import resize
from sigphi.train.data import held_out
from sigphi.train.errors import UserError
from sigphi.train.fingerprints import digest
from sigphi.train.images import LOADING_ERRORS, why_not_loaded
from sigphi.train.pictures import PictureError, decode_picture, encoded_bytes

logger = logging.getLogger(__name__)

_DECODED_AT_ONCE = 1024


def load_image_texts(
    source: str,
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    text_column: str = "text",
) -> datasets.Dataset:
    """
    One row an image with all its texts.

    Rows whose images are the same file, byte for byte, are one image. Rows without an image or a text are left out,
    with a warning that counts them.

    Args:
        source (`str`): a Hub id, a folder that `datasets.load_dataset` reads (parquet files, or pictures with a
            `metadata.csv`), or one that `Dataset.save_to_disk` wrote.
        config (`str`, *optional*): the configuration of a set that has several.
        split (`str`, *optional*, defaults to `"train"`): the split to read.
        image_column (`str`, *optional*, defaults to `"image"`): a column of `datasets.Image`.
        text_column (`str`, *optional*, defaults to `"text"`): a column of texts, or of lists of texts.

    Returns:
        `datasets.Dataset`: the columns `image` (`datasets.Image`), `texts` (`list[str]`, stripped of white space) and
        `digest` (`str`, of the image's file), in the order of the set.

    Raises:
        UserError: if there is no such set, configuration, split or column, a column holds something else, no row has
            an image and a text, or the Hub cannot be reached.
    """
    rows = _checked_columns(read_set(source, config, split), f"--dataset {source}", image_column, text_column)
    digests = image_digests(rows)
    first: dict[str, int] = {}  # row of each image, by digest
    texts_of: dict[str, list[str]] = {}
    num_bad = 0
    for row, (image, text) in enumerate(zip(digests, rows["text"], strict=True)):
        texts = _cleaned(text)
        num_bad += not (image and texts)
        if image and texts:
            first.setdefault(image, row)
            texts_of.setdefault(image, []).extend(texts)
    if not first:
        raise UserError(f"--dataset {source}, split {split}: no row has both an image and a text.")
    if num_bad:
        logger.warning("%d of %d rows of %s have no image or no text: left out", num_bad, len(rows), source)
    images = rows.select_columns(["image"]).select(list(first.values()))
    columns = datasets.Dataset.from_dict({"texts": list(texts_of.values()), "digest": list(first)})
    return datasets.concatenate_datasets([images, columns], axis=1)


def read_set(source: str, config: str | None = None, split: str = "train") -> datasets.Dataset:
    """
    One split of any set; arguments and errors as of [`load_image_texts`].
    """
    try:
        if Path(source, "state.json").exists():
            return datasets.load_from_disk(source)
        is_saved = Path(source, "dataset_dict.json").exists()
        splits = datasets.load_from_disk(source) if is_saved else datasets.load_dataset(source, config)
    except DatasetNotFoundError as error:
        raise UserError(
            f"--dataset {source}: there is no such folder, and no set of this id on the Hub that you can read."
        ) from error
    except LOADING_ERRORS as error:
        raise UserError(f"--dataset {source}: it cannot be loaded ({why_not_loaded(error)}).") from error
    if split not in splits:
        raise UserError(f"--dataset {source} has no split {split!r}; give --dataset-split one of {', '.join(splits)}.")
    return splits[split]


def check_image_column(rows: datasets.Dataset, place: str, image_column: str) -> None:
    """Raise a [`UserError`] unless `rows`, read from `place`, has such a column of `datasets.Image`."""
    check_column(rows, place, "--image-column", image_column)
    if not isinstance(rows.features[image_column], datasets.Image):
        raise UserError(f"{place}, column {image_column}: {rows.features[image_column]}, it has to be images.")


def check_column(rows: datasets.Dataset, place: str, option: str, name: str) -> None:
    """Raise a [`UserError`] unless there is a column `name`, which `option` has named."""
    if name not in rows.column_names:
        raise UserError(f"{place} has no column {name!r}; give {option} one of {', '.join(rows.column_names)}.")


def _checked_columns(rows: datasets.Dataset, place: str, image_column: str, text_column: str) -> datasets.Dataset:
    """The columns `image`, as files, and `text`."""
    check_image_column(rows, place, image_column)
    check_column(rows, place, "--text-column", text_column)
    text = rows.features[text_column]
    value = text.feature if isinstance(text, (datasets.List, datasets.LargeList)) else text
    if not (isinstance(value, datasets.Value) and value.dtype in ("string", "large_string")):
        raise UserError(f"{place}, column {text_column}: {text}, it has to be texts or lists of texts.")
    rows = rows.select_columns([image_column, text_column])
    rows = rows.rename_columns({image_column: "image", text_column: "text"})
    return rows.cast_column("image", datasets.Image(decode=False))


def image_digests(rows: datasets.Dataset) -> list[str]:
    """A hash over the file of each image of the column `image`, which is not decoded; empty where there is none."""
    return rows.select_columns(["image"]).map(
        _digest, remove_columns=["image"], keep_in_memory=True, desc="reading images"
    )["digest"][:]


def _digest(row: dict[str, Any]) -> dict[str, str]:
    image = row["image"]
    if image is None or (image["bytes"] is None and image["path"] is None):
        return {"digest": ""}
    return {"digest": blake2b(encoded_bytes(image), digest_size=16).hexdigest()}


def _cleaned(texts: str | Sequence[str | None] | None) -> list[str]:
    several = [texts] if isinstance(texts, str) else texts or []
    return [text.strip() for text in several if text is not None and text.strip()]


def hold_out(rows: datasets.Dataset, eval_fraction: float, seed: int) -> datasets.DatasetDict:
    """
    Split by image, whatever the order and number of rows: an image falls into the same part in every set.

    Args:
        rows (`datasets.Dataset`): of [`load_image_texts`].
        eval_fraction (`float`): share of the images in `"eval"`, which is missing where none is held out.
        seed (`int`): of the hash that decides.

    Raises:
        UserError: if no image is left to train on, or none is held out although some should be.
    """
    is_eval = np.array([held_out(int(image, 16), "", eval_fraction, seed) for image in rows["digest"]])
    parts = {"train": np.flatnonzero(~is_eval)} | ({"eval": np.flatnonzero(is_eval)} if eval_fraction > 0 else {})
    for name, positions in parts.items():
        if len(positions) == 0:
            raise UserError(f"--eval-fraction {eval_fraction} leaves no image for {name}: there are {len(rows)}.")
    return datasets.DatasetDict({name: rows.select(positions) for name, positions in parts.items()})


def pairs_facts(rows: datasets.Dataset) -> dict[str, Any]:
    """
    What was trained on, to be written beside the model as JSON, as [`data_facts`] of a CSV.

    Args:
        rows (`datasets.Dataset`): a part of [`hold_out`].

    Returns:
        `dict`: `fingerprint` (sha256 over the digest and the texts of every row, in order), `num_images` and
        `num_texts`; `images_per_split` is empty, because they are of none of CIFAR-10's.
    """
    texts = rows["texts"][:]
    lines = (json.dumps([image, own]).encode() + b"\n" for image, own in zip(rows["digest"], texts, strict=True))
    num_texts = sum(map(len, texts))
    return {"fingerprint": digest(lines), "num_images": len(rows), "num_texts": num_texts, "images_per_split": {}}


class StoredImages:
    """
    The images of a data set in the size of a model, decoded whenever they are asked for; of any mode, see [`to_rgb`].

    Args:
        images (`datasets.Dataset`): with a column `image`.
        image_processor (`SiglipImageProcessor`): of the model.

    Raises:
        UserError: if an image that is asked for cannot be decoded.
    """

    def __init__(self, images: datasets.Dataset, image_processor: Any) -> None:
        self._images = images.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        self._image_processor = image_processor

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """The images of these rows, as a `torch.ByteTensor` of shape `(len(indices), 3, size, size)`."""
        rows = indices.tolist()
        files = self._images[rows]["image"]
        return resize(self._image_processor, [self._decoded(*item) for item in zip(rows, files, strict=True)])

    def _decoded(self, row: int, file: dict[str, Any]) -> torch.Tensor:
        """`(3, height, width)`, uint8, in the size of the file."""
        try:
            picture = decode_picture(encoded_bytes(file))
        except (OSError, PictureError) as error:
            raise UserError(f"image {row} of the training and held-out images cannot be decoded ({error}).") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)

    def all(self) -> torch.Tensor:
        """All images in memory, see `__getitem__`."""
        parts = torch.arange(len(self)).split(_DECODED_AT_ONCE)
        return torch.cat([self[part] for part in tqdm(parts, desc="decoding images", disable=None, leave=False)])


__all__ = [
    "StoredImages",
    "check_column",
    "check_image_column",
    "hold_out",
    "image_digests",
    "load_image_texts",
    "pairs_facts",
    "read_set",
]
