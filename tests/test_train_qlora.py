"""The VLM put together for training: what is quantised, what LoRA adapts, what is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, Originals, token_ids
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sigphi import SigPhiForConditionalGeneration
from sigphi.modeling.modeling_sigphi import keep_4bit_weights
from sigphi.train import qlora
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.qlora import build_vlm, linear_names, load_language_model

PHI_LINEAR = ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
LLAMA_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="session")
def llama_folder(shared: Originals, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    fields = TEXT_CONFIG | {"num_key_value_heads": 2} | token_ids(shared["tokenizer"])
    LlamaForCausalLM(LlamaConfig(**fields)).save_pretrained(folder)
    shared["tokenizer"].save_pretrained(folder)
    return folder


def build(
    encoder: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> SigPhiForConditionalGeneration:
    arguments = VlmModelArguments(
        siglip_checkpoint="encoder", language_model=str(folder), **{"lora_dropout": 0.0, **options}
    )
    language_model = load_language_model(arguments, dtype, "sdpa", torch.device("cpu"))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    return build_vlm(encoder.vision_model, language_model, tokenizer, arguments)


@pytest.fixture
def qlora_vlm(tiny_encoder, base_folder) -> SigPhiForConditionalGeneration:
    return build(tiny_encoder, base_folder)


def batch_for(model: SigPhiForConditionalGeneration) -> dict[str, torch.Tensor]:
    image = model.config.image_token_id
    input_ids = torch.tensor([[image, 5, 6, 7, 8, 0], [image, 9, 10, 11, 12, 0]])
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "labels": labels, "pixel_values": torch.randn(2, 3, 32, 32)}


def adapted_layers(model: SigPhiForConditionalGeneration) -> list[str]:
    return [name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")]


def test_every_linear_layer_of_the_language_model_is_nf4_and_nothing_else(qlora_vlm):
    quantised = {name: m for name, m in qlora_vlm.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(quantised) == 2 * len(PHI_LINEAR)
    for name, module in quantised.items():
        assert name.startswith("model.language_model.") and name.endswith(".base_layer")
        assert module.weight.quant_type == "nf4" and module.weight.dtype == torch.uint8
        assert module.weight.compress_statistics, "double quantisation"
        assert module.compute_dtype == torch.float32
    plain = [name for name, m in qlora_vlm.named_modules() if type(m) is nn.Linear and "lora_" not in name]
    assert plain and not any(name.startswith("model.language_model.") for name in plain)
    assert {"lm_head", "model.vision_tower.projection"} <= set(plain)
    for module in (qlora_vlm.lm_head, qlora_vlm.model.vision_tower, qlora_vlm.model.multi_modal_projector):
        assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_a_base_of_16_bits_is_not_quantised(tiny_encoder, base_folder):
    model = build(tiny_encoder, base_folder, bits=16)
    assert not any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert model.config.base_bits == 16


def test_lora_adapts_every_linear_layer_of_the_language_model(qlora_vlm):
    layers = adapted_layers(qlora_vlm)
    assert sorted({name.rpartition(".")[2] for name in layers}) == PHI_LINEAR
    assert len(layers) == 2 * len(PHI_LINEAR)
    for name in layers:
        layer = qlora_vlm.get_submodule(name)
        assert layer.r["default"] == 8
        assert layer.scaling["default"] == pytest.approx(16 / 8**0.5)
        assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.any()


@pytest.mark.parametrize(("use_rslora", "scale"), [(True, 16 / 8**0.5), (False, 16 / 8)])
def test_the_scale_of_lora_is_rank_stabilised_or_not(tiny_encoder, base_folder, use_rslora, scale, tmp_path):
    model = build(tiny_encoder, base_folder, bits=16, use_rslora=use_rslora)
    model.save_pretrained(tmp_path)
    for one in (model, SigPhiForConditionalGeneration.from_pretrained(tmp_path)):
        layers = [one.get_submodule(name) for name in adapted_layers(one)]
        assert layers and all(layer.scaling["default"] == pytest.approx(scale) for layer in layers)


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.named_parameters() if ".lora_magnitude_vector." in name}


@pytest.mark.parametrize("bits", [4, 16])
def test_dora_is_trained_saved_loaded_and_saved_again(tiny_encoder, base_folder, bits, tmp_path):
    model = build(tiny_encoder, base_folder, bits=bits, use_dora=True)
    before = {name: tensor.detach().clone() for name, tensor in magnitudes(model).items()}
    assert len(before) == len(adapted_layers(model)) > 0
    batch = batch_for(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in magnitudes(model).items())
    assert all(tensor.dtype == torch.float32 for tensor in magnitudes(model).values())
    logits = model.eval()(**batch).logits
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        stored = load_file(folder / "lora" / "adapter_model.safetensors")
        assert sum(name.endswith("lora_magnitude_vector") for name in stored) == len(before)
        assert json.loads((folder / "lora" / "adapter_config.json").read_text())["use_dora"]
        model = SigPhiForConditionalGeneration.from_pretrained(folder)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)


def test_dora_merges_into_the_weights_that_it_stands_for(tiny_encoder, base_folder):
    model = build(tiny_encoder, base_folder, bits=16, use_dora=True).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    batch = batch_for(model)
    logits = model(**batch).logits
    merged = model.merge_lora()
    assert not any("lora_" in name for name in merged.state_dict())
    torch.testing.assert_close(merged(**batch).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_language_model_lies_on_the_device_of_its_process(monkeypatch, base_folder):
    given: dict[str, Any] = {}

    def from_pretrained(name: str, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        given.update(kwargs)
        return nn.Linear(1, 1), {"missing_keys": set()}

    monkeypatch.setattr(qlora.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    arguments = VlmModelArguments(siglip_checkpoint="encoder", language_model=str(base_folder), bits=4)
    # As `TrainingArguments.device` is in the second process of a machine.
    load_language_model(arguments, torch.bfloat16, "sdpa", torch.device("cuda", 1))
    assert given["device_map"] == {"": torch.device("cuda", 1)}
    assert given["quantization_config"].bnb_4bit_quant_type == "nf4"


def test_only_lora_and_projector_are_trained_in_float32(qlora_vlm):
    trained = {name: p for name, p in qlora_vlm.named_parameters() if p.requires_grad}
    expected = {n for n, _ in qlora_vlm.named_parameters() if "lora_" in n or ".multi_modal_projector." in n}
    assert set(trained) == expected
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


@pytest.mark.parametrize(("bits", "tuning"), [(4, "lora"), (8, "lora"), (16, "lora")])
def test_what_is_trained_is_float32_on_a_base_in_bfloat16(tiny_encoder, base_folder, bits, tuning):
    model = build(tiny_encoder, base_folder, torch.bfloat16, bits=bits, tuning=tuning)
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch_for(model)).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_config_names_the_base(qlora_vlm, base_folder):
    config = qlora_vlm.config
    assert (config.base_language_model, config.base_bits) == (str(base_folder), 4)
    assert config.lora["target_modules"] == PHI_LINEAR
    assert getattr(config.text_config, "quantization_config", None) is None


def test_full_tuning_trains_all_but_the_image_tower(tiny_encoder, base_folder):
    model = build(tiny_encoder, base_folder, bits=16, tuning="full")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".vision_tower." in name}
    assert not adapted_layers(model) and model.config.base_language_model is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_projector_and_every_lora_layer(qlora_vlm, checkpointing):
    if checkpointing:
        qlora_vlm.gradient_checkpointing_enable({"use_reentrant": False})
        assert qlora_vlm.model.language_model.layers[0].gradient_checkpointing
    qlora_vlm.train()
    qlora_vlm(**batch_for(qlora_vlm)).loss.backward()
    for name, parameter in qlora_vlm.named_parameters():
        if "lora_B" in name or ".multi_modal_projector." in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        elif "lora_" not in name:
            assert parameter.grad is None, name


def test_gradient_checkpointing_does_not_change_the_gradients(qlora_vlm):
    batch, found = batch_for(qlora_vlm), []
    for checkpointing in (False, True):
        if checkpointing:
            qlora_vlm.gradient_checkpointing_enable({"use_reentrant": False})
        qlora_vlm.train().zero_grad()
        qlora_vlm(**batch).loss.backward()
        found.append({name: p.grad.clone() for name, p in qlora_vlm.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_llama_base_gets_its_own_layers(tiny_encoder, llama_folder):
    model = build(tiny_encoder, llama_folder)
    assert model.config.lora["target_modules"] == LLAMA_LINEAR
    assert len(adapted_layers(model)) == 2 * len(LLAMA_LINEAR)
    assert model.config.lm_head_bias is False
    model.train()
    model(**batch_for(model)).loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_linear_names_are_those_inside_the_language_model(tiny_language_model):
    assert linear_names(tiny_language_model.model) == PHI_LINEAR


def test_training_goes_on_after_an_evaluation_in_4_bit(qlora_vlm):
    batch = batch_for(qlora_vlm)
    losses = []
    for _ in range(2):
        qlora_vlm.train()
        qlora_vlm(**batch).loss.backward()
        qlora_vlm.eval()
        with torch.no_grad():
            losses.append(qlora_vlm(**batch).loss.item())
            prompt = {"input_ids": batch["input_ids"][:, :3], "pixel_values": batch["pixel_values"]}
            qlora_vlm.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert losses[0] == losses[1]


def test_4_bit_layers_keep_their_weights_unpacked(qlora_vlm, tiny_language_model):
    layers = [module for module in qlora_vlm.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    keep_4bit_weights(qlora_vlm)
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    keep_4bit_weights(tiny_language_model)
