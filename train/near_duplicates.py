"""Pictures that are in two sets of images: recolored, compressed anew, or cut a little differently."""

from collections.abc import Iterator, Sequence
from itertools import product

import datasets
import torch
from torch.nn import functional as F

from sigphi.train.images import decode_images

SIDE = 32
# Set by looking at the pairs of CIFAR-10's test and train images: above it they show one shot, or one series of shots;
# below 0.905 more and more of them are ships on gray water or airplanes of one type.
THRESHOLD = 0.91

_CANDIDATE_THRESHOLD = 0.82
_MARGIN = 4
_LARGEST_SHIFT = 2
# Bounds the memory: a block has this many images, or pairs of them.
_BLOCK = 1000


def near_duplicates(
    first: torch.Tensor, second: torch.Tensor, threshold: float = THRESHOLD
) -> list[tuple[int, int, float]]:
    """The pairs of pictures, one of each set, that show the same.

    Two pictures are compared by their details: averaged over small cells, minus the same averaged over large cells and
    drawn up again (skies and seas are alike in many pictures), minus the mean, scaled to length 1. The dot product of
    these is 1 for the same picture and about 0 for unrelated ones.

    - Candidates are pairs with more than 0.82 by cells of 4 and 16 pixels over the whole picture.
    - Of these the middle 24x24 pixels of the first picture (frames are alike in many pictures) are compared, by cells
      of 2 and 8 pixels, with those of the second, moved by up to 2 pixels each way. The best has to be above
      `threshold`.

    Mirrored pictures, and those cut out in another size, are not found: that there is no pair proves nothing.

    Args:
        first (`torch.Tensor` of shape `(num_first, 3, 32, 32)`, uint8): of [`small_pictures`].
        second (`torch.Tensor` of shape `(num_second, 3, 32, 32)`, uint8): of [`small_pictures`].
        threshold (`float`, *optional*, defaults to 0.91): of the dot product.

    Returns:
        `list[tuple[int, int, float]]`: row in `first`, row in `second` and dot product, ordered by the rows.
    """
    pairs: list[tuple[int, int, float]] = []
    for rows, columns in _candidates(first, second):
        for start in range(0, len(rows), _BLOCK):
            row, column = rows[start : start + _BLOCK], columns[start : start + _BLOCK]
            likeness = _likeness(first[row].float(), second[column].float())  # (block,)
            kept = likeness > threshold
            pairs += zip(row[kept].tolist(), column[kept].tolist(), likeness[kept].tolist(), strict=True)
    return pairs


def _candidates(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    details = torch.cat([_details(block.float(), 4, 16) for block in second.split(_BLOCK)])  # (num_second, 192)
    for start in range(0, len(first), _BLOCK):
        alike = _details(first[start : start + _BLOCK].float(), 4, 16) @ details.T  # (block, num_second)
        rows, columns = torch.nonzero(alike > _CANDIDATE_THRESHOLD, as_tuple=True)
        yield rows + start, columns


def _likeness(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """For each pair the dot product of the details at the shift where it is largest, of shape `(num_pairs,)`."""
    middle = _details(_window(first, 0, 0), 2, 8)  # (num_pairs, 432)
    shifts = range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1)
    moved = [
        (middle * _details(_window(second, down, right), 2, 8)).sum(dim=1) for down, right in product(shifts, shifts)
    ]
    return torch.stack(moved).amax(dim=0)


def _window(pixels: torch.Tensor, down: int, right: int) -> torch.Tensor:
    size = SIDE - 2 * _MARGIN
    return pixels[:, :, _MARGIN + down : _MARGIN + down + size, _MARGIN + right : _MARGIN + right + size]


def _details(pixels: torch.Tensor, cell: int, large_cell: int) -> torch.Tensor:
    """Of pictures of shape `(n, 3, side, side)`, float32, with shape `(n, 3 * (side // cell) ** 2)`."""
    fine = F.avg_pool2d(pixels, cell)
    coarse = F.interpolate(F.avg_pool2d(pixels, large_cell), size=fine.shape[2:], mode="bilinear")
    details = (fine - coarse).flatten(1)
    return F.normalize(details - details.mean(dim=1, keepdim=True), dim=1)


def small_pictures(images: datasets.Dataset, indices: Sequence[int]) -> torch.Tensor:
    """Decode images, and average those of another size down to 32x32 pixels.

    Args:
        images (`datasets.Dataset`): of [`load_images`].
        indices (`Sequence[int]`): rows of `images`.

    Returns:
        `torch.Tensor` of shape `(len(indices), 3, 32, 32)`, uint8.
    """
    blocks = [torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8)]
    for start in range(0, len(indices), _BLOCK):
        pixels = decode_images(images, indices[start : start + _BLOCK])
        if pixels.shape[2:] != (SIDE, SIDE):
            pixels = F.adaptive_avg_pool2d(pixels.float(), SIDE).round().to(torch.uint8)
        blocks.append(pixels)
    return torch.cat(blocks)


__all__ = ["THRESHOLD", "near_duplicates", "small_pictures"]
