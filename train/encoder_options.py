"""The options of `sigphi evaluate` for an encoder, and the labels that they name: for probes, and by people."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from transformers.hf_argparser import HfArg

from sigphi.train.errors import UserError
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.records import durable_name


@dataclass
class EncoderEvaluationArguments:
    """What an encoder is compared with beside the CSV."""

    _argument_group_name = "evaluation of an encoder"

    probe_images: str | None = HfArg(
        help="Labelled images that kNN and linear probe are fitted on, in the forms of --images; by default those "
        "of --images.",
        default=None,
    )
    probe_split: str = HfArg(help="Split of these images; any that are evaluated are left out.", default="train")
    probe_size: int = HfArg(
        help="Fit on so many of them at most, drawn at random; 0: no such figures.", default=10_000
    )
    human_labels: str | None = HfArg(
        help="Parquet file with the labels that people gave to the test images (columns label, human_counts).",
        default=None,
    )

    def __post_init__(self) -> None:
        if self.probe_size < 0:
            raise UserError(f"--probe-size has to be at least 0, got {self.probe_size}.")


def encoder_options(arguments: EncoderEvaluationArguments, dataset: datasets.Dataset, images: str) -> dict[str, Any]:
    """
    What the options of a command add to the arguments of `evaluate_folder`: `probe` and `human_counts` of
    [`evaluate_encoder`], and where they come from as `notes`.

    Args:
        arguments (`EncoderEvaluationArguments`): the options.
        dataset (`datasets.Dataset`): what will be evaluated.
        images (`str`): where its images come from.

    Raises:
        UserError: if the images or labels cannot be read, or do not go with `dataset`.
    """
    notes: dict[str, str] = {}
    options: dict[str, Any] = {"notes": notes}
    if arguments.human_labels is not None:
        options["human_counts"] = read_human_labels(arguments.human_labels, dataset)
        notes["human_labels"] = durable_name(arguments.human_labels)
    if arguments.probe_size > 0:
        source, split = arguments.probe_images or images, arguments.probe_split
        options["probe"] = probe_images(source, split, arguments.probe_size, dataset)
        notes["probe"] = f"{durable_name(source)}, split {split}"
    return options


def probe_images(source: str, split: str, size: int, dataset: datasets.Dataset, seed: int = 0) -> datasets.Dataset:
    """
    Labelled images to fit a classifier on, none of which is evaluated.

    Args:
        source, split (`str`): see [`load_images`].
        size (`int`): how many to draw; all when there are fewer.
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`]. What has the same split and index as an image of
            it is left out, also when `source` is another copy.
        seed (`int`, *optional*, defaults to 0): of the draw.

    Raises:
        UserError: if the images cannot be loaded, or none is left.
    """
    place = f"--probe-images {source} --probe-split {split}"
    try:
        images = load_images(source, split)
    except UserError as error:
        reason = str(error).replace("--image-split", "--probe-split")
        raise UserError(f"{place}: {reason}\n--probe-size 0 does without kNN and linear probe.") from error
    keys = zip(dataset["split"], dataset["dataset_index"], strict=True)
    evaluated = {index for evaluated_split, index in keys if evaluated_split == split}
    left = [index for index in range(len(images)) if index not in evaluated]
    if not left:
        raise UserError(f"{place}: all its images are evaluated; give another split, or --probe-size 0.")
    return sample_images(images.select(left), size, seed)


def sample_images(images: datasets.Dataset, size: int, seed: int = 0) -> datasets.Dataset:
    """A random `size` of `images` in their order; all of them when there are fewer."""
    return images.select(np.sort(np.random.default_rng(seed).permutation(len(images))[:size]))


def read_human_labels(path: str, dataset: datasets.Dataset) -> torch.Tensor:
    """
    How many people chose each class, for the test images behind `dataset`.

    Args:
        path (`str`): a Parquet file in the order of CIFAR-10's test split, as of CIFAR-10H, with the columns `label`
            and `human_counts` (ten numbers a row).
        dataset (`datasets.Dataset`): a split of [`load_cifar10_qa`].

    Returns:
        `torch.Tensor` of shape `(images, 10)`, float64: a row for each image, in the order of [`distinct_images`].

    Raises:
        UserError: if the file is not of this form, or `dataset` holds images that it does not describe.
    """
    counts, labels = _human_table(path)
    images = dataset.select_columns(["split", "dataset_index", "label"]).to_pandas().drop_duplicates()
    others = images[images["split"] != "test"]
    if not others.empty:
        raise UserError(
            f"--human-labels {path} is about the test split, but image {others.iloc[0]['dataset_index']} of split "
            f"{others.iloc[0]['split']} is to be evaluated; give a CSV of test images, or leave the option out."
        )
    for index, label in zip(images["dataset_index"], images["label"], strict=True):
        told = labels[index] if index < len(labels) else "missing"
        if told != label:
            raise UserError(
                f"--human-labels {path}, row {index}: the label is {told}, but that of test image {index} is {label} "
                f"({CLASS_NAMES[label]}); the file has to follow the order of CIFAR-10's test split."
            )
    return torch.from_numpy(counts[images["dataset_index"].to_numpy()])


def _human_table(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Counts `(rows, 10)`, float64, and labels `(rows,)` of a file of human labels."""
    if not Path(path).is_file():
        raise UserError(f"--human-labels {path}: there is no such file.")
    try:
        table = pd.read_parquet(path, columns=["label", "human_counts"])
        counts = np.array(table["human_counts"].tolist(), dtype=np.float64)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--human-labels {path} cannot be read ({reason}); it has to be a Parquet file with the columns label and "
            f"human_counts."
        ) from error
    if counts.ndim != 2 or counts.shape[1] != len(CLASS_NAMES):
        raise UserError(f"--human-labels {path}: human_counts has to hold {len(CLASS_NAMES)} numbers in each row.")
    bad = np.flatnonzero(~((counts >= 0).all(1) & (counts.sum(1) > 0) & np.isfinite(counts.sum(1))))
    if bad.size:
        raise UserError(
            f"--human-labels {path}, row {bad[0]}: human_counts is {counts[bad[0]].tolist()}; these have to be "
            "numbers of people, at least one in all."
        )
    return counts, table["label"].to_numpy()


__all__ = ["EncoderEvaluationArguments", "encoder_options", "probe_images", "read_human_labels", "sample_images"]
