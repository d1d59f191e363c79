"""Batches for the two stages."""

import pytest
import torch
from PIL import Image

from sigphi.train.collators import (
    IGNORE_INDEX,
    SiglipCollator,
    VlmCollator,
    preprocess,
    random_shift_and_flip,
)
from sigphi.train.pairs import pair_masks

# Encoder -------------------------------------------------------------------------------------------------------------


def test_equal_texts_are_one_column_and_keep_the_first_spelling(tiny_encoder_processor):
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    rows = [
        {"image_index": 2, "texts": ["A cat.", "A dog."], "facts": ["", ""], "known": []},
        {"image_index": 0, "texts": [" a CAT. "], "facts": [""], "known": []},
    ]
    batch = SiglipCollator(tiny_encoder_processor, images)(rows)
    positives, ignored = pair_masks(**batch["pairs"])
    assert positives.tolist() == [[True, True], [True, False]]
    assert not ignored.any()
    assert batch["return_loss"] is True
    decoded = tiny_encoder_processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert decoded == ["A cat.", "A dog."]
    assert torch.equal(batch["pixel_values"], preprocess(tiny_encoder_processor, images[[2, 0]]))


def test_long_texts_are_cut(tiny_encoder_processor):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    rows = [{"image_index": 0, "texts": ["a frog in a forest " * 20], "facts": [""], "known": []}]
    batch = SiglipCollator(tiny_encoder_processor, images, max_text_length=7)(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, 7)


def test_cached_features_take_the_place_of_token_ids(tiny_encoder_processor):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    features = torch.randn(3, 5)
    collator = SiglipCollator(
        tiny_encoder_processor,
        images,
        text_features=features,
        text_rows={"a cat.": 2, "a dog.": 0, "a ship.": 1},
    )
    batch = collator([{"image_index": 0, "texts": ["A cat.", " A ship."], "facts": ["", ""], "known": []}])
    assert "input_ids" not in batch
    assert torch.equal(batch["text_features"], features[[2, 1]])


def test_preprocess_equals_the_processor(tiny_encoder_processor, images):
    for image in (images[0], images[1].resize((32, 32)), images[1].resize((48, 48))):
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3).permute(2, 0, 1)
        expected = tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(preprocess(tiny_encoder_processor, pixels[None]), expected, rtol=0, atol=1e-6)


def test_preprocess_keeps_the_order_of_a_batch(tiny_encoder_processor):
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    expected = tiny_encoder_processor(images=pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(preprocess(tiny_encoder_processor, pixels), expected, rtol=0, atol=1e-6)


# VLM -----------------------------------------------------------------------------------------------------------------

PAD, EOS = 7, 1


def vlm_rows() -> list[dict]:
    return [
        {"image_index": 1, "prompt_ids": [10, 11, 12], "answer_ids": [20, EOS]},
        # A prompt may hold the pad's and the end's ids; the mask is by place, not by id.
        {"image_index": 0, "prompt_ids": [PAD, EOS], "answer_ids": [21, 22, 23, PAD, EOS]},
    ]


def test_labels_supervise_the_answers_with_their_end_and_nothing_else():
    features = torch.randn(2, 4, 6)
    batch = VlmCollator(PAD, image_features=features)(vlm_rows())
    assert batch["input_ids"].tolist() == [[10, 11, 12, 20, EOS, PAD, PAD], [PAD, EOS, 21, 22, 23, PAD, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    ignore = IGNORE_INDEX
    assert batch["labels"].tolist() == [
        [ignore, ignore, ignore, 20, EOS, ignore, ignore],
        [ignore, ignore, 21, 22, 23, PAD, EOS],
    ]
    assert torch.equal(batch["image_features"], features[[1, 0]])
    assert "pixel_values" not in batch


def test_images_go_through_the_processor(tiny_vlm_processor):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = VlmCollator(PAD, images=images, processor=tiny_vlm_processor)(vlm_rows())
    assert torch.equal(batch["pixel_values"], preprocess(tiny_vlm_processor, images[[1, 0]]))
    assert "image_features" not in batch


def test_an_empty_answer_is_an_error_that_names_the_row():
    rows = vlm_rows() + [{"image_index": 0, "prompt_ids": [1], "answer_ids": []}]
    with pytest.raises(ValueError, match="Row 2 of the batch has no answer tokens"):
        VlmCollator(PAD, image_features=torch.zeros(2, 1, 1))(rows)


# Augmentation --------------------------------------------------------------------------------------------------------


def crops(image: torch.Tensor, shift: int) -> list[torch.Tensor]:
    """All crops of one image `(channels, height, width)` over its mirrored border, and their mirror images."""
    _, height, width = image.shape

    def mirrored(index: int, size: int) -> int:
        index = abs(index)
        return 2 * (size - 1) - index if index >= size else index

    found = []
    for down in range(-shift, shift + 1):
        for right in range(-shift, shift + 1):
            rows = [mirrored(row + down, height) for row in range(height)]
            columns = [mirrored(column + right, width) for column in range(width)]
            crop = image[:, rows][:, :, columns]
            found += [crop, crop.flip(-1)]
    return found


def which(image: torch.Tensor, candidates: list[torch.Tensor]) -> int:
    matches = [number for number, crop in enumerate(candidates) if torch.equal(image, crop)]
    assert len(matches) == 1
    return matches[0]


def test_every_augmented_image_is_one_of_its_crops_and_each_has_its_own():
    pixels = torch.randn(40, 3, 8, 6)
    moved = random_shift_and_flip(pixels, shift=2)
    assert moved.shape == pixels.shape and moved.dtype == pixels.dtype
    drawn = [which(image, crops(original, 2)) for image, original in zip(moved, pixels, strict=True)]
    assert len(set(drawn)) > 15
    assert {number % 2 for number in drawn} == {0, 1}


def test_augmentation_reaches_every_crop():
    image = torch.randn(3, 6, 6)
    moved = random_shift_and_flip(image.expand(600, -1, -1, -1), shift=1)
    assert {which(one, crops(image, 1)) for one in moved} == set(range(18))


def test_augmentation_repeats_with_the_seed():
    pixels = torch.randn(10, 3, 8, 8)
    torch.manual_seed(3)
    first = random_shift_and_flip(pixels, 1)
    again = random_shift_and_flip(pixels, 1)
    torch.manual_seed(3)
    assert torch.equal(random_shift_and_flip(pixels, 1), first)
    assert not torch.equal(again, first)


def test_augmentation_does_not_change_its_input():
    pixels = torch.randn(4, 3, 8, 8)
    before = pixels.clone()
    random_shift_and_flip(pixels, 2)
    assert torch.equal(pixels, before)


def test_without_shift_only_flips_are_left():
    pixels = torch.randn(20, 3, 5, 5)
    for image, original in zip(random_shift_and_flip(pixels, 0), pixels, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
