"""The dual encoder: loss, towers, padding, saving without the text tower, precision, compilation, pipelines."""

import copy
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    BertConfig,
    BitsAndBytesConfig,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    pipeline,
)

from sigphi import SiglipResNetModel, sigmoid_loss
from sigphi.configuration.configuration_siglip_resnet import SiglipResNetVisionConfig
from sigphi.modeling.modeling_siglip_resnet import (
    AveragePooledConv2d,
    MaxPooledConv2d,
    OneCellConv2d,
    SiglipResNetVisionModel,
    pairwise_logits,
    right_padded,
)

TEXTS = ["a cat", "The dog is brown.", "A small frog sits on a green leaf."]
TOWER = "text_model.language_model."


def naive_loss(image_embeds, text_embeds, logit_scale, logit_bias, positives):
    """Equation 1 of the paper as it is written, pair by pair."""
    total = 0.0
    for i, image in enumerate(image_embeds):
        for j, text in enumerate(text_embeds):
            z = 1.0 if positives[i][j] else -1.0
            total = total + torch.log(
                1 / (1 + torch.exp(z * (-torch.exp(logit_scale) * image.dot(text) - logit_bias)))
            )
    return -total / len(image_embeds)


def embeddings(images, texts, dim=8):
    generator = torch.Generator().manual_seed(images * 31 + texts)
    rows = torch.randn(images + texts, dim, generator=generator, dtype=torch.float64)
    return F.normalize(rows[:images], dim=-1), F.normalize(rows[images:], dim=-1)


def loss_and_gradients(loss_function, image_embeds, text_embeds, positives, dtype):
    scale, bias = torch.tensor(math.log(10.0), dtype=dtype), torch.tensor(-10.0 + 3.0, dtype=dtype)
    leaves = [t.to(dtype).clone().requires_grad_() for t in (image_embeds, text_embeds, scale, bias)]
    loss = loss_function(*leaves, positives)
    return loss.detach(), torch.autograd.grad(loss, leaves)


POSITIVES = {
    "pairs": torch.eye(4, dtype=torch.bool),
    "repeated texts": torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool),
    "more texts than images": torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool),
    "more images than texts": torch.tensor([[1, 0], [1, 0], [0, 1]], dtype=torch.bool),
    "no positive": torch.zeros(2, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("name", POSITIVES)
def test_loss_equals_its_naive_twin(name):
    positives = POSITIVES[name]
    image_embeds, text_embeds = embeddings(*positives.shape)
    expected, expected_gradients = loss_and_gradients(naive_loss, image_embeds, text_embeds, positives, torch.float64)
    loss, gradients = loss_and_gradients(sigmoid_loss, image_embeds, text_embeds, positives, torch.float32)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert expected_gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-5)


def test_without_positives_image_i_belongs_to_text_i():
    pair = embeddings(4, 4)
    with_none, gradients_none = loss_and_gradients(sigmoid_loss, *pair, None, torch.float32)
    with_eye, gradients_eye = loss_and_gradients(sigmoid_loss, *pair, POSITIVES["pairs"], torch.float32)
    assert with_none == with_eye
    assert all(torch.equal(a, b) for a, b in zip(gradients_none, gradients_eye, strict=True))


def test_loss_at_the_paper_s_start_is_small_for_negatives():
    # b = -10 makes every pair a confident negative: the loss starts at about 10 for the one positive of each image.
    image_embeds, text_embeds = embeddings(8, 8, dim=4096)
    loss = sigmoid_loss(image_embeds, text_embeds, torch.tensor(math.log(10.0)), torch.tensor(-10.0))
    assert loss == pytest.approx(10.0, abs=0.5)


