"""Images of one set that are in another one too, moved a little, recolored or compressed anew."""

from collections.abc import Sequence

import datasets
import torch
from torch.nn import functional as F

from sigphi.train.images import decode_images

# Set by looking at the pairs of CIFAR-10's test and train images: above it they show the same shot, from 0.90 down
# more and more of them are ships on gray water or airplanes of one type.
THRESHOLD = 0.91

_SIZE = 12
_COARSE_SIZE = 3
# Bounds the memory: a block has at most this many images times those of the other set.
_IMAGES_AT_ONCE = 1000


def near_duplicates(
    first: torch.Tensor, second: torch.Tensor, threshold: float = THRESHOLD
) -> list[tuple[int, int, float]]:
    """The pairs of images, one of each set, whose details are alike: the dot product is above `threshold`.

    It finds copies that are recolored, compressed anew, or moved by a pixel or two; not mirrored ones, nor a shot from
    which another part was cut. That no pair is found does not mean that there is none.

    Args:
        first (`torch.Tensor` of shape `(num_first, size)`, float32): of [`image_details`].
        second (`torch.Tensor` of shape `(num_second, size)`, float32): of [`image_details`].
        threshold (`float`, *optional*, defaults to 0.91): 1 for the same picture, about 0 for unrelated ones.

    Returns:
        `list[tuple[int, int, float]]`: row in `first`, row in `second` and dot product, by the rows.
    """
    pairs: list[tuple[int, int, float]] = []
    for start in range(0, len(first), _IMAGES_AT_ONCE):
        alike = first[start : start + _IMAGES_AT_ONCE] @ second.T  # (block, num_second)
        rows, columns = torch.nonzero(alike > threshold, as_tuple=True)
        pairs += zip((rows + start).tolist(), columns.tolist(), alike[rows, columns].tolist(), strict=True)
    return pairs


def image_details(images: datasets.Dataset, indices: Sequence[int]) -> torch.Tensor:
    """What tells images apart beyond their large areas of light and color.

    The middle three quarters of each side (frames are alike in many pictures) is averaged down to 12x12 pixels, minus
    the same averaged down to 3x3 and drawn up again (sky above water is alike in many pictures), minus the mean, and
    scaled to length 1. A picture without any detail gets zeros.

    Args:
        images (`datasets.Dataset`): of [`load_images`].
        indices (`Sequence[int]`): rows of `images`.

    Returns:
        `torch.Tensor` of shape `(len(indices), 432)`, float32.
    """
    blocks = [torch.empty(0, 3 * _SIZE * _SIZE)]
    for start in range(0, len(indices), _IMAGES_AT_ONCE):
        pixels = decode_images(images, indices[start : start + _IMAGES_AT_ONCE]).float()
        height, width = pixels.shape[2:]
        middle = pixels[:, :, height // 8 : height - height // 8, width // 8 : width - width // 8]
        fine = F.adaptive_avg_pool2d(middle, _SIZE)  # (block, 3, 12, 12)
        coarse = F.interpolate(F.adaptive_avg_pool2d(middle, _COARSE_SIZE), size=_SIZE, mode="bilinear")
        details = (fine - coarse).flatten(1)  # (block, 432)
        blocks.append(F.normalize(details - details.mean(dim=1, keepdim=True), dim=1))
    return torch.cat(blocks)


__all__ = ["THRESHOLD", "image_details", "near_duplicates"]
