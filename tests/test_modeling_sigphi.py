"""The vision-language model: logits, loss, generation, precision, LoRA, the adapter form, merging."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)
from transformers.utils import is_flash_attn_2_available

from sigphi import SigPhiConfig, SigPhiForConditionalGeneration, SigPhiModel
from sigphi.configuration.configuration_siglip_resnet import PHI_2
from sigphi.modeling.modeling_sigphi import base_quantization

SIX_LINEARS = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
# Name -> text config, whether its head has a bias, whether it shares the embedding's weights.
FAMILIES = {
    "phi": (lambda: PhiConfig(**SMALL), True, False),
    "llama": (lambda: LlamaConfig(**SMALL, tie_word_embeddings=False), False, False),
    "qwen2": (lambda: Qwen2Config(**SMALL, tie_word_embeddings=True), False, True),
    "gemma": (lambda: GemmaConfig(**SMALL, head_dim=16, tie_word_embeddings=True), False, True),
}
QUESTIONS = ["What?", "What is the object in the image?"]


def make_inputs(processor, images, questions=QUESTIONS):
    """Prompts of different lengths, with an image each, padded on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(images, questions, strict=False)
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@pytest.fixture
def inputs(tiny_vlm_processor, images):
    return make_inputs(tiny_vlm_processor, images)