@pytest.mark.parametrize(
    ("shape", "positives", "message"),
    [
        ((2, 3), None, "`positives` is needed when the numbers .* differ, got 2 images and 3 texts"),
        ((2, 3), torch.zeros(3, 2), r"must have the shape \(images, texts\) = \(2, 3\), got \(3, 2\)"),
        ((3, 3), torch.zeros(3), r"must have the shape \(images, texts\) = \(3, 3\), got \(3,\)"),
    ],
)
def test_loss_errors(shape, positives, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(*embeddings(*shape), torch.tensor(1.0), torch.tensor(0.0), positives)


def test_logits_are_float32_under_autocast():
    image_embeds, text_embeds = (e.float() for e in embeddings(3, 5, dim=64))
    scale, bias = torch.tensor(math.log(10.0)), torch.tensor(-10.0)
    expected = pairwise_logits(image_embeds, text_embeds, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (image_embeds @ text_embeds.T).dtype == torch.bfloat16
        logits = pairwise_logits(image_embeds, text_embeds, scale, bias)
        loss = sigmoid_loss(image_embeds, text_embeds, scale, bias, torch.ones(3, 5, dtype=torch.bool))
    assert logits.dtype == loss.dtype == torch.float32
    assert torch.equal(logits, expected)


def encoder_inputs(tokenizer, texts=TEXTS, images=3, side="right"):
    tokens = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(images))
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "pixel_values": pixels}


def test_outputs_follow_from_the_embeddings(tiny_encoder, tokenizer):
    inputs = encoder_inputs(tokenizer, images=2)
    positives = torch.tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    with torch.no_grad():
        output = tiny_encoder(**inputs, positives=positives, return_loss=True)
        image = tiny_encoder.get_image_features(inputs["pixel_values"]).pooler_output
        text = tiny_encoder.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(output.image_embeds, image / image.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(output.text_embeds, text / text.norm(dim=-1, keepdim=True))
    expected = 10.0 * output.image_embeds @ output.text_embeds.T - 10.0
    torch.testing.assert_close(output.logits_per_image, expected)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    torch.testing.assert_close(
        output.loss,
        naive_loss(
            output.image_embeds, output.text_embeds, torch.tensor(math.log(10)), torch.tensor(-10.0), positives
        ),
    )


def test_each_modality_works_alone(tiny_encoder, tokenizer):
    inputs = encoder_inputs(tokenizer)
    with torch.no_grad():
        both = tiny_encoder(**inputs)
        image = tiny_encoder(pixel_values=inputs["pixel_values"])
        text = tiny_encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert both.loss is None
    assert torch.equal(image[0], both.image_embeds)
    assert torch.equal(text[0], both.text_embeds)
    assert set(image.keys()) == {"image_embeds", "vision_model_output", "pooler_output"}
    assert image.pooler_output is image.image_embeds
    assert set(text.keys()) == {"text_embeds", "text_model_output"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Give `pixel_values`, `input_ids`, or both"),
        (["pixel_values"], "`return_loss=True` needs both"),
        (["input_ids"], "`return_loss=True` needs both"),
    ],
)
def test_missing_modalities(tiny_encoder, tokenizer, names, message):
    inputs = {name: tensor for name, tensor in encoder_inputs(tokenizer).items() if name in names}
    with pytest.raises(ValueError, match=message):
        tiny_encoder(**inputs, return_loss=True)


# Initial values and loading ------------------------------------------------------------------------------------------


def test_initial_values_are_the_paper_s(tiny_encoder):
    assert tiny_encoder.logit_scale.item() == pytest.approx(math.log(10.0))
    assert tiny_encoder.logit_bias.item() == -10.0
    assert tiny_encoder.logit_scale.shape == tiny_encoder.logit_bias.shape == ()


def test_new_projection_keeps_the_scale_of_its_input(tiny_encoder):
    model = SiglipResNetModel(tiny_encoder.config)
    assert model.text_model.projection.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.1)


