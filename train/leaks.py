"""Images of the evaluation that training sees too, themselves or as a near duplicate."""

from pathlib import Path

import numpy as np
import torch

from sigphi.train.check_report import Findings
from sigphi.train.errors import UserError
from sigphi.train.images import load_images
from sigphi.train.lenient_csv import read_header, read_tables
from sigphi.train.near_duplicates import near_duplicates, small_pictures
from sigphi.train.qa_csv import IMAGE_SPLITS
from sigphi.train.row_checks import ImageSets, Lines, first_lines, image_numbers, locate_images


def lines_of_evaluation(path: Path, image_sets: ImageSets, image_split: str | None) -> Lines:
    """The images of the CSV of the evaluation, whatever else may be wrong with it.

    Args:
        path (`Path`): the CSV.
        image_sets (`ImageSets`): what its indices count in.
        image_split (`str`, *optional*): the split of a file without the column `Split`.

    Raises:
        UserError: if it names no image.
    """
    header = read_header(path)
    if "Split" not in header and image_split is None:
        raise UserError(f"--eval-csv {path} has no column Split; give --image-split train or --image-split test.")
    images, lines_of_rows = [], []
    ignored = Findings(max_places=0)
    for table in read_tables(path, ("Dataset_Index", "Split"), ignored.add):
        located = locate_images(table, image_sets, None if "Split" in header else image_split, ignored)
        images.append(image_numbers(located["Split"], located["Dataset_Index"]))
        lines_of_rows.append(located["line"].to_numpy())
    lines = first_lines(np.concatenate(images), np.concatenate(lines_of_rows)) if images else {}
    if not lines:
        raise UserError(f"--eval-csv {path} names no image; see `sigphi data check {path}`.")
    return lines


def report_shared_images(learned: Lines, tested: Lines, eval_csv: str | Path, findings: Findings) -> None:
    """Report the images that are in the CSV and in `eval_csv`."""
    shared = sorted((image for image in learned if image in tested), key=learned.__getitem__)
    if shared:
        split, index = shared[0]
        example = f"{split} image {index} is in line {tested[shared[0]]} of {eval_csv} too"
        findings.add_all("image in both files", len(shared), (f"line {learned[image]}" for image in shared), example)


def report_near_duplicates(learned: Lines, tested: Lines, of_file: str, source: str, findings: Findings) -> None:
    """Report the pairs of [`near_duplicates`] of two different images, one of `learned` and one of `tested`.

    Args:
        learned (`dict`): image -> line, of what is trained on.
        tested (`dict`): image -> line, of what is evaluated.
        of_file (`str`): what to write behind a line of `tested`, such as `" of test.csv"`.
        source (`str`): where the images are, see [`load_images`].
        findings (`Findings`): gets the problems.
    """
    if not learned or not tested:
        return  # before all pictures are decoded
    for split, (indices, pictures) in _pictures(learned, source).items():
        for other_split, (other_indices, other_pictures) in _pictures(tested, source).items():
            for row, other_row, likeness in near_duplicates(pictures, other_pictures):
                image, other = (split, indices[row]), (other_split, other_indices[other_row])
                if image != other:
                    names = f"{split} image {image[1]} is like {other_split} image {other[1]}"
                    place = f"line {learned[image]} and line {tested[other]}{of_file}: {names}"
                    findings.add("near-duplicate image", place, f"{names}, by {likeness:.3f} of at most 1")


def _pictures(lines: Lines, source: str) -> dict[str, tuple[list[int], torch.Tensor]]:
    """For each split of these images their indices and [`small_pictures`], in one order."""
    pictures = {}
    for wanted in IMAGE_SPLITS:
        indices = sorted(index for split, index in lines if split == wanted)
        if indices:
            pictures[wanted] = indices, small_pictures(load_images(source, wanted), indices)
    return pictures


__all__ = ["lines_of_evaluation", "report_near_duplicates", "report_shared_images"]