def make_labels(inputs):
    """Supervise the last four tokens of the first text and the last two of the second."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -4:] = inputs["input_ids"][0, -4:]
    labels[1, -2:] = inputs["input_ids"][1, -2:]
    return labels


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# Composition ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def family(request, tiny_encoder, tokenizer):
    """A causal language model of transformers, and the VLM that is composed of a copy of it."""
    make_config, bias, tied = FAMILIES[request.param]
    language_model = AutoModelForCausalLM.from_config(make_config()).eval()
    config = SigPhiConfig(
        vision_config=tiny_encoder.vision_model.config,
        text_config=language_model.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        lm_head_bias=bias,
        tie_word_embeddings=tied,
    )
    vlm = SigPhiForConditionalGeneration.from_parts(config, tiny_encoder.vision_model, copy.deepcopy(language_model))
    return language_model, vlm.eval(), tied


def is_tied(model):
    return model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_text_only_logits_are_the_language_model_s(family, tokenizer, tmp_path):
    language_model, vlm, tied = family
    tokens = tokenizer(["The cat", "The dog is brown."], padding=True, return_tensors="pt")
    # At positions of padding, what the embedding says does not matter to either.
    real = tokens["attention_mask"].bool()
    expected = logits_of(language_model, tokens)[real]
    assert expected.std() > 0.1
    assert torch.equal(logits_of(vlm, tokens)[real], expected)
    vlm.save_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits_of(reloaded, tokens)[real], expected)


def test_tied_weights_stay_tied(family, tmp_path):
    _, vlm, tied = family
    assert is_tied(vlm) == tied
    vlm.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    reloaded, report = SigPhiForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert is_tied(reloaded) == tied
    assert torch.equal(reloaded.lm_head.weight, vlm.lm_head.weight)


def test_from_parts_keeps_the_parts_and_makes_only_the_projector(tiny_encoder, tiny_language_model, tiny_vlm):
    state = tiny_vlm.state_dict()
    for name, tensor in tiny_encoder.vision_model.state_dict().items():
        assert torch.equal(state.pop(f"model.vision_tower.{name}"), tensor), name
    for name, tensor in tiny_language_model.model.state_dict().items():
        assert torch.equal(state.pop(f"model.language_model.{name}"), tensor), name
    assert torch.equal(state.pop("lm_head.weight"), tiny_language_model.lm_head.weight)
    assert torch.equal(state.pop("lm_head.bias"), tiny_language_model.lm_head.bias)
    assert {name.split(".")[1] for name in state} == {"multi_modal_projector"}
    assert not any(tensor.is_meta for tensor in tiny_vlm.state_dict().values())


@pytest.mark.parametrize("made", ["composed", "new", "missing keys"])
def test_the_projector_keeps_the_scale_of_its_input(tiny_vlm, tmp_path, made):
    model = tiny_vlm
    if made == "new":
        model = SigPhiForConditionalGeneration(tiny_vlm.config)
    elif made == "missing keys":
        tiny_vlm.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "projector" not in name}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        model = SigPhiForConditionalGeneration.from_pretrained(tmp_path)
    projector = model.model.multi_modal_projector
    for linear in (projector.linear_1, projector.linear_2):
        assert linear.weight.std().item() == pytest.approx(linear.in_features**-0.5, rel=0.1)
        assert not linear.bias.any()


# The image -----------------------------------------------------------------------------------------------------------


def test_one_soft_token_is_the_normalised_embedding(tiny_vlm, tiny_encoder):
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = tiny_vlm.model.get_vision_features(pixels)
        embeds = tiny_encoder(pixel_values=pixels).image_embeds
    assert features.shape == (3, 1, 32)
    torch.testing.assert_close(features[:, 0], embeds * 32**0.5)


@pytest.mark.parametrize("side", [2, 4])
def test_more_soft_tokens_are_the_averaged_cells_of_the_feature_map(make_vlm, side):
    model = make_vlm(num_image_tokens=side * side)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = model.model.get_vision_features(pixels)
        grid = model.model.vision_tower(pixels).last_hidden_state
    step = grid.shape[-1] // side
    for index in range(side * side):
        row, column = index // side * step, index % side * step
        cell = grid[:, :, row : row + step, column : column + step].mean((2, 3))
        torch.testing.assert_close(features[:, index], cell)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_image_tower_gives_the_same_features_under_autocast(make_vlm, tokens, dtype):
    model = make_vlm(num_image_tokens=tokens).model
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.requires_grad_(False).get_vision_features(pixels)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(model.get_vision_features(pixels), expected)
        trained = model.requires_grad_(True).get_vision_features(pixels)
    assert not torch.equal(trained, expected)


@pytest.mark.parametrize("num_image_tokens", [1, 4, 16])
def test_the_image_reaches_the_logits(make_vlm, tiny_vlm_processor, images, num_image_tokens):
    model = make_vlm(num_image_tokens=num_image_tokens)
    tiny_vlm_processor.num_image_tokens = num_image_tokens
    inputs = make_inputs(tiny_vlm_processor, images)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(-1).tolist() == 2 * [num_image_tokens]
    logits = logits_of(model, inputs)
    swapped = logits_of(model, inputs | {"pixel_values": inputs["pixel_values"].flip(0)})
    assert (logits[:, -1] - swapped[:, -1]).abs().amax(-1).min() > 1e-2
    # What stands before the image cannot know of it.
    first = int((inputs["input_ids"][1] == model.config.image_token_id).nonzero()[0])
    torch.testing.assert_close(logits[1, :first], swapped[1, :first])


@pytest.mark.parametrize("num_image_tokens", [1, 16])
def test_each_soft_token_takes_its_placeholder(make_vlm, tiny_vlm_processor, images, num_image_tokens):
    model = make_vlm(num_image_tokens=num_image_tokens)
    tiny_vlm_processor.num_image_tokens = num_image_tokens
    inputs = make_inputs(tiny_vlm_processor, images)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"].clamp(max=511)).clone()
        soft_tokens = model.get_image_features(inputs["pixel_values"]).pooler_output
        for row in range(2):
            places = (inputs["input_ids"][row] == model.config.image_token_id).nonzero()[:, 0]
            for place, soft_token in zip(places, soft_tokens[row], strict=True):
                embeds[row, place] = soft_token
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
        expected = model.lm_head(hidden.last_hidden_state)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits_of(model, inputs)[real], expected[real], rtol=1e-4, atol=1e-5)


def test_image_features_equal_pixel_values(tiny_vlm, inputs):
    with torch.no_grad():
        features = tiny_vlm.model.get_vision_features(inputs["pixel_values"])
    texts = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    expected = logits_of(tiny_vlm, inputs)
    assert torch.equal(logits_of(tiny_vlm, texts | {"image_features": features}), expected)
    answers = tiny_vlm.generate(**inputs, max_new_tokens=6, do_sample=False)
    for use_cache in (True, False):
        same = tiny_vlm.generate(
            **texts, image_features=features, max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        assert torch.equal(same, answers)


def test_inputs_embeds_equal_input_ids(tiny_vlm, inputs):
    with torch.no_grad():
        embeds = tiny_vlm.get_input_embeddings()(inputs["input_ids"])
    others = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    real = inputs["attention_mask"].bool()
    logits = logits_of(tiny_vlm, others | {"pixel_values": inputs["pixel_values"]})
    torch.testing.assert_close(logits[real], logits_of(tiny_vlm, inputs)[real], rtol=1e-4, atol=1e-5)


def test_placeholders_beyond_the_embedding_need_no_row(tiny_vlm, inputs):
    expected = logits_of(tiny_vlm, inputs)
    image, pad = tiny_vlm.config.image_token_id, tiny_vlm.config.pad_token_id
    tiny_vlm.config.image_token_id, tiny_vlm.config.pad_token_id = 600, 601
    ids = inputs["input_ids"]
    ids = ids.masked_fill(ids == image, 600).masked_fill(ids == pad, 601)
    assert torch.equal(logits_of(tiny_vlm, inputs | {"input_ids": ids}), expected)


@pytest.mark.parametrize(
    ("rows", "pictures", "message"),
    [
        (slice(0, 2), slice(0, 1), "1 images give 1 features, but the text has 2 image tokens"),
        (slice(0, 1), slice(0, 2), "2 images give 2 features, but the text has 1 image tokens"),
        (slice(0, 2), None, "0 images give 0 features, but the text has 2 image tokens"),
    ],
)
def test_mismatched_placeholders_give_both_numbers(tiny_vlm, inputs, rows, pictures, message):
    fields = {"input_ids": inputs["input_ids"][rows], "attention_mask": inputs["attention_mask"][rows]}
    if pictures is not None:
        fields["pixel_values"] = inputs["pixel_values"][pictures]
    with pytest.raises(ValueError, match=message):
        tiny_vlm(**fields)
    with pytest.raises(ValueError, match=message):
        tiny_vlm.generate(**fields, max_new_tokens=2)


def test_contradicting_inputs(tiny_vlm, inputs):
    with pytest.raises(ValueError, match="Give `pixel_values` or `image_features`, not both"):
        tiny_vlm(**inputs, image_features=torch.zeros(2, 1, 32))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        tiny_vlm(**inputs, inputs_embeds=torch.zeros(2, 3, 64))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        tiny_vlm(pixel_values=inputs["pixel_values"])


# Loss ----------------------------------------------------------------------------------------------------------------


def naive_cross_entropy(logits, labels, count=None):
    """Token by token: position t predicts label t + 1."""
    terms = []
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            target = labels[row, position + 1]
            if target != -100:
                terms.append(-torch.log(torch.softmax(logits[row, position].double(), -1)[target]))
    return sum(terms) / (count or len(terms))


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients_match(actual, expected):
    assert actual.keys() == expected.keys()
    assert sum(gradient.abs().sum() for gradient in expected.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("num_items_in_batch", [None, 3])
def test_loss_equals_its_naive_twin(tiny_vlm, inputs, num_items_in_batch):
    labels = make_labels(inputs)
    twin = naive_cross_entropy(tiny_vlm(**inputs).logits, labels, num_items_in_batch)
    expected = gradients_of(tiny_vlm, twin)
    output = tiny_vlm(**inputs, labels=labels, num_items_in_batch=num_items_in_batch)
    torch.testing.assert_close(output.loss.double(), twin.detach(), rtol=1e-5, atol=1e-6)
    assert_gradients_match(gradients_of(tiny_vlm, output.loss), expected)


def test_accumulated_parts_equal_the_whole(tiny_vlm, inputs):
    labels = make_labels(inputs)
    whole = tiny_vlm(**inputs, labels=labels).loss
    count = torch.tensor(6)
    parts = [
        tiny_vlm(**{k: v[i : i + 1] for k, v in inputs.items()}, labels=labels[i : i + 1], num_items_in_batch=count)
        for i in range(2)
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole)


def test_a_label_at_the_first_position_is_predicted_by_nothing(tiny_vlm, inputs):
    labels = make_labels(inputs)
    expected = tiny_vlm(**inputs, labels=labels).loss
    labels[:, 0] = 5
    assert torch.equal(tiny_vlm(**inputs, labels=labels).loss, expected)


@pytest.mark.parametrize("training", [True, False])
def test_only_supervised_positions_reach_the_head_in_training(tiny_vlm, inputs, training):
    rows = []
    tiny_vlm.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    output = tiny_vlm.train(training)(**inputs, labels=make_labels(inputs))
    assert rows == ([6] if training else [6, inputs["input_ids"].numel()])
    assert (output.logits is None) == training
    if not training:
        assert torch.equal(output.logits, logits_of(tiny_vlm, inputs))


def test_logits_are_there_in_training_without_labels(tiny_vlm, inputs):
    assert tiny_vlm.train()(**inputs).logits.shape == (*inputs["input_ids"].shape, 512)


def test_logits_to_keep(tiny_vlm, inputs):
    logits = logits_of(tiny_vlm, inputs)
    assert torch.equal(logits_of(tiny_vlm, inputs | {"logits_to_keep": 3}), logits[:, -3:])
    chosen = torch.tensor([0, 5])
    assert torch.equal(logits_of(tiny_vlm, inputs | {"logits_to_keep": chosen}), logits[:, chosen])


def test_a_batch_without_supervised_tokens_is_an_error(tiny_vlm, inputs):
    labels = torch.full_like(inputs["input_ids"], -100)
    with pytest.raises(ValueError, match=r"`labels` of shape \(2, \d+\) has no supervised token"):
        tiny_vlm(**inputs, labels=labels)
    labels[:, 0] = 5  # no position predicts it
    with pytest.raises(ValueError, match="has no supervised token"):
        tiny_vlm(**inputs, labels=labels)


# Generation ----------------------------------------------------------------------------------------------------------


def greedy(model, inputs, **options):
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return answer[:, inputs["input_ids"].shape[1] :]


def until_eos(row, eos):
    row = row.tolist()
    return row[: row.index(eos) + 1] if eos in row else row


def test_batched_answers_equal_single_ones(tiny_vlm, tiny_vlm_processor, images, inputs):
    batched = greedy(tiny_vlm, inputs)
    eos = tiny_vlm.generation_config.eos_token_id
    for row, (image, question) in enumerate(zip(images[:2], QUESTIONS, strict=True)):
        single = greedy(tiny_vlm, make_inputs(tiny_vlm_processor, [image], [question]))
        assert until_eos(batched[row], eos) == until_eos(single[0], eos)
    assert batched[0].tolist() != batched[1].tolist()


def test_another_image_gets_another_answer(tiny_vlm, inputs):
    swapped = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert not torch.equal(greedy(tiny_vlm, inputs), greedy(tiny_vlm, swapped))


def test_generation_equals_repeated_forward_passes(tiny_vlm, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    suppressed = tiny_vlm.generation_config.suppress_tokens
    for _ in range(4):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        fields = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        logits = logits_of(tiny_vlm, fields | {"pixel_values": inputs["pixel_values"]})[:, -1]
        logits[:, suppressed] = float("-inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    answer = tiny_vlm.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(answer, ids)


def test_cache_equals_no_cache(tiny_vlm, inputs):
    assert torch.equal(greedy(tiny_vlm, inputs, use_cache=True), greedy(tiny_vlm, inputs, use_cache=False))


def test_the_image_is_read_once_an_answer(tiny_vlm, inputs):
    calls = []
    tiny_vlm.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    greedy(tiny_vlm, inputs, eos_token_id=None)
    assert len(calls) == 1


def test_generation_stops_at_the_end_of_text(tiny_vlm, inputs):
    free = greedy(tiny_vlm, inputs, eos_token_id=None)
    stop = int(free[0, 3])
    answer = greedy(tiny_vlm, inputs, eos_token_id=stop)
    expected = until_eos(free[0], stop)
    assert answer[0, : len(expected)].tolist() == expected
    assert set(answer[0, len(expected) :].tolist()) <= {tiny_vlm.config.pad_token_id}
    with torch.no_grad():
        tiny_vlm.lm_head.bias[tiny_vlm.generation_config.eos_token_id] = 1e4
    assert greedy(tiny_vlm, inputs).tolist() == [[0], [0]]


def test_placeholder_and_padding_are_never_answered(tiny_vlm, inputs, tmp_path):
    forbidden = [tiny_vlm.config.image_token_id, tiny_vlm.config.pad_token_id]
    assert tiny_vlm.generation_config.suppress_tokens == forbidden
    with torch.no_grad():
        tiny_vlm.lm_head.bias[forbidden] = 1e4
    tiny_vlm.save_pretrained(tmp_path)
    for model in (tiny_vlm, SigPhiForConditionalGeneration.from_pretrained(tmp_path)):
        answer = greedy(model, inputs, eos_token_id=None)
        assert not set(forbidden) & set(answer.flatten().tolist())


def test_tokens_without_a_row_in_the_head_are_not_suppressed(tiny_encoder, tiny_language_model):
    config = SigPhiConfig(
        vision_config=tiny_encoder.vision_model.config,
        text_config=tiny_language_model.config,
        image_token_id=512,
        pad_token_id=513,
    )
    vlm = SigPhiForConditionalGeneration.from_parts(config, tiny_encoder.vision_model, tiny_language_model)
    assert vlm.generation_config.suppress_tokens is None


# Attention, precision, training --------------------------------------------------------------------------------------


def test_attention_implementations_agree(tiny_vlm, inputs, tmp_path):
    tiny_vlm.save_pretrained(tmp_path)
    logits = {}
    for name in ("eager", "sdpa"):
        model = SigPhiForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=name)
        assert model.model.language_model.config._attn_implementation == name
        logits[name] = logits_of(model, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits["eager"][real], logits["sdpa"][real], rtol=1e-5, atol=1e-5)


def test_composing_leaves_the_language_model_s_attention_as_it_is(tiny_encoder, base_folder):
    language_model = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    config = SigPhiConfig(vision_config=tiny_encoder.vision_model.config, text_config=language_model.config)
    vlm = SigPhiForConditionalGeneration.from_parts(config, tiny_encoder.vision_model, language_model)
    assert vlm.model.language_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, SigPhiForConditionalGeneration])
def test_attention_reaches_the_base_of_the_adapter_form(adapter_folder, loader):
    model = loader.from_pretrained(adapter_folder)
    assert model.model.language_model.config._attn_implementation == "sdpa"
    model = loader.from_pretrained(adapter_folder, attn_implementation="eager")
    assert model.model.language_model.config._attn_implementation == "eager"


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash_attn is installed")
def test_flash_attention_without_its_package(tiny_vlm, tmp_path):
    tiny_vlm.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but .* installed"):
        SigPhiForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_dtype_reaches_every_part(tiny_vlm, inputs, tmp_path):
    tiny_vlm.save_pretrained(tmp_path)
    model = SigPhiForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    logits = logits_of(model, inputs)
    assert logits.dtype == torch.bfloat16
    real = inputs["attention_mask"].bool()
    assert F.cosine_similarity(logits[real].float(), logits_of(tiny_vlm, inputs)[real], dim=-1).min() > 0.99


def test_gradient_checkpointing_changes_no_gradient(tiny_vlm, inputs):
    labels = make_labels(inputs)
    checkpointed = copy.deepcopy(tiny_vlm)
    checkpointed.gradient_checkpointing_enable()
    calls = []
    checkpointed.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    loss, loss_2 = (m.train()(**inputs, labels=labels).loss for m in (tiny_vlm, checkpointed))
    assert torch.equal(loss, loss_2)
    assert_gradients_match(gradients_of(checkpointed, loss_2), gradients_of(tiny_vlm, loss))
    assert len(calls) == 2
    for name, buffer in tiny_vlm.named_buffers():
        assert torch.equal(checkpointed.get_buffer(name), buffer), name


def test_a_frozen_image_tower_does_not_move_in_training(tiny_vlm, inputs):
    tower = tiny_vlm.model.vision_tower
    before = copy.deepcopy(tower.state_dict())
    tower.requires_grad_(False)
    tiny_vlm.train()
    assert tiny_vlm.model.language_model.training
    assert tiny_vlm.model.multi_modal_projector.training
    assert not any(module.training for module in tower.modules())
    tiny_vlm(**inputs, labels=make_labels(inputs)).loss.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())
    tower.requires_grad_(True)
    tiny_vlm.train()(**inputs)
    assert tower.training
    assert tower.state_dict()["embedder.normalization.num_batches_tracked"] == 1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_lora_only_lora_and_projector_learn(tiny_lora_vlm, inputs, checkpointing):
    model = tiny_lora_vlm
    model.model.vision_tower.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    gradients = gradients_of(model, model.train()(**inputs, labels=make_labels(inputs)).loss)
    assert all("lora_" in name or "multi_modal_projector" in name for name in gradients)
    assert {name for name in gradients if "lora_B" in name} == {
        n for n, _ in model.named_parameters() if "lora_B" in n
    }
    assert sum("lora_B" in name for name in gradients) == 2 * len(SIX_LINEARS)
    assert sum("multi_modal_projector" in name for name in gradients) == 4
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name


# Adapter form --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter_folder(tiny_lora_vlm, tmp_path):
    folder = tmp_path / "adapter"
    tiny_lora_vlm.save_pretrained(folder)
    return folder


def test_the_adapter_form_holds_no_base_weights(tiny_lora_vlm, adapter_folder):
    own = load_file(adapter_folder / "model.safetensors")
    assert {".".join(name.split(".")[:2]) for name in own} == {"model.vision_tower", "model.multi_modal_projector"}
    assert not (adapter_folder / "adapter_config.json").exists()
    assert sorted(path.name for path in (adapter_folder / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    lora = load_file(adapter_folder / "lora" / "adapter_model.safetensors")
    assert len(lora) == 2 * 2 * len(SIX_LINEARS)
    assert all("lora_" in name for name in lora)
    state = tiny_lora_vlm.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())


def test_the_adapter_form_loads_exactly(tiny_lora_vlm, adapter_folder, inputs):
    expected = logits_of(tiny_lora_vlm, inputs)
    model = AutoModelForImageTextToText.from_pretrained(adapter_folder)
    assert type(model) is SigPhiForConditionalGeneration
    assert not model.training
    assert torch.equal(logits_of(model, inputs), expected)
    assert torch.equal(greedy(model, inputs), greedy(tiny_lora_vlm, inputs))
    headless = AutoModel.from_pretrained(adapter_folder)
    assert type(headless) is SigPhiModel
    with torch.no_grad():
        hidden = tiny_lora_vlm.model(**inputs).last_hidden_state
        assert torch.equal(headless(**inputs).last_hidden_state, hidden)


def without_weights(folder, *names):
    """Take tensors out of the file of weights of a folder, and put a stranger into it."""
    weights = load_file(folder / "model.safetensors")
    for name in names:
        del weights[name]
    weights["model.stranger.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("loader", [AutoModelForImageTextToText, SigPhiForConditionalGeneration, AutoModel])
def test_loading_the_adapter_form_whole_says_so(tiny_lora_vlm, adapter_folder, inputs, loader):
    model, info = loader.from_pretrained(adapter_folder, output_loading_info=True)
    expected = tiny_lora_vlm.model if loader is AutoModel else tiny_lora_vlm
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected(**inputs)[0])
    _, info_of_whole = AutoModelForCausalLM.from_pretrained(model.config.base_language_model, output_loading_info=True)
    assert info == info_of_whole, "the same keys, with nothing under any of them"


def test_what_the_base_of_the_adapter_form_lacks_is_named_as_in_the_vlm(adapter_folder, base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    without_weights(base, "model.layers.1.mlp.fc1.weight", "lm_head.weight")
    options = {"base_language_model": str(base), "output_loading_info": True}
    _, info = SigPhiForConditionalGeneration.from_pretrained(adapter_folder, **options)
    assert info["missing_keys"] == {"model.language_model.layers.1.mlp.fc1.weight", "lm_head.weight"}
    assert info["unexpected_keys"] == {"model.language_model.stranger.weight"}
    _, info = AutoModel.from_pretrained(adapter_folder, **options)
    assert info["missing_keys"] == {"language_model.layers.1.mlp.fc1.weight"}
    assert info["unexpected_keys"] == {"language_model.stranger.weight"}


def test_of_a_base_inside_a_vlm_only_the_language_model_counts(tiny_vlm, adapter_folder, tmp_path):
    tiny_vlm.save_pretrained(tmp_path / "vlm")
    lacking = ["model.vision_tower.projection.weight", "model.language_model.layers.1.mlp.fc1.weight"]
    without_weights(tmp_path / "vlm", *lacking)
    _, info = SigPhiForConditionalGeneration.from_pretrained(
        adapter_folder, base_language_model=str(tmp_path / "vlm"), output_loading_info=True
    )
    assert info["missing_keys"] == {lacking[1]}, "the tower is that of the adapter form"
    assert info["unexpected_keys"] == {"model.stranger.weight"}


def test_the_sizes_that_do_not_fit_are_named_as_in_the_vlm(adapter_folder, base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.fc1.bias"] = torch.zeros(3)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    options = {"base_language_model": str(base), "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = SigPhiForConditionalGeneration.from_pretrained(adapter_folder, **options)
    name = "model.language_model.layers.1.mlp.fc1.bias"
    [(found, stored, wanted)] = info["mismatched_keys"]
    assert (found, tuple(stored), tuple(wanted)) == (name, (3,), (model.config.text_config.intermediate_size,))


def test_lora_changes_the_logits(tiny_lora_vlm, tiny_vlm, inputs):
    assert (logits_of(tiny_lora_vlm, inputs) - logits_of(tiny_vlm, inputs)).abs().max() > 1e-2


def test_a_loaded_adapter_form_saves_the_same_again(adapter_folder, tmp_path):
    model = SigPhiForConditionalGeneration.from_pretrained(adapter_folder)
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "lora/adapter_model.safetensors"):
        first, second = load_file(adapter_folder / file), load_file(tmp_path / "again" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert (adapter_folder / "lora/adapter_config.json").read_text() == (
        tmp_path / "again/lora/adapter_config.json"
    ).read_text()


def test_saving_a_given_state_dict_saves_that_one(tiny_lora_vlm, tmp_path):
    state = {name: torch.full_like(tensor, 2) for name, tensor in tiny_lora_vlm.state_dict().items()}
    tiny_lora_vlm.save_pretrained(tmp_path, state_dict=state)
    for file in ("model.safetensors", "lora/adapter_model.safetensors"):
        tensors = load_file(tmp_path / file)
        assert tensors
        assert all((tensor == 2).all() for tensor in tensors.values())


def test_peft_reads_the_lora_on_the_base_itself(tiny_lora_vlm, adapter_folder, base_folder, tokenizer):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(base_folder)
    tokens = tokenizer("The cat is brown.", return_tensors="pt")
    plain = logits_of(base, tokens)
    peft_model = PeftModel.from_pretrained(base, str(adapter_folder), subfolder="lora").eval()
    assert peft_model.peft_config["default"].base_model_name_or_path == str(base_folder)
    assert torch.equal(logits_of(peft_model, tokens), logits_of(tiny_lora_vlm, tokens))
    assert not torch.allclose(plain, logits_of(tiny_lora_vlm, tokens))


def test_a_missing_base_names_repository_and_revision(adapter_folder, base_folder, inputs):
    for name in ("some-one/no-such-base", str(adapter_folder.parent / "gone")):
        with pytest.raises(OSError, match=rf"base language model '{name}' \(revision 'v3'\)"):
            SigPhiForConditionalGeneration.from_pretrained(
                adapter_folder, base_language_model=name, base_language_model_revision="v3"
            )
    with pytest.raises(OSError, match=r"revision 'main'"):
        AutoModelForImageTextToText.from_pretrained(adapter_folder, base_language_model="some-one/no-such-base")


def test_the_base_may_have_moved(tiny_lora_vlm, adapter_folder, base_folder, inputs, tmp_path):
    moved = shutil.copytree(base_folder, tmp_path / "moved")
    model = AutoModelForImageTextToText.from_pretrained(adapter_folder, base_language_model=str(moved))
    assert torch.equal(logits_of(model, inputs), logits_of(tiny_lora_vlm, inputs))


@pytest.mark.parametrize("file", ["model.safetensors", "lora/adapter_model.safetensors"])
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_broken_adapter_file_is_an_error(adapter_folder, file, fault):
    weights = load_file(adapter_folder / file)
    name = next(iter(weights))
    if fault == "missing":
        del weights[name]
    else:
        name = name.rpartition(".")[0] + ".surprise"
        weights[name] = torch.zeros(1)
    save_file(weights, adapter_folder / file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the model's adapter form: .*\(1 in all\)") as error:
        SigPhiForConditionalGeneration.from_pretrained(adapter_folder)
    assert name.split(".")[-2] in str(error.value)


def test_without_peft_only_the_adapter_form_is_refused(tiny_vlm, adapter_folder, inputs, tmp_path, run_child):
    tiny_vlm.save_pretrained(tmp_path / "merged")
    torch.save(dict(inputs), tmp_path / "inputs.pt")
    code = """
