"""What can be wrong with the header of a CSV, and with the image that a row is about."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from sigphi.train.check_report import Findings
from sigphi.train.csv_lines import MOST_COLUMNS
from sigphi.train.facts import CLASS_NAMES
from sigphi.train.images import load_images
from sigphi.train.judging import is_correct
from sigphi.train.lenient_csv import read_header
from sigphi.train.qa_csv import IMAGE_SPLITS, OPTIONAL_COLUMNS, REQUIRED_COLUMNS, parse_indices

# The empty one stands for a split that is not known.
_SPLITS = (*IMAGE_SPLITS, "")
# Split and index of an image -> the first line that asks about it.
Lines = dict[tuple[str, int], int]

# What `Dataset_Index` counts in where no images are given.
_CIFAR10_SIZES = {"train": 50_000, "test": 10_000}


class ImageSets:
    """The class names of the images of each split.

    Args:
        source (`str`, *optional*): see [`load_images`]; without it there are as many images as in CIFAR-10, unnamed.
    """

    def __init__(self, source: str | None) -> None:
        self.source = source
        self._class_names: dict[str, np.ndarray] = {}

    def class_names(self, split: str) -> np.ndarray:
        """An array of `str`, one an image of `split`, which is one of `IMAGE_SPLITS`."""
        if split not in self._class_names:
            self._class_names[split] = self._load(split)
        return self._class_names[split]

    def _load(self, split: str) -> np.ndarray:
        if self.source is None:
            return np.full(_CIFAR10_SIZES[split], "", dtype=object)
        return np.array(CLASS_NAMES, dtype=object)[load_images(self.source, split)["label"][:]]


def check_header(path: Path, image_split: str | None, findings: Findings) -> None:
    """Report columns that are missing or there twice."""
    header = read_header(path)
    if len(header) > MOST_COLUMNS:
        findings.add("too many columns", "line 1", f"the header has {len(header)} columns")
    shown = ", ".join(header)[:300]
    for name in REQUIRED_COLUMNS:
        if name not in header:
            findings.add("missing column", name, f"the header has {shown or 'no column'}")
    for name in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS):
        if header.count(name) > 1:
            findings.add("repeated column", name, f"{header.count(name)} columns are named {name}")
    if "Split" not in header and image_split is None:
        findings.add("unknown split", "line 1", "there is no column Split")


def locate_images(
    table: pd.DataFrame, image_sets: ImageSets, image_split: str | None, findings: Findings
) -> pd.DataFrame:
    """Find the image of each row, and report rows for which there is none or one of another class.

    Args:
        table (`pandas.DataFrame`): of [`read_tables`].
        image_sets (`ImageSets`): the images.
        image_split (`str`, *optional*): the split of a file without the column `Split`.
        findings (`Findings`): gets the problems.

    Returns:
        `pandas.DataFrame`: `table` with `Split` (str, empty where it is unknown), `Dataset_Index` (int64, -1 where it
        is bad) and `class_name` (str, empty where it is unknown).
    """
    splits = _checked_splits(table, image_split, findings)
    indices = _checked_indices(table, splits, image_sets, findings)
    class_names = np.full(len(table), "", dtype=object)
    for split in IMAGE_SPLITS:
        rows = np.flatnonzero((splits == split) & (indices >= 0))
        if len(rows):
            class_names[rows] = image_sets.class_names(split)[indices.iloc[rows]]
    if "Class_Label" in table:
        given = table["Class_Label"].map(_class_of).to_numpy()
        if image_sets.source is None:
            class_names = given
        else:
            is_wrong = (given != class_names) & (class_names != "") & (table["Class_Label"] != "")
            _report_wrong_labels(table[is_wrong], class_names[is_wrong], findings)
    return table.assign(Split=splits, Dataset_Index=indices, class_name=pd.Series(class_names, dtype=str))


def image_numbers(splits: pd.Series, indices: pd.Series) -> np.ndarray:
    """An int64 for each image of [`locate_images`], negative where its index is not known."""
    of_split = pd.Categorical(splits, categories=_SPLITS).codes
    return (indices * len(_SPLITS) + of_split).to_numpy(np.int64)


def first_lines(images: np.ndarray, lines: np.ndarray) -> Lines:
    """The first line of each image of which both split and index are known.

    Args:
        images (`np.ndarray` of shape `(num_rows,)`, int64): of [`image_numbers`].
        lines (`np.ndarray` of shape `(num_rows,)`): ascending.
    """
    distinct, first = np.unique(images, return_index=True)
    indices, splits = np.divmod(distinct, len(_SPLITS))
    places = zip(splits.tolist(), indices.tolist(), lines[first].tolist(), strict=True)
    return {(_SPLITS[split], index): line for split, index, line in places if index >= 0 and _SPLITS[split]}


def _checked_splits(table: pd.DataFrame, image_split: str | None, findings: Findings) -> pd.Series:
    if "Split" not in table:
        return pd.Series(image_split or "", index=table.index, dtype=str)
    allowed = IMAGE_SPLITS if image_split is None else (image_split,)
    bad = table[~table["Split"].isin(allowed)]
    if not bad.empty:
        example = f"{bad['Split'].iloc[0]!r}, but --image-split says {image_split}"
        _report(findings, "bad split", bad, "Split", example if image_split else repr(bad["Split"].iloc[0]))
    return table["Split"].where(table["Split"].isin(IMAGE_SPLITS), "")


def _checked_indices(table: pd.DataFrame, splits: pd.Series, image_sets: ImageSets, findings: Findings) -> pd.Series:
    if "Dataset_Index" not in table:
        return pd.Series(-1, index=table.index)
    indices = parse_indices(table["Dataset_Index"])
    sizes = {split: len(image_sets.class_names(split)) for split in splits.unique() if split}
    is_bad = (indices < 0) | (indices >= splits.map(sizes))
    if is_bad.any():
        first, split = table["Dataset_Index"][is_bad].iloc[0], splits[is_bad].iloc[0]
        of_split = f"of the {split} split, which has {sizes[split]} images: 0 to {sizes[split] - 1}" if split else ""
        _report(findings, "bad index", table[is_bad], "Dataset_Index", f"{first!r} is no row {of_split}")
    return indices.where(~is_bad, -1)


def _report_wrong_labels(rows: pd.DataFrame, class_names: np.ndarray, findings: Findings) -> None:
    if not rows.empty:
        example = f"{rows['Class_Label'].iloc[0]!r}, but the image is of class {class_names[0]}"
        _report(findings, "wrong Class_Label", rows, "Class_Label", example)


def _report(findings: Findings, kind: str, rows: pd.DataFrame, column: str, example: str) -> None:
    findings.add_all(kind, len(rows), (f"line {line} column {column}" for line in rows["line"]), example)


@lru_cache(maxsize=1000)
def _class_of(text: str) -> str:
    """The class that a name, such as "Cat" or "kitten", or an index means, or an empty text."""
    if text in map(str, range(len(CLASS_NAMES))):
        return CLASS_NAMES[int(text)]
    return next((name for name in CLASS_NAMES if is_correct(text, name, "object")), "")


__all__ = ["ImageSets", "Lines", "check_header", "first_lines", "image_numbers", "locate_images"]