def test_a_missing_key_leaves_what_was_loaded(tiny_encoder, tmp_path):
    with torch.no_grad():
        tiny_encoder.logit_scale.fill_(2.5)
    tiny_encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = ("logit_bias", "vision_model.projection.weight")
    save_file({k: v for k, v in weights.items() if k not in removed}, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = SiglipResNetModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(removed)
    assert model.logit_scale.item() == 2.5
    assert model.logit_bias.item() == -10.0
    for name, tensor in model.state_dict().items():
        assert name in removed or torch.equal(tensor, weights[name]), name


def test_save_and_reload_gives_the_same_numbers(tiny_encoder, tokenizer, tmp_path):
    tiny_encoder.save_pretrained(tmp_path)
    inputs = encoder_inputs(tokenizer)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        model = auto.from_pretrained(tmp_path)
        assert type(model) is SiglipResNetModel
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits_per_image, tiny_encoder(**inputs).logits_per_image)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_resnet_classifier_loads_into_the_image_tower(tmp_path, layer_type):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type=layer_type, num_labels=5)
    classifier = ResNetForImageClassification(config).eval()
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
    classifier.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        tower, report = SiglipResNetVisionModel.from_pretrained(
            tmp_path, image_size=64, projection_dim=32, output_loading_info=True
        )
    assert set(report["missing_keys"]) == {"projection.weight", "projection.bias"}
    loaded = tower.state_dict()
    for name, tensor in classifier.resnet.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.resnet(pixels)
        output = tower(pixels)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.pooler_output, tower.projection(expected.pooler_output.flatten(1)))


def test_the_default_image_tower_has_resnet_50_s_weights():
    with torch.device("meta"):
        tower = SiglipResNetVisionModel(SiglipResNetVisionConfig())
        resnet = ResNetForImageClassification(ResNetConfig()).resnet
    shapes = {name: tensor.shape for name, tensor in tower.state_dict().items()}
    assert shapes.pop("projection.weight") == (512, 2048)
    assert shapes.pop("projection.bias") == (512,)
    assert shapes == {name: tensor.shape for name, tensor in resnet.state_dict().items()}
    # He et al., table 1, without the classifier's 2048 * 1000 + 1000.
    assert sum(parameter.numel() for parameter in resnet.parameters()) == 25_557_032 - 2_049_000