import sys
sys.modules["peft"] = None
import torch
from sigphi import SigPhiForConditionalGeneration
model = SigPhiForConditionalGeneration.from_pretrained("merged")
print(model(**torch.load("inputs.pt")).logits.double().sum().item())
try:
    SigPhiForConditionalGeneration.from_pretrained("adapter")
except ImportError as error:
    print(error)
"""
    total, message = run_child("import os\nos.chdir(os.environ['FOLDER'])\n" + code, FOLDER=tmp_path).splitlines()
    assert float(total) == pytest.approx(logits_of(tiny_vlm, inputs).double().sum().item())
    assert message == "adapter is in adapter form, which needs `peft`: pip install peft"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_lora_keeps_the_logits(tiny_lora_vlm, inputs, tmp_path, dtype):
    model = tiny_lora_vlm
    expected = logits_of(model, inputs)
    assert model.merge_lora() is model
    assert not any("lora" in name for name in model.state_dict())
    assert (model.config.lora, model.config.base_language_model, model.config.base_bits) == (None, None, 16)
    merged = logits_of(model, inputs)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    model.to(dtype).save_pretrained(tmp_path)
    expected = model.state_dict()
    reloaded, report = SigPhiForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = reloaded.state_dict()
    assert state.keys() == expected.keys()
    assert reloaded.dtype == dtype
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    if dtype == torch.float32:
        assert torch.equal(logits_of(reloaded, inputs), merged)


# Quantisation --------------------------------------------------------------------------------------------------------


def quantised(model):
    import bitsandbytes as bnb

    return {n for n, m in model.named_modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}


def linears_of_the_language_model(model):
    """Names of its linear layers, as they are without LoRA."""
    return {
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.fixture
def adapter_4bit_folder(tiny_lora_vlm, tmp_path):
    tiny_lora_vlm.config.base_bits = 4
    tiny_lora_vlm.save_pretrained(tmp_path / "adapter_4bit")
    return tmp_path / "adapter_4bit"


def test_base_quantization():
    assert base_quantization(16, torch.float32) is None
    assert base_quantization(8, torch.float32).load_in_8bit is True
    nf4 = base_quantization(4, torch.bfloat16)
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert nf4.bnb_4bit_compute_dtype == torch.bfloat16


def test_a_4_bit_base_quantises_its_linears_and_nothing_else(tiny_vlm, tiny_lora_vlm, adapter_4bit_folder, inputs):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(adapter_4bit_folder)
    expected = linears_of_the_language_model(tiny_vlm)
    assert {name.removesuffix(".base_layer") for name in quantised(model)} == expected
    assert len(expected) == 2 * len(SIX_LINEARS)
    state = tiny_lora_vlm.state_dict()
    for name, tensor in model.state_dict().items():
        if "lora_" in name or name.startswith(("lm_head", "model.vision_tower", "model.multi_modal_projector")):
            assert torch.equal(tensor, state[name]), name
    logits, exact = logits_of(model, inputs)[:, -1], logits_of(tiny_lora_vlm, inputs)[:, -1]
    assert not torch.equal(logits, exact)
    assert F.cosine_similarity(logits, exact).min() > 0.9
    again = SigPhiForConditionalGeneration.from_pretrained(adapter_4bit_folder)
    assert torch.equal(logits_of(again, inputs)[:, -1], logits)


def test_a_quantised_base_may_be_loaded_in_full(tiny_lora_vlm, adapter_4bit_folder, inputs):
    model = AutoModelForImageTextToText.from_pretrained(adapter_4bit_folder, base_bits=16)
    assert model.config.base_bits == 16
    assert not quantised(model)
    assert torch.equal(logits_of(model, inputs), logits_of(tiny_lora_vlm, inputs))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_of_a_quantised_base_saves_the_same_again(adapter_4bit_folder, tmp_path, inputs, bits):
    pytest.importorskip("bitsandbytes")
    model = SigPhiForConditionalGeneration.from_pretrained(adapter_4bit_folder, base_bits=bits)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "lora/adapter_model.safetensors"):
        first, second = load_file(adapter_4bit_folder / file), load_file(tmp_path / "again" / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    assert again.config.base_bits == bits
    assert len(quantised(again)) == 2 * len(SIX_LINEARS)
    assert torch.equal(logits_of(again, inputs), expected)


def test_a_full_base_may_be_loaded_quantised(tiny_vlm, adapter_folder):
    pytest.importorskip("bitsandbytes")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    by_bits = SigPhiForConditionalGeneration.from_pretrained(adapter_folder, base_bits=4)
    by_config = SigPhiForConditionalGeneration.from_pretrained(adapter_folder, quantization_config=options)
    expected = linears_of_the_language_model(tiny_vlm)
    for model, quant_type in ((by_bits, "nf4"), (by_config, "fp4")):
        assert {name.removesuffix(".base_layer") for name in quantised(model)} == expected
        layer = model.model.language_model.layers[0].mlp.fc1.base_layer
        assert layer.weight.quant_state.quant_type == quant_type


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_reaches_the_parts_of_the_adapter_form(adapter_folder, inputs, dtype):
    model = AutoModelForImageTextToText.from_pretrained(adapter_folder, dtype=dtype)
    assert model.model.language_model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert logits_of(model, inputs).dtype == torch.bfloat16


def test_the_precision_auto_is_the_stored_one(make_lora_vlm, tiny_vlm, tmp_path):
    make_lora_vlm().to(torch.bfloat16).save_pretrained(tmp_path / "adapter")
    tiny_vlm.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    for folder in (tmp_path / "adapter", tmp_path / "merged"):
        model = SigPhiForConditionalGeneration.from_pretrained(folder, dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Phi-2 at its real size, on the meta device: no memory, no seconds ---------------------------------------------------


@pytest.fixture(scope="module")
def full_size():
    """The VLM of a ResNet-50 and Phi-2."""
    with torch.device("meta"):
        return SigPhiForConditionalGeneration(SigPhiConfig())


def test_full_size_language_model_has_phi_2_s_parameters(full_size):
    count = sum(p.numel() for p in [*full_size.model.language_model.parameters(), *full_size.lm_head.parameters()])
    assert count == 2_779_683_840


def test_full_size_quantisation_spares_tower_projector_and_head(full_size):
    pytest.importorskip("bitsandbytes")
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(full_size.config.text_config)
    options = base_quantization(4, torch.bfloat16)
    language_model = replace_with_bnb_linear(language_model, ["lm_head"], options, pre_quantized=False)
    with torch.device("meta"):
        vlm = SigPhiForConditionalGeneration.from_parts(SigPhiConfig(), full_size.model.vision_tower, language_model)
    assert quantised(vlm) == linears_of_the_language_model(full_size)
    assert len(quantised(vlm)) == 32 * len(SIX_LINEARS)


def test_full_size_lora_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = SigPhiForConditionalGeneration(SigPhiConfig())
        model.add_lora({"r": 8, "lora_alpha": 16, "target_modules": SIX_LINEARS})
    lora = {name: p for name, p in model.model.language_model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in lora)
    hidden, inner, layers, rank = PHI_2["hidden_size"], PHI_2["intermediate_size"], PHI_2["num_hidden_layers"], 8
    by_hand = layers * rank * (4 * (hidden + hidden) + 2 * (hidden + inner))
    assert sum(parameter.numel() for parameter in lora.values()) == by_hand == 11_796_480


def test_hub_arguments_reach_the_weights_of_the_adapter_form(
    make_lora_vlm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lora_vlm().save_pretrained(tmp_path)
    seen = []

    def local_file(folder: str, name: str, **hub: Any) -> str:
        seen.append(hub)
        return str(Path(folder, name))

    monkeypatch.setattr("sigphi.modeling.modeling_sigphi.cached_file", local_file)
    SigPhiForConditionalGeneration.from_pretrained(str(tmp_path), revision="v1", local_files_only=True)
    assert seen == [{"revision": "v1", "local_files_only": True}] * 2
