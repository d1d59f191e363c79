"""Augmentation on batches, against torchvision image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from sigphi.train.augmentation import cut_out, jitter_color, shift_and_flip, uniform_draws


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (40, 3, 8, 6), dtype=torch.uint8, generator=generator)


# Draws ---------------------------------------------------------------------------------------------------------------


def naive_draws(seed: int, epoch: int, index: int, count: int) -> list[float]:
    """The same hash in NumPy's 32 bits."""

    def mixed(value: int) -> np.uint32:
        bits = np.array([value % 2**32], dtype=np.uint32)
        bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return (bits ^ (bits >> np.uint32(16)))[0]

    image = mixed(int(mixed(index + 1)) ^ int(mixed(int(mixed(seed)) + epoch)))
    return [float(mixed(int(image) + number * 0x9E3779B9) >> 8) / 2**24 for number in range(1, count + 1)]


def test_draws_depend_on_seed_epoch_and_image_alone():
    index = torch.tensor([7, 0, 49_999, 7])
    draws = uniform_draws(42, 3, index, 5)
    expected = [naive_draws(42, 3, image, 5) for image in index.tolist()]
    assert draws.dtype == torch.float32 and draws.tolist() == expected
    assert torch.equal(draws[:2], uniform_draws(42, 3, index[:2], 5))
    assert torch.equal(draws[:, :2], uniform_draws(42, 3, index, 2))
    for seed, epoch in ((43, 3), (42, 4), (3, 42)):
        assert not torch.isclose(uniform_draws(seed, epoch, index, 5), draws).any()


def test_draws_are_even_and_independent():
    """Columns, images that follow each other, epochs and seeds: uncorrelated to four standard errors."""
    index = torch.arange(20_000)
    draws = torch.cat([uniform_draws(seed, epoch, index, 8) for seed in (0, 1) for epoch in (0, 1)], dim=1).double()
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws.mean(0) - 0.5).abs().max() < 4 * (1 / 12 / 20_000) ** 0.5
    bins = torch.stack([torch.histc(column, 16, 0, 1) for column in draws.t()])
    assert ((bins - 1250) ** 2 / 1250).sum(1).max() < 45  # chi-squared with 15 degrees of freedom: p = 1e-4
    following = torch.cat([draws[:-1], draws[1:]], dim=1)
    correlation = torch.corrcoef(following.t()) - torch.eye(64)
    assert correlation.abs().max() < 5 / 20_000**0.5


# Shift and flip ------------------------------------------------------------------------------------------------------


def test_shift_and_flip_crop_the_mirrored_image(pixels):
    draws = uniform_draws(0, 0, torch.arange(40), 3)
    moved = shift_and_flip(pixels, 2, draws)
    assert moved.dtype == torch.uint8
    for image, original, (down, right, flip) in zip(moved, pixels, draws.tolist(), strict=True):
        padded = F.pad(original, [2], padding_mode="reflect")
        expected = F.crop(padded, int(down * 5), int(right * 5), 8, 6)
        assert torch.equal(image, F.horizontal_flip(expected) if flip < 0.5 else expected)


def test_shift_and_flip_reach_every_crop(pixels):
    image = pixels[0, :, :6]
    draws = uniform_draws(0, 0, torch.arange(600), 3)
    moved = shift_and_flip(image.expand(600, -1, -1, -1), 1, draws)
    assert len({one.numpy().tobytes() for one in moved}) == 18


def test_without_shift_only_flips_are_left(pixels):
    draws = torch.tensor([[0.1, 0.9, 0.7], [0.1, 0.9, 0.2]])
    kept, flipped = shift_and_flip(pixels[:2], 0, draws)
    assert torch.equal(kept, pixels[0]) and torch.equal(flipped, pixels[1].flip(-1))


# Color ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_colors_are_those_of_torchvision(pixels, strength):
    draws = uniform_draws(1, 0, torch.arange(40), 3)
    jittered = jitter_color(pixels.float(), strength, draws)
    for image, original, draw in zip(jittered, pixels, draws, strict=True):
        factors = (1 - strength + 2 * strength * draw).tolist()
        expected = F.adjust_brightness(original / 255, factors[0])
        expected = F.adjust_saturation(F.adjust_contrast(expected, factors[1]), factors[2])
        torch.testing.assert_close(image / 255, expected, rtol=0, atol=1e-5)
    if strength == 0:
        assert torch.equal(jittered, pixels.float())


# Cutout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 20])
def test_a_square_is_erased_of_which_a_part_may_lie_outside(pixels, size):
    images, draws = pixels + 1.0, uniform_draws(2, 0, torch.arange(40), 2)
    erased = cut_out(images, size, draws)
    for image, original, (down, right) in zip(erased, images, draws.tolist(), strict=True):
        top, left = int(down * 8) - size // 2, int(right * 6) - size // 2
        bottom, end = min(top + size, 8), min(left + size, 6)
        top, left = max(top, 0), max(left, 0)
        assert torch.equal(image, F.erase(original, top, left, bottom - top, end - left, torch.zeros(3, 1, 1)))
    assert (erased == 0).any((1, 2, 3)).all()


def test_nothing_changes_its_input(pixels):
    images, draws = pixels.float(), uniform_draws(0, 0, torch.arange(40), 3)
    squares = cut_out(images, 3, draws[:, :2])
    for result in (shift_and_flip(images, 2, draws), jitter_color(images, 0.5, draws), squares):
        assert not torch.equal(result, images)
    assert torch.equal(images, pixels.float())
