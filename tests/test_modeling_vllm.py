"""
What vLLM's backend for models of transformers does with a saved VLM, replayed without vLLM.

After the code of vLLM 0.33 (`vllm/model_executor/models/transformers/`): which attributes it reads, how it builds the
model, names the weights, prepares prompts and calls the parts. Its kernels, its cache and its engine are not here.
"""

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor

from sigphi import SigPhiForConditionalGeneration, SigPhiModel, SigPhiProcessor

NUM_IMAGE_TOKENS = 4
PROMPT = "<image>Question: What color is the dog?\nAnswer:"


@pytest.fixture(scope="module")
def saved(make_vlm, shared, images, tmp_path_factory):
    """A folder with a whole VLM, and what the model gives here."""
    folder = tmp_path_factory.mktemp("vllm") / "vlm"
    model = make_vlm(num_image_tokens=NUM_IMAGE_TOKENS)
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"], num_image_tokens=NUM_IMAGE_TOKENS)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor(images=images[0], text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    return SimpleNamespace(
        folder=folder, inputs=inputs, logits=logits, processor=AutoProcessor.from_pretrained(folder)
    )


@pytest.fixture(autouse=True)
def attention():
    """An attention of one's own under the name `replayed`, as vLLM registers its; the layers that it has served."""
    served: list[int] = []

    def attend(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ):
        assert attention_mask is None and query.shape[0] == 1
        served.append(module.layer_idx)
        output = F.scaled_dot_product_attention(query, key, value, scale=scaling, is_causal=True)
        return output.transpose(1, 2).contiguous(), None  # (1, length, heads, head size)

    AttentionInterface.register("replayed", attend)
    yield served
    AttentionInterface._global_mapping.pop("replayed")


def built(folder: Any) -> Any:
    """The model without weights, its attention that of the server."""
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = "replayed"
    with init_empty_weights(include_buffers=False):
        return AutoModel.from_config(config, dtype=torch.float32).eval()


def loaded(folder: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model with its weights, by the names that the file has, and what is left for a head."""
    model = built(folder)
    weights = load_file(folder / "model.safetensors")
    ignored = [
        name
        for name in weights
        for pattern in model._keys_to_ignore_on_load_unexpected or ()
        if re.search(pattern, name)
    ]
    weights = {name: tensor for name, tensor in weights.items() if name not in ignored}
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    model.load_state_dict(own, assign=True)  # strict
    return model, {name: tensor for name, tensor in weights.items() if not name.startswith("model.")}


def test_the_class_is_found_and_takes_any_attention(saved):
    auto_map = json.loads((saved.folder / "config.json").read_text())["auto_map"]
    first = next(name for name in auto_map if name.startswith("AutoModel"))
    assert first == "AutoModel", "the first of these is asked whether it is compatible"
    assert auto_map[first] == "modeling_sigphi.SigPhiModel"
    assert SigPhiModel.is_backend_compatible()
    assert SigPhiModel._can_set_attn_implementation()


def test_the_config_says_that_there_is_more_than_text(saved):
    config = AutoConfig.from_pretrained(saved.folder)
    text_config = config.get_text_config()
    assert text_config is config.text_config is not config
    assert (text_config.vocab_size, text_config.hidden_size, text_config.num_hidden_layers) == (512, 64, 2)
    assert config.image_token_id < text_config.vocab_size, "its embedding is looked up"


def test_the_parts_are_found(saved):
    model = built(saved.folder)
    assert type(model) is SigPhiModel and not hasattr(model, "lm_head")
    assert model.get_decoder() is model.language_model
    assert model.get_encoder(modality="image") is model.vision_tower
    assert type(model.vision_tower) is not type(model)
    assert {name for name, _ in model.named_children()} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_head_is_among_the_weights(saved):
    # What is named in `_keys_to_ignore_on_load_unexpected` never arrives.
    model, head = loaded(saved.folder)
    assert head.keys() == {"lm_head.weight", "lm_head.bias"}
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_loading_by_transformers_leaves_nothing_to_be_ignored(saved):
    AutoModel.from_pretrained(saved.folder)
    assert not built(saved.folder)._keys_to_ignore_on_load_unexpected
    assert not SigPhiForConditionalGeneration.from_pretrained(saved.folder)._keys_to_ignore_on_load_unexpected


def test_the_replayed_calls_give_the_logits(saved, attention):
    model, head = loaded(saved.folder)
    with torch.no_grad():
        ids, pixels = saved.inputs["input_ids"][0], saved.inputs["pixel_values"]
        embeds = model.get_input_embeddings()(ids)  # (length, hidden_size)
        features = model.get_image_features(pixels, return_dict=True).pooler_output
        assert features.shape == (1, NUM_IMAGE_TOKENS, 64)
        embeds[ids == model.config.image_token_id] = features.flatten(0, 1)
        outputs = model(
            input_ids=None,
            inputs_embeds=embeds[None],
            use_cache=False,
            position_ids=torch.arange(len(ids))[None],
            return_dict=False,
        )
        logits = F.linear(outputs[0][0], head["lm_head.weight"], head["lm_head.bias"])
    assert attention == [0, 1]
    torch.testing.assert_close(logits, saved.logits, rtol=1e-4, atol=1e-4)


def test_nothing_waits_for_a_number_on_the_device(saved, attention):
    """Where a GPU's calls are recorded (CUDA graphs), reading a number back ends the recording with an error."""
    config = AutoConfig.from_pretrained(saved.folder)
    config.text_config._attn_implementation = "replayed"
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
        embeds, positions = torch.empty(1, 7, 64), torch.empty(1, 7, dtype=torch.long)
        states = model(inputs_embeds=embeds, position_ids=positions, use_cache=False, return_dict=False)[0]
        assert states.shape == (1, 7, 64)
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            model(input_ids=torch.empty(1, 7, dtype=torch.long), position_ids=positions, use_cache=False)


def test_the_plan_for_several_gpus_is_of_the_language_model(saved):
    model = built(saved.folder)
    layers = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))}
    plan = {name: [one for one in layers if re.fullmatch(name.replace("*", r"\d+"), one)] for name in model.tp_plan}
    assert all(plan.values()), "a name of the plan is none of the model"
    assert {one for found in plan.values() for one in found} == {
        name for name in layers if name.startswith("language_model.")
    }
    assert model.supports_pp_plan
    assert all(model.get_submodule(name) is not None for name in model._pp_plan)


