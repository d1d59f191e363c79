"""Batches for the two stages."""

import pytest
import torch
from PIL import Image

from sigphi.train.collators import (
    IGNORE_INDEX,
    SiglipCollator,
    VlmCollator,
    normalize,
    preprocess,
    resize,
)
from sigphi.train.packing import PackingCollator
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
    assert torch.equal(batch["pixel_values"], images[[2, 0]])
    assert batch["image_index"].tolist() == [2, 0]


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
        assert torch.equal(preprocess(tiny_encoder_processor, pixels[None]), expected)


def test_preprocess_keeps_the_order_of_a_batch(tiny_encoder_processor):
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    expected = tiny_encoder_processor(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(preprocess(tiny_encoder_processor, pixels), expected)


def test_resized_images_stay_bytes_and_are_normalised_as_by_the_processor(tiny_encoder_processor):
    by = tiny_encoder_processor.image_processor
    pixels = torch.randint(256, (5, 3, 47, 61), dtype=torch.uint8)
    resized = resize(by, pixels)
    assert resized.dtype == torch.uint8 and resized.shape == (5, 3, 32, 32)
    assert torch.equal(normalize(by, resized), by(list(pixels), return_tensors="pt")["pixel_values"])
    assert torch.equal(resize(by, resized), resized)


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


@pytest.mark.parametrize("packs", [False, True])
def test_an_image_of_several_questions_goes_through_the_tower_once(make_lora_vlm, tiny_vlm_processor, packs):
    model = make_lora_vlm(num_image_tokens=4)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    image_id = tiny_vlm_processor.image_token_id
    # With rows of 8 tokens the packed questions of an image lie in two rows.
    rows = [
        {"image_index": image, "prompt_ids": [image_id] * 4 + [5 + k], "answer_ids": [9 + k, 7]}
        for k, image in enumerate([2, 2, 0, 2, 0])
    ]
    pad_token_id = tiny_vlm_processor.tokenizer.pad_token_id
    given = {"images": images, "processor": tiny_vlm_processor}
    collator = VlmCollator(pad_token_id, **given)
    if packs:
        collator = PackingCollator(pad_token_id, image_token_id=image_id, tokens_per_row=8, **given)
    batch = collator(rows)
    assert torch.equal(batch["pixel_values"], preprocess(tiny_vlm_processor, images[[2, 0]]))
    assert batch["image_rows"].tolist() == [0, 0, 1, 0, 1]
    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    repeated = {name: tensor for name, tensor in batch.items() if name != "image_rows"}
    repeated["pixel_values"] = batch["pixel_values"][batch["image_rows"]]
    losses = [model(**one).loss for one in (batch, repeated)]
    assert seen == [2, 5]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0.0)
