"""The processors: pictures of every kind become RGB, chats become prompts, one image becomes its soft tokens."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import AutoProcessor

from sigphi import SiglipResNetProcessor, SigPhiProcessor
from sigphi.processing.processing_siglip_resnet import all_to_rgb, to_rgb


def rgb(image):
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def picture(width=5, height=4):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# Modes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_colour_modes_keep_their_colours(mode):
    image = picture().convert(mode)
    # YCbCr and HSV store colours rounded.
    assert np.abs(rgb(to_rgb(image)) - rgb(picture())).max() <= (0 if mode in ("RGB", "CMYK", "RGBX") else 8)
    assert image.mode == mode


def test_gray_and_black_and_white():
    gray = Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8))
    assert rgb(to_rgb(gray)).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    assert rgb(to_rgb(gray.convert("1", dither=Image.Dither.NONE))).tolist() == [[[0] * 3, [0] * 3, [255] * 3]]


def test_transparency_is_laid_over_white():
    colours = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    assert rgb(to_rgb(Image.fromarray(colours, "RGBA"))).tolist() == [expected]
    gray = np.array([[[10, 255], [10, 0]]], dtype=np.uint8)
    assert rgb(to_rgb(Image.fromarray(gray, "LA"))).tolist() == [[[10] * 3, [255] * 3]]


def test_premultiplied_transparency():
    colours = np.array([[[200, 100, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)
    image = Image.fromarray(colours, "RGBA").convert("RGBa")
    assert rgb(to_rgb(image)).tolist() == [[[200, 100, 0], [255, 255, 255]]]


def palette_image():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 0, 0, 50, 150] + [0] * 762)
    image.putdata([0, 1])
    return image


def test_palettes_with_and_without_transparency():
    image = palette_image()
    assert rgb(to_rgb(image)).tolist() == [[[200, 100, 0], [0, 50, 150]]]
    image.info["transparency"] = 1
    assert rgb(to_rgb(image)).tolist() == [[[200, 100, 0], [255, 255, 255]]]


def test_a_transparent_colour_of_rgb_and_gray_images():
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    image.info["transparency"] = (4, 5, 6)
    assert rgb(to_rgb(image)).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    gray = Image.fromarray(np.array([[7, 8]], dtype=np.uint8))
    gray.info["transparency"] = 8
    assert rgb(to_rgb(gray)).tolist() == [[[7] * 3, [255] * 3]]


@pytest.mark.parametrize("dtype", ["<u2", ">u2", np.int32])
def test_16_bit_gray_is_scaled_by_its_range(dtype):
    values = np.array([[0, 257, 25700, 65535]], dtype=dtype)
    image = Image.fromarray(values)
    assert image.mode.startswith("I")
    assert rgb(to_rgb(image))[0, :, 0].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([-100.0, 0.0, 100.0], [0, 127, 255]),
        ([0.0, 0.5, 1.0], [0, 127, 255]),
        ([0.0, 1e6, 2e6], [0, 127, 255]),
        ([0.3, 0.3, 0.3], [0, 0, 0]),
    ],
)
def test_floating_point_gray_is_scaled_by_its_own_range(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert rgb(to_rgb(image))[0, :, 0].tolist() == pytest.approx(expected, abs=1)


def test_32_bit_gray_is_scaled_by_its_own_range():
    image = Image.fromarray(np.array([[-10, 0, 90]], dtype=np.int32))
    assert rgb(to_rgb(image))[0, :, 0].tolist() == [0, 25, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation, tmp_path, tiny_encoder_processor):
    steps = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.ROTATE_270, Image.Transpose.FLIP_LEFT_RIGHT],
        6: [Image.Transpose.ROTATE_270],
        7: [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT],
        8: [Image.Transpose.ROTATE_90],
    }
    expected = picture(32, 24)
    for step in steps.get(orientation, []):
        expected = expected.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(32, 24).save(tmp_path / "image.png", exif=exif)
    image = Image.open(tmp_path / "image.png")
    assert np.array_equal(rgb(to_rgb(image)), rgb(expected))
    assert expected.size == ImageOps.exif_transpose(image).size
    pixels = tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, tiny_encoder_processor(images=expected, return_tensors="pt")["pixel_values"])


def test_only_pictures_are_touched():
    array, tensor = np.zeros((3, 4, 4)), torch.zeros(3, 4, 4)
    assert to_rgb(array) is array
    assert to_rgb(tensor) is tensor
    assert to_rgb(None) is None
    assert to_rgb("https://example.com/cat.png") == "https://example.com/cat.png"
    nested = all_to_rgb([[picture().convert("L")], (picture().convert("LA"), array)])
    assert nested[0][0].mode == nested[1][0].mode == "RGB"
    assert nested[1][1] is array


# Pixels --------------------------------------------------------------------------------------------------------------


def test_pixels_are_scaled_to_between_minus_one_and_one(tiny_encoder_processor):
    image = Image.new("RGB", (32, 32), (0, 255, 51))
    pixels = tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.dtype == torch.float32
    assert pixels.shape == (1, 3, 32, 32)
    for channel, expected in enumerate((-1.0, 1.0, -0.6)):
        torch.testing.assert_close(pixels[0, channel], torch.full((32, 32), expected))


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (3, 500), (500, 3), (1, 1), (2, 3)])
def test_extreme_shapes(tiny_encoder_processor, size):
    image = Image.new("RGB", size, (0, 255, 51))
    pixels = tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor([-1.0, 1.0, -0.6]))


def test_arrays_and_tensors_equal_pictures(tiny_encoder_processor, images):
    image = images[1]
    expected = tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"]
    array = np.asarray(image)
    for same in (array.copy(), array.transpose(2, 0, 1).copy(), torch.tensor(array).permute(2, 0, 1)):
        pixels = tiny_encoder_processor(images=same, return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected)


def test_images_of_different_sizes_make_one_batch(tiny_encoder_processor, images):
    batch = tiny_encoder_processor(images=images, return_tensors="pt")["pixel_values"]
    for image, pixels in zip(images, batch, strict=True):
        assert torch.equal(pixels, tiny_encoder_processor(images=image, return_tensors="pt")["pixel_values"][0])


def test_texts_and_images_together(tiny_encoder_processor, tokenizer, images):
    texts = ["a cat", "The dog is brown."]
    batch = tiny_encoder_processor(images=images, text=texts, padding=True, return_tensors="pt")
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokens["input_ids"])
    assert torch.equal(batch["attention_mask"], tokens["attention_mask"])
    assert len(batch["pixel_values"]) == 3


# One image a text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text", "message"),
    [
        (0, "What?", r"Text 0 holds 0 images \(`<image>`\), but this model answers about exactly one image"),
        (1, "What?", "Text 0 holds 0 images"),
        (2, "<image><image>What?", "Text 0 holds 2 images"),
        (2, ["<image>What?", "What?"], "Text 1 holds 0 images"),
        (0, "<image>What?", "Got 0 images for 1 texts; give each text one image"),
        (3, ["<image>a", "<image>b"], "Got 3 images for 2 texts"),
        (1, ["<image>a", "<image>b"], "Got 1 images for 2 texts"),
    ],
)
def test_each_text_has_one_image(tiny_vlm_processor, count, text, message):
    pictures = [picture()] * count or None
    with pytest.raises(ValueError, match=message):
        tiny_vlm_processor(images=pictures, text=text)


@pytest.mark.parametrize("form", ["flat", "nested", "batch"])
def test_images_may_be_flat_nested_or_a_batch(tiny_vlm_processor, images, form):
    pictures = [image.resize((32, 32)) for image in images[:2]]
    forms = {
        "flat": pictures,
        "nested": [[picture] for picture in pictures],
        "batch": np.stack([np.asarray(picture) for picture in pictures]),
    }
    texts = ["<image>a", "<image>b"]
    expected = tiny_vlm_processor(images=pictures, text=texts, return_tensors="pt")
    batch = tiny_vlm_processor(images=forms[form], text=texts, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("num_image_tokens", [1, 4, 16])
def test_one_placeholder_becomes_as_many_as_there_are_soft_tokens(shared, tokenizer, images, num_image_tokens):
    processor = SigPhiProcessor(shared["image_processor"], tokenizer, num_image_tokens=num_image_tokens)
    inputs = processor(images=images[0], text="a<image>b", return_tensors="pt")
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    assert processor.image_token_id == placeholder
    a, b = (tokenizer(letter)["input_ids"] for letter in "ab")
    assert inputs["input_ids"].tolist() == [a + [placeholder] * num_image_tokens + b]
    assert inputs["attention_mask"].tolist() == [[1] * (num_image_tokens + 2)]


def test_the_number_of_tokens_without_an_image_at_hand(shared, tokenizer):
    processor = SigPhiProcessor(shared["image_processor"], tokenizer, num_image_tokens=4)
    counts = processor._get_num_multimodal_tokens(image_sizes=[(32, 32), (100, 20)])
    assert counts["num_image_tokens"] == [4, 4]
    assert counts["num_image_patches"] == [1, 1]


# Chats ---------------------------------------------------------------------------------------------------------------


def user(text, image=None):
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = {
    "one question": ([user("What is it?")], "<image>Question: What is it?\nAnswer:"),
    "one answer": (
        [user("What is it?"), assistant("A cat.")],
        "<image>Question: What is it?\nAnswer: A cat.<|endoftext|>",
    ),
    "history": (
        [
            user("What is it?"),
            assistant("A cat."),
            {"role": "user", "content": [{"type": "text", "text": "What color?"}]},
        ],
        "<image>Question: What is it?\nAnswer: A cat.<|endoftext|>\nQuestion: What color?\nAnswer:",
    ),
    "strings": (
        [
            user("What is it?"),
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "What color?"},
            {"role": "assistant", "content": "Brown."},
        ],
        "<image>Question: What is it?\nAnswer: A cat.<|endoftext|>\n"
        "Question: What color?\nAnswer: Brown.<|endoftext|>",
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, user("What is it?")],
        "Be brief.\n<image>Question: What is it?\nAnswer:",
    ),
    "system in parts": (
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user("What is it?")],
        "Be brief.\n<image>Question: What is it?\nAnswer:",
    ),
    "image after the text": (
        [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]}],
        "<image>Question: What is it?\nAnswer:",
    ),
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chats_become_these_prompts(tiny_vlm_processor, name, add_generation_prompt):
    messages, expected = CHATS[name]
    prompt = tiny_vlm_processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert prompt == expected


def test_a_chat_template_of_one_s_own(shared, tokenizer):
    processor = SigPhiProcessor(shared["image_processor"], tokenizer, chat_template="{{ messages[0]['role'] }}!")
    assert processor.apply_chat_template([user("x")]) == "user!"


def apply(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_a_chat_becomes_model_inputs(tiny_vlm_processor, images):
    inputs = apply(tiny_vlm_processor, [user("What is it?", images[0])])
    expected = tiny_vlm_processor(images=images[0], text="<image>Question: What is it?\nAnswer:", return_tensors="pt")
    assert set(inputs) >= {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert tiny_vlm_processor.decode(inputs["input_ids"][0]) == "<image>Question: What is it?\nAnswer:"


def test_chats_of_different_lengths_are_padded_on_the_left(tiny_vlm_processor, images):
    chats = [[user("What?", images[0])], [user("What is the object in the image?", images[1])]]
    inputs = apply(tiny_vlm_processor, chats, processor_kwargs={"padding": True})
    for row, chat in enumerate(chats):
        single = apply(tiny_vlm_processor, chat)
        length = single["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][row, -length:], single["input_ids"][0])
        assert set(inputs["input_ids"][row, :-length].tolist()) <= {tiny_vlm_processor.tokenizer.pad_token_id}
        assert inputs["attention_mask"][row].sum() == length
        assert torch.equal(inputs["pixel_values"][row], single["pixel_values"][0])
    assert not inputs["attention_mask"].all()


@pytest.mark.parametrize("messages", [[{"role": "user", "content": "What?"}], [user("a"), assistant("b"), user("c")]])
def test_a_chat_has_one_image(tiny_vlm_processor, images, messages):
    for message in messages:
        if isinstance(message["content"], list) and message["content"][0]["type"] == "image":
            message["content"][0]["image"] = images[0]
    with pytest.raises(ValueError, match="Text 0 holds (0|2) images"):
        apply(tiny_vlm_processor, messages)


@pytest.fixture(params=["transparent", "16 bit", "rotated"])
def special_file(request, tmp_path):
    """The path of a picture that a plain `convert("RGB")` shows wrongly."""
    path, noise, exif = tmp_path / "image.png", np.random.default_rng(0), Image.Exif()
    if request.param == "transparent":
        image = Image.fromarray(noise.integers(0, 256, (32, 32, 4), dtype=np.uint8))
    elif request.param == "16 bit":
        image = Image.fromarray(noise.integers(0, 65536, (32, 32), dtype=np.uint16))
    else:
        image = picture(32, 24)
        exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("form", ["picture", "path", "chat with a picture", "chat with a path"])
def test_files_and_chats_treat_pictures_as_a_direct_call_does(tiny_vlm_processor, special_file, form):
    image = Image.open(special_file) if "picture" in form else str(special_file)
    expected = tiny_vlm_processor(images=to_rgb(Image.open(special_file)), text="<image>", return_tensors="pt")
    if "chat" in form:
        inputs = apply(tiny_vlm_processor, [user("x", image)])
    else:
        inputs = tiny_vlm_processor(images=image, text="<image>", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


# Saving --------------------------------------------------------------------------------------------------------------


def test_saved_encoder_processor_gives_the_same(tiny_encoder_processor, images, tmp_path):
    tiny_encoder_processor.save_pretrained(tmp_path)
    for processor in (SiglipResNetProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(processor) is SiglipResNetProcessor
        first, second = (
            p(images=images, text=["a cat", "b"], padding=True, return_tensors="pt")
            for p in (tiny_encoder_processor, processor)
        )
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_vlm_processor_gives_the_same(shared, tokenizer, images, tmp_path):
    original = SigPhiProcessor(shared["image_processor"], tokenizer, num_image_tokens=4)
    original.save_pretrained(tmp_path)
    chats = [[user("What?", images[0])], [user("What is the object in the image?", images[1])]]
    expected = apply(original, chats, processor_kwargs={"padding": True})
    for processor in (SigPhiProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(processor) is SigPhiProcessor
        assert (processor.num_image_tokens, processor.image_token) == (4, "<image>")
        assert processor.chat_template == original.chat_template
        assert processor.tokenizer.padding_side == "left"
        inputs = apply(processor, chats, processor_kwargs={"padding": True})
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