# Processor -----------------------------------------------------------------------------------------------------------


def test_the_processor_says_what_an_image_becomes(saved):
    processor, image = saved.processor, Image.new("RGB", (50, 40))
    token = processor.image_token
    assert processor.tokenizer.encode(token, add_special_tokens=False) == [processor.image_token_id]
    for size in ([32, 32], [10_000, 10_000]):
        counts = processor._get_num_multimodal_tokens(image_sizes=(size,))
        assert counts["num_image_tokens"] == [NUM_IMAGE_TOKENS]
        assert list(counts["num_image_patches"]) == [1]
    prepared = processor(text=token, images=[image], return_text_replacement_offsets=True, return_tensors="pt")
    ((entry,),) = prepared["text_replacement_offsets"]
    assert entry["type"] == "image"
    ids = processor.tokenizer.encode(entry["replacement"], add_special_tokens=False)
    assert ids == [processor.image_token_id] * NUM_IMAGE_TOKENS == prepared["input_ids"][0].tolist()
    assert prepared["pixel_values"].shape == (1, 3, 32, 32)


def test_the_processor_names_its_inputs(saved):
    processor = saved.processor
    assert processor.image_processor.size == {"height": 32, "width": 32}
    assert not hasattr(processor, "video_processor") and not hasattr(processor, "feature_extractor")
    given = processor(
        text=PROMPT, images=[Image.new("RGB", (9, 9))], return_mm_token_type_ids=True, return_tensors="pt"
    )
    assert set(given) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    is_image = given["input_ids"] == processor.image_token_id
    assert torch.equal(given["mm_token_type_ids"].bool(), is_image) and is_image.sum() == NUM_IMAGE_TOKENS


def test_a_prompt_without_its_image_is_a_value_error(saved):
    # Which is where vLLM tokenises the prompt by itself.
    for text in (PROMPT, "What?"):
        with pytest.raises(ValueError, match="image"):
            saved.processor(text=text)


def test_chats_whose_images_come_by_another_way_become_prompts(saved):
    content = [{"type": "image"}, {"type": "text", "text": "What color is the dog?"}]
    prompt = saved.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == PROMPT