def assert_equals_twin(output, expected, leaves):
    """Values and gradients of float64, to rounding."""
    direction = torch.randn_like(expected)
    gradients = [torch.autograd.grad(values, leaves, direction) for values in (output, expected)]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride", "has_one_cell"),
    [
        (1, 1, 1, 1, True),
        (2, 2, 1, 2, True),
        (1, 2, 1, 2, True),
        (1, 1, 3, 1, True),
        (2, 2, 3, 2, True),
        (2, 1, 3, 2, True),
        (1, 2, 1, 1, False),
        (2, 2, 3, 1, False),
        (3, 2, 3, 2, False),
        (4, 4, 7, 2, False),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_to_one_cell_equals_its_naive_twin(
    monkeypatch, height, width, kernel, stride, has_one_cell, memory_format
):
    convolution = OneCellConv2d(3, 5, kernel, stride, kernel // 2).double().to(memory_format=memory_format)
    pixels = torch.randn(2, 3, height, width, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    leaves = (pixels, convolution.weight, convolution.bias)
    expected = F.conv2d(*leaves, stride=stride, padding=kernel // 2)
    assert_equals_twin(convolution(pixels), expected, leaves)
    assert (expected.shape[-2:] == (1, 1)) is has_one_cell
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, input: None)
    assert (convolution(pixels) is None) is not has_one_cell


@pytest.mark.parametrize("kind", [MaxPooledConv2d, AveragePooledConv2d])
@pytest.mark.parametrize(
    ("height", "width", "kernel"), [(6, 4, 3), (5, 3, 3), (5, 6, 1), (3, 3, 1), (1, 2, 3), (1, 1, 1)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pooled_convolution_equals_its_naive_twin(kind, height, width, kernel, memory_format):
    convolution = kind(3, 5, kernel, 1, kernel // 2).double().to(memory_format=memory_format)
    pixels = torch.randn(2, 3, height, width, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    leaves = (pixels, convolution.weight, convolution.bias)

    def convolve(cells):
        return F.conv2d(cells, *leaves[1:], padding=kernel // 2)

    def halve(cells, reduce):
        rows = [
            torch.stack([reduce(cells[:, :, i : i + 2, j : j + 2], (2, 3)) for j in range(0, cells.shape[3], 2)], 2)
            for i in range(0, cells.shape[2], 2)
        ]
        return torch.stack(rows, 2)

    is_max = kind is MaxPooledConv2d
    expected = halve(convolve(pixels), torch.amax) if is_max else convolve(halve(pixels, torch.mean))
    assert expected.shape == (2, 5, (height + 1) // 2, (width + 1) // 2)
    assert_equals_twin(convolution(pixels), expected, leaves)


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_every_stage_that_halves_its_map_pools_where_it_would_stride(layer_type):
    shape = {"layer_type": layer_type, "hidden_sizes": [8, 16], "embedding_size": 8, "depths": [2, 2], "stem": "cifar"}
    shape |= {"image_size": 16, "downsample_in_first_stage": True}
    striding = SiglipResNetVisionModel(SiglipResNetVisionConfig(**shape))
    pooling = SiglipResNetVisionModel(SiglipResNetVisionConfig(**shape, downsampling="pool"))
    pooling.load_state_dict(striding.state_dict())
    pooled = {name: type(module) for name, module in pooling.named_modules() if "Pooled" in type(module).__name__}
    strided = {name for name, module in striding.named_modules() if getattr(module, "stride", None) == (2, 2)}
    assert pooled.keys() == strided and len(pooled) == 4
    assert {name for name, kind in pooled.items() if kind is AveragePooledConv2d} == {
        f"encoder.stages.{stage}.layers.0.shortcut.convolution" for stage in (0, 1)
    }
    pixels = torch.randn(2, 3, 16, 16)
    maps = [tower.eval()(pixels).last_hidden_state for tower in (striding, pooling)]
    assert maps[0].shape == maps[1].shape == (2, 16, 4, 4)
    assert not torch.allclose(*maps)


def test_a_convolution_to_no_cell_is_an_error():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        OneCellConv2d(3, 5, 3)(torch.zeros(1, 3, 2, 2))


def test_a_resnet_on_images_of_32_pixels_ends_in_one_cell():
    shape = {"layer_type": "basic", "hidden_sizes": [8, 16, 16, 32], "embedding_size": 8, "depths": [1, 1, 1, 2]}
    tower = SiglipResNetVisionModel(SiglipResNetVisionConfig(image_size=32, **shape)).train()
    resnet = ResNetModel(ResNetConfig(**shape)).train()
    resnet.load_state_dict(tower.state_dict(), strict=False)
    pixels = torch.randn(4, 3, 32, 32)
    output, expected = tower(pixels).last_hidden_state, resnet(pixels).last_hidden_state
    assert output.shape == (4, 32, 1, 1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


# Padding and pooling -------------------------------------------------------------------------------------------------


def test_right_padded_moves_real_tokens_to_the_start():
    ids = torch.tensor([[9, 9, 1, 2], [3, 4, 5, 6], [7, 9, 9, 9], [9, 1, 9, 2]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1]])
    moved, moved_mask, last = right_padded(ids, mask)
    assert moved.tolist() == [[1, 2, 9, 9], [3, 4, 5, 6], [7, 9, 9, 9], [1, 2, 9, 9]]
    assert moved_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert last.tolist() == [1, 3, 0, 1]


def test_right_padded_without_a_mask_and_with_a_boolean_one():
    ids = torch.tensor([[5, 0, 6], [7, 8, 9]])
    moved, mask, last = right_padded(ids, None)
    assert torch.equal(moved, ids)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert last.tolist() == [2, 2]
    moved, mask, last = right_padded(ids, torch.tensor([[False, True, True], [True, True, False]]))
    assert moved.tolist() == [[0, 6, 5], [7, 8, 9]]
    assert last.tolist() == [1, 1]


def test_a_text_without_tokens_is_an_error(tiny_encoder):
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="`attention_mask` has no real token in row 1"):
        tiny_encoder(input_ids=torch.ones(2, 2, dtype=torch.long), attention_mask=mask)


def bert_config(pad_token_id):
    """A text tower with absolute positions that sees in both directions."""
    return BertConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=pad_token_id,
    )


@pytest.fixture(params=["phi", "bert"])
def any_encoder(request, tiny_encoder, tokenizer):
    """A dual encoder with a decoder, or with an encoder, for its text tower."""
    if request.param == "phi":
        return tiny_encoder
    config = copy.deepcopy(tiny_encoder.config)
    config.text_config = bert_config(tokenizer.pad_token_id)
    return SiglipResNetModel(config).eval()


def text_embeds(model, tokenizer, texts=TEXTS, side="right"):
    tokens = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_left_padding_equals_right_padding_bit_for_bit(any_encoder, tokenizer, pooling):
    any_encoder.config.text_pooling = pooling
    left, right = (text_embeds(any_encoder, tokenizer, side=side) for side in ("left", "right"))
    assert torch.equal(left, right)
    assert (left[0] - left[1]).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_pooling_equals_its_naive_twin(any_encoder, tokenizer, pooling):
    any_encoder.config.text_pooling = pooling
    tower, projection = any_encoder.text_model.language_model, any_encoder.text_model.projection
    for text, embed in zip(TEXTS, text_embeds(any_encoder, tokenizer), strict=True):
        with torch.no_grad():
            states = tower(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
            pooled = states[-1] if pooling == "last" else sum(states) / len(states)
            expected = F.normalize(projection(pooled), dim=-1)
        torch.testing.assert_close(embed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_what_stands_under_the_padding_never_matters(any_encoder, tokenizer, pooling, side):
    any_encoder.config.text_pooling = pooling
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt", padding_side=side)
    mask = tokens["attention_mask"]
    other = tokens["input_ids"].masked_fill(mask == 0, 77)
    assert not torch.equal(other, tokens["input_ids"])
    with torch.no_grad():
        first = any_encoder(input_ids=tokens["input_ids"], attention_mask=mask).text_embeds
        second = any_encoder(input_ids=other, attention_mask=mask).text_embeds
    assert torch.equal(first, second)


def test_pooled_states_may_be_computed_beforehand(any_encoder, tokenizer):
    inputs = encoder_inputs(tokenizer)
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = any_encoder(**inputs, return_loss=True)
        _, pooled = any_encoder.text_model.pool(**tokens)
        output = any_encoder(pixel_values=inputs["pixel_values"], text_features=pooled, return_loss=True)
    assert torch.equal(output.text_embeds, expected.text_embeds)
    assert torch.equal(output.loss, expected.loss)
    with pytest.raises(ValueError, match="Give `input_ids` or `text_features`, not both"):
        any_encoder(**tokens, text_features=pooled)


# The frozen text tower -----------------------------------------------------------------------------------------------


def tower_folder(model, folder):
    """Save the text tower alone, as the repository that an encoder without it names."""
    model.text_model.language_model.save_pretrained(folder)
    return folder


@pytest.fixture
def towerless(tiny_encoder, tmp_path):
    """The folder of an encoder that was saved without its text tower, which lies in another folder."""
    tower = tower_folder(tiny_encoder, tmp_path / "tower")
    tiny_encoder.config.include_text_tower = False
    tiny_encoder.config.text_model_name_or_path = str(tower)
    tiny_encoder.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_saving_without_the_text_tower_leaves_only_its_weights_out(tiny_encoder, towerless):
    saved = load_file(towerless / "model.safetensors")
    expected = {name for name in tiny_encoder.state_dict() if not name.startswith(TOWER)}
    assert set(saved) == expected
    assert "text_model.projection.weight" in saved
    # The model at hand keeps its tower.
    assert tiny_encoder.text_model.language_model is not None


def test_loading_builds_no_text_tower(tiny_encoder, towerless, tokenizer, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a text tower was built")

    monkeypatch.setattr(AutoModel, "from_config", refuse)
    model, report = SiglipResNetModel.from_pretrained(towerless, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.text_model.language_model is None
    pixels = encoder_inputs(tokenizer)["pixel_values"]
    with torch.no_grad():
        assert torch.equal(
            model.get_image_features(pixels).pooler_output, tiny_encoder.get_image_features(pixels).pooler_output
        )
        assert torch.equal(model(pixel_values=pixels).image_embeds, tiny_encoder(pixel_values=pixels).image_embeds)


def test_a_text_call_without_the_tower_names_what_is_missing(tiny_encoder, towerless, tokenizer):
    model = SiglipResNetModel.from_pretrained(towerless)
    model.config.text_model_name_or_path, model.config.text_model_revision = "some/tower", "v7"
    message = r"without its frozen text tower 'some/tower' \(revision 'v7'\); call `model\.load_text_tower\(\)`"
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        model.get_text_features(tokens["input_ids"], tokens["attention_mask"])
    with pytest.raises(ValueError, match=message):
        model(**encoder_inputs(tokenizer))


@pytest.mark.parametrize("by_argument", [False, True])
def test_load_text_tower_restores_the_text_embeddings(tiny_encoder, towerless, tokenizer, by_argument):
    model = SiglipResNetModel.from_pretrained(towerless)
    model.load_text_tower(*[str(towerless.parent / "tower")] * by_argument)
    assert torch.equal(text_embeds(model, tokenizer), text_embeds(tiny_encoder, tokenizer))
    assert not any(parameter.requires_grad for parameter in model.text_model.language_model.parameters())


def test_the_text_tower_takes_the_precision_of_the_encoder(towerless):
    model = SiglipResNetModel.from_pretrained(towerless, dtype=torch.bfloat16)
    model.load_text_tower()
    assert model.text_model.language_model.dtype == torch.bfloat16
    model.load_text_tower(dtype=torch.float32)
    assert model.text_model.language_model.dtype == torch.float32


def test_an_encoder_loaded_without_its_tower_saves_the_same_again(towerless, tmp_path):
    model = SiglipResNetModel.from_pretrained(towerless)
    model.load_text_tower()
    model.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (towerless, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_load_text_tower_errors(tiny_encoder, towerless, tmp_path, tokenizer):
    model = SiglipResNetModel.from_pretrained(towerless)
    with pytest.raises(OSError, match="nothing_here"):
        model.load_text_tower(str(tmp_path / "nothing_here"))
    config = bert_config(tokenizer.pad_token_id)
    config.hidden_size = 32
    AutoModel.from_config(config).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="small has hidden size 32, this encoder needs 64"):
        model.load_text_tower(str(tmp_path / "small"))
    model.config.text_model_name_or_path = None
    with pytest.raises(ValueError, match="`pretrained_model_name_or_path` is needed: the config names no text tower"):
        model.load_text_tower()


def test_a_frozen_text_tower_has_no_dropout(tiny_encoder, tokenizer):
    tower = tiny_encoder.text_model.language_model
    for module in tower.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    expected = text_embeds(tiny_encoder, tokenizer)
    tiny_encoder.train()
    assert tower.training
    assert not torch.equal(text_embeds(tiny_encoder, tokenizer), expected)
    tower.requires_grad_(False)
    tiny_encoder.train()
    assert tiny_encoder.vision_model.training
    assert not any(module.training for module in tower.modules())
    assert torch.equal(text_embeds(tiny_encoder, tokenizer), expected)


# Training ------------------------------------------------------------------------------------------------------------


def train_step(model, inputs):
    """Loss, gradients and BatchNorm statistics after one forward and backward pass in training mode."""
    model.train()
    torch.manual_seed(5)
    loss = model(**inputs, return_loss=True).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(model.named_buffers())


def test_gradient_checkpointing_changes_no_number(tiny_encoder, tokenizer):
    inputs = encoder_inputs(tokenizer)
    before = copy.deepcopy(dict(tiny_encoder.named_buffers()))
    checkpointed = copy.deepcopy(tiny_encoder)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.vision_model.gradient_checkpointing
    loss, gradients, buffers = train_step(tiny_encoder, inputs)
    loss_2, gradients_2, buffers_2 = train_step(checkpointed, inputs)
    assert torch.equal(loss, loss_2)
    assert gradients.keys() == gradients_2.keys()
    assert {"logit_scale", "logit_bias", "vision_model.embedder.convolution.weight"} <= gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_2[name], gradient, msg=name)
    for name, buffer in buffers.items():
        assert torch.equal(buffers_2[name], buffer), name
        if name.endswith("num_batches_tracked"):
            assert buffer == before[name] + 1
        if name.endswith("running_mean"):
            assert not torch.equal(buffer, before[name])


def test_gradient_checkpointing_with_frozen_batch_norm_and_without_momentum(tiny_encoder, tokenizer):
    for norm in (m for m in tiny_encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None  # then the statistics are the mean over all batches so far
    tiny_encoder.gradient_checkpointing_enable()
    tiny_encoder.vision_model.encoder.stages[0].register_forward_pre_hook(lambda stage, args: stage.eval() and None)
    before = copy.deepcopy(tiny_encoder.vision_model.encoder.stages.state_dict())
    train_step(tiny_encoder, encoder_inputs(tokenizer))
    for name, tensor in tiny_encoder.vision_model.encoder.stages.state_dict().items():
        if "running" in name or "num_batches" in name:
            assert torch.equal(tensor, before[name]) == name.startswith("0."), name
    norms = [m for m in tiny_encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum is None for norm in norms)


def test_gradient_checkpointing_needs_no_text_tower(tiny_encoder):
    tiny_encoder.text_model.language_model = None
    assert tiny_encoder.get_input_embeddings() is None
    tiny_encoder.gradient_checkpointing_enable()
    tiny_encoder.train()
    inputs = {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "text_features": torch.randn(2, tiny_encoder.config.text_config.hidden_size),
    }
    tiny_encoder(**inputs, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in tiny_encoder.parameters())


def test_gradient_checkpointing_recomputes_the_stages(tiny_encoder, tokenizer):
    tiny_encoder.gradient_checkpointing_enable()
    calls = []
    for index, stage in enumerate(tiny_encoder.vision_model.encoder.stages):
        # Before, not after: the second run stops as soon as it has what the backward pass needs.
        stage.register_forward_pre_hook(lambda *args, index=index: calls.append(index))
    train_step(tiny_encoder, encoder_inputs(tokenizer))
    assert sorted(calls) == [0, 0, 1, 1]


def test_every_weight_gets_a_gradient(tiny_encoder, tokenizer):
    train_step(tiny_encoder, encoder_inputs(tokenizer))
    without = [name for name, p in tiny_encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Phi's keys have a bias that shifts all scores of a query by the same amount.
    assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_batch_norm_moves_in_training_mode_and_not_in_evaluation_mode(tiny_encoder, tokenizer):
    before = {name: buffer.clone() for name, buffer in tiny_encoder.named_buffers() if "running" in name}
    tiny_encoder(**encoder_inputs(tokenizer))
    assert all(torch.equal(buffer, before[name]) for name, buffer in tiny_encoder.named_buffers() if name in before)
    tiny_encoder.train()(**encoder_inputs(tokenizer))
    assert not any(
        torch.equal(buffer, before[name]) for name, buffer in tiny_encoder.named_buffers() if name in before
    )


def test_bfloat16_is_close_to_float32(tiny_encoder, tokenizer):
    inputs = encoder_inputs(tokenizer)
    with torch.no_grad():
        expected = tiny_encoder(**inputs, return_loss=True)
        output = tiny_encoder.to(torch.bfloat16)(**inputs, return_loss=True)
    for name in ("image_embeds", "text_embeds"):
        assert output[name].dtype == torch.float32
        assert F.cosine_similarity(output[name], expected[name]).min() > 0.99
    assert torch.isfinite(output.logits_per_image).all()
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.05, atol=0)


def test_loading_in_bfloat16_gives_the_rounded_weights(tiny_encoder, tmp_path):
    tiny_encoder.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    expected = tiny_encoder.state_dict()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(torch.bfloat16)), name


def assert_compiled_equals_eager(model, inputs, **options):
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(**inputs)
        output = torch.compile(model, **options)(**inputs)
    for name in expected:
        if isinstance(expected[name], torch.Tensor):
            torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-4)


# "aot_eager" traces as the default does, and leaves out the minutes of C++ that nothing of ours depends on.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_image_tower_is_one_graph_and_equals_eager(tiny_encoder, tokenizer, backend):
    pixels = encoder_inputs(tokenizer)["pixel_values"]
    assert_compiled_equals_eager(tiny_encoder.vision_model, {"pixel_values": pixels}, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_model_equals_eager(tiny_encoder, tokenizer, backend):
    inputs = encoder_inputs(tokenizer) | {"return_loss": True}
    assert_compiled_equals_eager(tiny_encoder, inputs, backend=backend)


# Pipelines -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder_folder(tiny_encoder, tiny_encoder_processor, tmp_path):
    tiny_encoder.save_pretrained(tmp_path)
    tiny_encoder_processor.save_pretrained(tmp_path)
    return tmp_path


def test_zero_shot_pipeline_gives_the_sigmoid_of_the_logits(tiny_encoder, encoder_folder, images):
    labels = ["cat", "dog", "ship"]
    classify = pipeline("zero-shot-image-classification", model=str(encoder_folder), trust_remote_code=True)
    answers = classify(images, candidate_labels=labels, hypothesis_template="This is a photo of a {}.")
    processor = AutoProcessor.from_pretrained(encoder_folder)
    texts = [f"This is a photo of a {label}." for label in labels]
    with torch.no_grad():
        inputs = processor(images=images, text=texts, padding="max_length", max_length=64, return_tensors="pt")
        expected = tiny_encoder(**inputs).logits_per_image.sigmoid()
    for answer, row in zip(answers, expected, strict=True):
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores[label] for label in labels] == pytest.approx(row.tolist(), rel=1e-4)
        assert [item["score"] for item in answer] == sorted(scores.values(), reverse=True)


def test_image_feature_extraction_pipeline_gives_the_image_embeddings(tiny_encoder, encoder_folder, images):
    extract = pipeline("image-feature-extraction", model=str(encoder_folder), trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(encoder_folder)
    for image in images:
        with torch.no_grad():
            expected = tiny_encoder(**processor(images=image, return_tensors="pt")).image_embeds
        torch.testing.assert_close(torch.tensor(extract(image)), expected, rtol=1e-4, atol=1e-5)


# Quantised by its reader ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, ["fc1"]])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_reader_s_own_quantisation_is_of_the_text_tower_alone(
    tiny_encoder, tiny_encoder_processor, images, tmp_path, bits, given
):
    pytest.importorskip("bitsandbytes")
    tiny_encoder.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=given)
    model = AutoModel.from_pretrained(tmp_path, quantization_config=options)
    assert options.llm_int8_skip_modules == given, "the reader's object stays as it is"
    tower = {
        name for name, module in tiny_encoder.text_model.language_model.named_modules() if type(module) is nn.Linear
    }
    expected = {f"text_model.language_model.{name}" for name in tower if given is None or not name.endswith("fc1")}
    kinds = ("Linear4bit", "Linear8bitLt")
    assert {name for name, module in model.named_modules() if type(module).__name__ in kinds} == expected
    inputs = tiny_encoder_processor(images=images, text=["a cat", "a dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs, original = model(**inputs), tiny_encoder(**inputs)
    torch.testing.assert_close(outputs.image_embeds, original.image_embeds, rtol=1e-3, atol=1e-3)
    assert F.cosine_similarity(outputs.text_embeds, original.text_embeds).min() > 0.9
