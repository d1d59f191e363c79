"""Augmentation of whole batches of pixels, on their device.

Each image draws by itself, from the seed of the run, the epoch and its number in the data set. So what it draws does
not depend on the images beside it, on the number of processes, or on where a run was resumed. (The batch transforms
of torchvision draw once for the whole batch.)
"""

from typing import TypeVar

import torch

_Bits = TypeVar("_Bits", int, torch.Tensor)

_UINT32 = 0xFFFFFFFF
# Of Rec. 601, as torchvision rounds them.
_LUMA = (0.2989, 0.587, 0.114)


def uniform_draws(seed: int, epoch: int, image_index: torch.Tensor, count: int) -> torch.Tensor:
    """
    Numbers that are spread evenly over [0, 1), the same for the same arguments on every device.

    They are hashed by the last steps of MurmurHash3 (Appleby, public domain), one round a number that goes in.

    Args:
        seed, epoch (`int`): of the run.
        image_index (`torch.LongTensor` of shape `(images,)`): the number of each image in the data set.
        count (`int`): how many numbers an image needs.

    Returns:
        `torch.FloatTensor` of shape `(images, count)`: multiples of 2^-24.
    """
    run = _mixed(_mixed(seed & _UINT32) + epoch & _UINT32)
    images = _mixed(_mixed(image_index + 1) ^ run)  # (images,)
    numbers = torch.arange(1, count + 1, device=image_index.device) * 0x9E3779B9  # (count,)
    return (_mixed(images[:, None] + numbers & _UINT32) >> 8).float() / 2**24


def _mixed(values: _Bits) -> _Bits:
    """32 bits in, 32 bits out, held in int64 because torch has few operations on uint32."""
    values = (values ^ values >> 16) * 0x85EBCA6B & _UINT32
    values = (values ^ values >> 13) * 0xC2B2AE35 & _UINT32
    return values ^ values >> 16


def shift_and_flip(images: torch.Tensor, shift: int, draws: torch.Tensor) -> torch.Tensor:
    """
    Move each image by up to `shift` pixels each way, over its mirrored border, and flip every second one.

    This is the crop of an image that was padded by `shift` pixels on each side (He et al., arXiv 1512.03385, section
    4.2), with the image's own mirror image instead of black.

    Args:
        images (`torch.Tensor` of shape `(images, channels, height, width)`): of any dtype.
        shift (`int`): below height and width.
        draws (`torch.Tensor` of shape `(images, 3)`): in [0, 1): how far down and right the crop begins, and whether
            it is flipped (below one half).

    Returns:
        `torch.Tensor` of the same shape and dtype.
    """
    _, channels, height, width = images.shape
    offsets = (draws[:, :2] * (2 * shift + 1)).long() - shift  # (images, 2)
    rows = _mirrored(torch.arange(height, device=images.device) + offsets[:, :1], height)  # (images, height)
    columns = _mirrored(torch.arange(width, device=images.device) + offsets[:, 1:], width)  # (images, width)
    columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
    image = torch.arange(len(images), device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    return images[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _mirrored(places: torch.Tensor, size: int) -> torch.Tensor:
    """Places outside an image, as places in it: its border is a mirror, and not repeated."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def jitter_color(images: torch.Tensor, strength: float, draws: torch.Tensor) -> torch.Tensor:
    """
    Change brightness, then contrast, then saturation, each by a factor from `1 - strength` to `1 + strength`.

    The three are those of `torchvision.transforms.v2.functional`: a blend with black, with the image's mean gray, and
    with its gray version, cut to the range of pixels.

    Args:
        images (`torch.FloatTensor` of shape `(images, 3, height, width)`): RGB from 0 to 255.
        strength (`float`): from 0 to 1.
        draws (`torch.Tensor` of shape `(images, 3)`): in [0, 1), one for each change.

    Returns:
        `torch.FloatTensor` of the same shape.
    """
    factors = (1 - strength + 2 * strength * draws)[..., None, None, None]  # (images, 3, 1, 1, 1)
    images = (images * factors[:, 0]).clamp(0, 255)
    images = images.lerp(_gray(images).mean((1, 2, 3), keepdim=True), 1 - factors[:, 1]).clamp(0, 255)
    return images.lerp(_gray(images), 1 - factors[:, 2]).clamp(0, 255)


def _gray(images: torch.Tensor) -> torch.Tensor:
    """`(images, 1, height, width)`"""
    weights = torch.tensor(_LUMA, device=images.device)[:, None, None]
    return (images * weights).sum(1, keepdim=True)


def cut_out(images: torch.Tensor, size: int, draws: torch.Tensor) -> torch.Tensor:
    """
    Set a square of each image to 0, the mean color of normalised images (DeVries and Taylor, arXiv 1708.04552).

    The middle of the square is any pixel, so that it may lie partly outside.

    Args:
        images (`torch.FloatTensor` of shape `(images, channels, height, width)`): normalised.
        size (`int`): height and width of the square in pixels.
        draws (`torch.Tensor` of shape `(images, 2)`): in [0, 1): where its middle is, down and right.

    Returns:
        `torch.FloatTensor` of the same shape.
    """
    height, width = images.shape[-2:]
    top = (draws[:, :1] * height).long() - size // 2  # (images, 1)
    left = (draws[:, 1:] * width).long() - size // 2
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top) & (rows < top + size)  # (images, height)
    in_columns = (columns >= left) & (columns < left + size)  # (images, width)
    return images.masked_fill((in_rows[:, :, None] & in_columns[:, None, :])[:, None], 0.0)


__all__ = ["cut_out", "jitter_color", "shift_and_flip", "uniform_draws"]
