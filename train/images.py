"""CIFAR-10 and sets like it: from the Hub, from a local folder, or drawn in code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from sigphi.train.errors import UserError, printable
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.pictures import PictureError, decode_picture, encoded_bytes
from sigphi.train.synthetic import IMAGE_FEATURES, synthetic_images

_SYNTHETIC_SIZES = {"train": 4000, "test": 1000}
_TORCHVISION_FOLDER = "cifar-10-batches-py"
# What `datasets` raises for a set whose card has values of other types than it should.
_TYPE_ERRORS = (TypeError, AttributeError, KeyError)
# What it raises for a set that it cannot load.
LOADING_ERRORS = (OSError, ValueError, DatasetsError, yaml.YAMLError, *_TYPE_ERRORS)


def load_images(source: str, split: str) -> datasets.Dataset:
    """Load one split of an image set with the schema of CIFAR-10.

    Args:
        source (`str`): one of

            - a folder that `datasets.load_dataset` reads, such as one with parquet files, or with a folder of
              pictures for each class. It has the columns `img` (or `image`) and `label`;
            - torchvision's download folder, the one that contains `cifar-10-batches-py`;
            - the id of a set on the Hub in the same schema, such as `"uoft-cs/cifar10"`;
            - `"synthetic"`: 4000 train and 1000 test pictures of [`synthetic_images`], drawn on the spot;
              `"synthetic:8000"` draws 8000 train pictures instead.
        split (`str`): `"train"`, `"test"`, or another name that the set has.

    Returns:
        `datasets.Dataset`: the columns `img` (`datasets.Image`) and `label` (`ClassLabel` with the names of CIFAR-10),
        in the order of the set.

    Raises:
        UserError: if there is no such source, split or column, or if the Hub cannot be reached.

    Example:

    ```python
    >>> load_images("synthetic", "test").features["label"].names[:3]
    ['airplane', 'automobile', 'bird']
    ```
    """
    if source.split(":")[0] == "synthetic":
        return _load_synthetic(source, split)
    if (Path(source) / _TORCHVISION_FOLDER).is_dir():
        return _load_torchvision(source, split)
    splits = _load_folder(source) if Path(source).is_dir() else _load_from_hub(source)
    if split not in splits:
        raise _missing_split(source, split, splits)
    return _in_schema(splits[split], f"{source}, split {split}")


def _missing_split(source: str, split: str, known: Sequence[str] | datasets.DatasetDict) -> UserError:
    return UserError(f"images {source!r} have no split {split!r}; give --image-split one of {', '.join(known)}.")


def _load_synthetic(source: str, split: str) -> datasets.Dataset:
    size = re.fullmatch(r"synthetic(?::([1-9]\d*))?", source)
    if size is None:
        raise UserError(f"images {source!r}: write 'synthetic', or 'synthetic:8000' for 8000 train pictures.")
    sizes = _SYNTHETIC_SIZES | ({"train": int(size[1])} if size[1] else {})
    if split not in sizes:
        raise _missing_split(source, split, list(sizes))
    name: Literal["train", "test"] = "train" if split == "train" else "test"
    return synthetic_images(name, sizes[split])


def _load_torchvision(source: str, split: str) -> datasets.Dataset:
    from torchvision.datasets import CIFAR10

    if split not in ("train", "test"):
        raise _missing_split(source, split, ("train", "test"))
    try:
        cifar = CIFAR10(source, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(
            f"images {source!r}: the files in {_TORCHVISION_FOLDER} are not whole; download them again."
        ) from error
    pictures = [datasets.Image().encode_example(pixels) for pixels in cifar.data]
    return datasets.Dataset.from_dict({"img": pictures, "label": cifar.targets}, features=IMAGE_FEATURES)


def _load_folder(source: str) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source)
    except LOADING_ERRORS as error:
        raise UserError(
            f"images {source!r}: `datasets.load_dataset` cannot read this folder ({why_not_loaded(error)}); "
            f"give one with parquet files in the schema of uoft-cs/cifar10, or one with {_TORCHVISION_FOLDER}."
        ) from error


def _load_from_hub(source: str) -> datasets.DatasetDict:
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is None:
        raise UserError(
            f"images {source!r}: there is no such folder, and a set on the Hub has an id like 'uoft-cs/cifar10'; "
            "'synthetic' needs neither."
        )
    try:
        return datasets.load_dataset(source)
    except DatasetNotFoundError as error:
        raise UserError(
            f"images {source!r}: there is no such folder, and no set of this id on the Hub that you can read."
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"images {source!r}: there is no such folder, and the Hub cannot be reached; "
            "give a local folder with the images, or 'synthetic'."
        ) from error
    except LOADING_ERRORS as error:
        raise UserError(f"images {source!r}: this set cannot be loaded ({why_not_loaded(error)}).") from error


def why_not_loaded(error: Exception) -> str:
    """The reason in one of `LOADING_ERRORS`, on one line."""
    if isinstance(error, yaml.YAMLError):
        return f"the YAML at the head of its README.md is broken: {printable(str(error))[:200].rstrip('.')}"
    if isinstance(error, _TYPE_ERRORS):
        return f"does the head of its README.md hold what it should? {type(error).__name__}: {error}"
    return str(error).strip().split("\n")[0].rstrip(".")


def _in_schema(images: datasets.Dataset, place: str) -> datasets.Dataset:
    if "img" not in images.column_names and "image" in images.column_names:
        images = images.rename_column("image", "img")
    missing = [name for name in ("img", "label") if name not in images.column_names]
    if missing:
        raise UserError(
            f"images {place}: no column {' and '.join(missing)}, only {', '.join(images.column_names)}; "
            "the schema is that of uoft-cs/cifar10: img, label."
        )
    images = images.select_columns(["img", "label"])
    _check_features(images.features, place)
    if images.features != IMAGE_FEATURES:
        images = _with_class_names(images, place)
    _check_labels(images, place)
    return images


def _check_features(features: datasets.Features, place: str) -> None:
    if not isinstance(features["img"], datasets.Image):
        raise UserError(f"images {place}: column img holds {features['img']}, it has to be a `datasets.Image`.")
    label = features["label"]
    if isinstance(label, datasets.ClassLabel) and tuple(label.names) != CLASS_NAMES:
        names = ", ".join(label.names[:10]) + (", ..." if len(label.names) > 10 else "")
        raise UserError(f"images {place}: the classes are {names}; they have to be those of CIFAR-10, in its order.")


def _with_class_names(images: datasets.Dataset, place: str) -> datasets.Dataset:
    try:
        return images.cast(IMAGE_FEATURES)
    except (ValueError, TypeError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(
            f"images {place}: column label has to hold the class names or indices of CIFAR-10 ({reason})."
        ) from error


def _check_labels(images: datasets.Dataset, place: str) -> None:
    # A cast to ClassLabel lets integers out of range pass, and unlabelled sets hold -1.
    labels = images.select_columns(["label"]).to_pandas()["label"]
    bad = labels[~labels.between(0, len(CLASS_NAMES) - 1)]
    if not bad.empty:
        raise UserError(
            f"images {place}, row {bad.index[0]}: label {bad.iloc[0]} is no class index of CIFAR-10, those are 0 to 9."
        )


def decode_images(images: datasets.Dataset, indices: Sequence[int]) -> torch.Tensor:
    """Decode images, each one once however often its index occurs.

    Args:
        images (`datasets.Dataset`): with a column `img`, as of [`load_images`].
        indices (`Sequence[int]`): rows of `images`, in any order, with repeats, at least one.

    Returns:
        `torch.Tensor` of shape `(len(indices), 3, height, width)`, uint8: RGB, see [`decode_picture`].

    Raises:
        UserError: if an image cannot be decoded, or the images differ in size.
        ValueError: if there are no indices.
    """
    if len(indices) == 0:
        raise ValueError("`indices` has to hold at least one row: without an image there is no size.")
    distinct, position = np.unique(np.asarray(indices), return_inverse=True)
    encoded = images.select_columns(["img"]).cast_column("img", datasets.Image(decode=False)).select(distinct)
    decoded: list[np.ndarray] = []
    for index, row in zip(distinct, encoded, strict=True):
        pixels = _decoded(index, row["img"])  # (height, width, 3)
        if decoded and pixels.shape != decoded[0].shape:
            raise UserError(
                f"image {index} is {pixels.shape[1]}x{pixels.shape[0]} pixels, image {distinct[0]} is "
                f"{decoded[0].shape[1]}x{decoded[0].shape[0]}; resize them to one size first."
            )
        decoded.append(pixels)
    return torch.from_numpy(np.stack(decoded)[position]).permute(0, 3, 1, 2).contiguous()


def _decoded(index: int, cell: dict[str, Any] | None) -> np.ndarray:
    try:
        return np.asarray(decode_picture(encoded_bytes(cell)))
    except (OSError, PictureError) as error:
        raise UserError(f"image {index} cannot be decoded ({error}); mend or remove it.") from error


__all__ = ["LOADING_ERRORS", "decode_images", "load_images", "why_not_loaded"]
