"""The forms of a VLM's folder: made from one another, complete, and read by a stranger."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LORA, Originals
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from sigphi import SigPhiConfig, SigPhiForConditionalGeneration, SigPhiProcessor
from sigphi.hub_card.forms import export_form, form_of, merged_model

QUESTIONS = ["What?", "What is the object in the image?"]


def inputs_of(processor: Any, images: list[Any]) -> dict[str, torch.Tensor]:
    texts = [f"<image>Question: {question}\nAnswer:" for question in QUESTIONS]
    return dict(processor(images=images[:2], text=texts, padding=True, return_tensors="pt"))


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]  # (tokens, vocab_size)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def quantised(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def save_adapter(folder: Path, model: Any, shared: Originals) -> Path:
    model.save_pretrained(folder)
    processor = SigPhiProcessor(shared["image_processor"], shared["tokenizer"])
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(shared, make_lora_vlm, images, tmp_path_factory):
    """An adapter form on a base of 4 bits as a training leaves it, and the other forms that were made of it."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("forms")
    adapter = save_adapter(root / "adapter", make_lora_vlm(base_bits=4), shared)
    (adapter / "checkpoint-3").mkdir()
    for name in ("training_args.bin", "checkpoint-3/optimizer.pt", "predictions.parquet", "trainer_state.json"):
        (adapter / name).write_bytes(b"")
    (adapter / "training_data.json").write_text('{"num_images": 7}')
    (adapter / "eval_results.json").write_text('{"eval_loss": 1.5, "metadata": {"rows": 3}}')
    export_form(str(adapter), root / "merged", "merged")
    export_form(str(adapter), root / "nf4", "nf4")
    export_form(str(adapter), root / "copy", "adapter", dtype="bfloat16")
    export_form(str(root / "nf4"), root / "unpacked", "merged")
    # What a second round leaves: LoRA on the language model inside one of ours.
    second = load(adapter)
    second.config.base_language_model = str(root / "merged")
    save_adapter(root / "second", second, shared)
    inputs = inputs_of(SigPhiProcessor.from_pretrained(adapter), images)
    return SimpleNamespace(root=root, adapter=adapter, inputs=inputs)


# What is in a folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merged", "nf4", "copy"])
def test_a_form_is_complete_and_resumes_nothing(made, form):
    files = names_in(made.root / form)
    needed = {"config.json", "model.safetensors", "generation_config.json", "modeling_sigphi.py", "hub_code.py"}
    needed |= {"processor_config.json", "tokenizer.json", "chat_template.jinja", "processing_sigphi.py", "README.md"}
    assert files >= needed | {"training_data.json", "eval_results.json"}
    assert not files & {"training_args.bin", "trainer_state.json", "predictions.parquet"}
    assert not any("checkpoint-" in name or name.startswith(".") for name in files)
    assert {name for name in files if name.startswith("lora/")} == (
        {"lora/adapter_config.json", "lora/adapter_model.safetensors"} if form == "copy" else set()
    )
    results = json.loads((made.root / form / "eval_results.json").read_text())
    assert results == {"eval_loss": 1.5, "metadata": {"form": "adapter", "rows": 3}}
    assert "Measured on the adapter form" in (made.root / form / "README.md").read_text()


def test_the_config_says_the_form(made):
    forms = {name: form_of(SigPhiConfig.from_pretrained(made.root / name)) for name in ("adapter", "merged", "nf4")}
    assert forms == {"adapter": "adapter", "merged": "merged", "nf4": "nf4"}
    assert form_of(SigPhiConfig.from_pretrained(made.root / "unpacked")) == "merged"
    assert "4 bits (NF4)" in (made.root / "nf4" / "README.md").read_text()


def test_an_export_that_fails_leaves_nothing_in_its_place(made, tmp_path, monkeypatch):
    monkeypatch.setattr("sigphi.hub_card.forms.AutoProcessor.from_pretrained", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_form(str(made.adapter), tmp_path / "merged", "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    export_form(str(made.adapter), tmp_path / "merged", "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_generation_settings_come_along(make_lora_vlm, shared, tmp_path):
    model = make_lora_vlm()
    model.generation_config.eos_token_id = [5, 7]
    adapter = save_adapter(tmp_path / "adapter", model, shared)
    export_form(str(adapter), tmp_path / "merged", "merged")
    for folder in (adapter, tmp_path / "merged"):
        assert load(folder).generation_config.eos_token_id == [5, 7]


# Merging -------------------------------------------------------------------------------------------------------------


def test_merging_into_dequantised_weights_keeps_the_logits(made):
    expected = logits_of(load(made.adapter), made.inputs)
    merged = load(made.root / "merged")
    assert not quantised(merged) and not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits_of(merged, made.inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["adapter", "nf4"])
def test_answering_leaves_4_bit_weights_as_they_are(made, form, monkeypatch):
    """Where the processor has AVX512-BF16, bitsandbytes repacks them, and what is merged afterwards is nonsense."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load(made.root / form)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    before = [layer.weight.clone() for layer in layers]
    logits_of(model, made.inputs)
    assert layers and all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))


def test_what_is_merged_in_16_bits_is_what_is_loaded(made, tmp_path):
    merged = merged_model(str(made.adapter), "dequantized", torch.bfloat16, torch.device("cpu"))
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(merged, made.inputs), logits_of(load(tmp_path), made.inputs))


def test_merging_into_the_original_weights_is_another_model(made, tmp_path):
    export_form(str(made.adapter), tmp_path / "merged", "merged", base="original")
    logits = logits_of(load(tmp_path / "merged"), made.inputs)
    expected = logits_of(load(made.adapter, base_bits=16), made.inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - logits_of(load(made.adapter), made.inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_and_dora_merge_from_bases_of_all_bits(
    make_lora_vlm, make_vlm, base_folder, shared, images, tmp_path, bits, use_dora
):
    pytest.importorskip("bitsandbytes")
    model = make_lora_vlm()
    if use_dora:
        model = make_vlm(base_language_model=str(base_folder))
        model.add_lora(LORA | {"use_dora": True})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            if "magnitude" in name:
                parameter.data *= torch.rand_like(parameter) + 0.5
    model.config.base_bits = bits
    adapter = save_adapter(tmp_path / "adapter", model, shared)
    inputs = inputs_of(SigPhiProcessor.from_pretrained(adapter), images)
    expected = logits_of(load(adapter), inputs)
    merged = load(adapter).merge_lora()
    assert not quantised(merged)
    logits = logits_of(merged, inputs)
    if bits == 8:  # these layers round their input too
        assert F.cosine_similarity(logits, expected).min() > 0.995
    else:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
def test_layers_with_transposed_weights_merge_too(shared, tiny_encoder, tmp_path, images, bits):
    pytest.importorskip("bitsandbytes")
    text = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2)
    base = GPT2LMHeadModel(text).eval()
    base.save_pretrained(tmp_path / "base")
    config = SigPhiConfig(
        vision_config=tiny_encoder.vision_model.config,
        text_config=text,
        image_token_id=shared["tokenizer"].convert_tokens_to_ids("<image>"),
        pad_token_id=shared["tokenizer"].pad_token_id,
        lm_head_bias=False,
        tie_word_embeddings=True,
        base_language_model=str(tmp_path / "base"),
        base_bits=bits,
    )
    model = SigPhiForConditionalGeneration.from_parts(config, tiny_encoder.vision_model, base)
    # Quantised they are the other way round.
    model.add_lora({"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": bits == 16})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapter = save_adapter(tmp_path / "adapter", model, shared)
    inputs = inputs_of(SigPhiProcessor.from_pretrained(adapter), images)
    expected = logits_of(load(adapter), inputs)
    export_form(str(adapter), tmp_path / "merged", "merged")
    merged = load(tmp_path / "merged")
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    torch.testing.assert_close(logits_of(merged, inputs), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_summed_in_float32_and_rounded_once(make_lora_vlm, shared, tmp_path):
    model = make_lora_vlm()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = save_adapter(tmp_path / "adapter", model, shared)
    export_form(str(adapter), tmp_path / "merged", "merged", dtype="bfloat16")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values() if tensor.is_floating_point()} == {torch.bfloat16}
    layer = "model.language_model.layers.0.mlp.fc1"
    scale = LORA["lora_alpha"] / LORA["r"] ** 0.5
    lora = state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"] * scale
    exact = (state[f"{layer}.base_layer.weight"] + lora).to(torch.bfloat16)
    assert torch.equal(merged[f"{layer}.weight"], exact)


# 4 bits --------------------------------------------------------------------------------------------------------------


def linears(model: Any) -> set[str]:
    names = model.model.language_model.named_modules()
    return {f"model.language_model.{name}" for name, module in names if isinstance(module, nn.Linear)}


def test_nf4_quantises_the_language_model_and_nothing_else(made):
    model, merged = load(made.root / "nf4"), load(made.root / "merged")
    assert quantised(model) == linears(merged)
    state = merged.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("lm_head", "model.vision_tower", "model.multi_modal_projector")):
            assert torch.equal(tensor, state[name]), name
    similar = F.cosine_similarity(logits_of(model, made.inputs), logits_of(merged, made.inputs))
    assert 0.9 < similar.min() < 1 - 1e-6


def test_what_is_unpacked_from_nf4_says_the_same(made):
    unpacked = load(made.root / "unpacked")
    assert not quantised(unpacked)
    expected = logits_of(load(made.root / "nf4"), made.inputs)
    torch.testing.assert_close(logits_of(unpacked, made.inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [None, ["fc1"]])
@pytest.mark.parametrize("form", ["merged", "second"])
def test_a_reader_s_own_quantisation_spares_tower_and_projector(made, form, given):
    options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=given)
    model = load(made.root / form, quantization_config=options)
    assert options.llm_int8_skip_modules == given, "the reader's object stays as it is"
    expected = {name for name in linears(load(made.root / "merged")) if given is None or not name.endswith("fc1")}
    found = {name.removesuffix(".base_layer") for name in quantised(model)}
    assert found - {"lm_head"} == expected
    assert ("lm_head" in found) == (given is not None)
    assert logits_of(model, made.inputs).isfinite().all()


# A base inside one of ours -------------------------------------------------------------------------------------------


def test_the_base_may_be_the_language_model_of_a_vlm(made):
    model = load(made.root / "second")
    merged = load(made.root / "merged", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert len(quantised(model)) == len(quantised(merged)) == 12
    assert (logits_of(model, made.inputs) - logits_of(load(made.adapter), made.inputs)).abs().max() > 1e-2
    plain = load(made.root / "second", base_bits=16)
    torch.testing.assert_close(plain.lm_head.weight, load(made.root / "merged").lm_head.weight)
    assert not quantised(plain)


def test_a_base_in_4_bits_keeps_them(made):
    model = load(made.root / "second", base_language_model=str(made.root / "nf4"))
    stored, found = load(made.root / "nf4"), model.model.language_model.layers[0].mlp.fc1.base_layer
    assert torch.equal(found.weight, stored.model.language_model.layers[0].mlp.fc1.weight)
    with pytest.raises(ValueError, match="is stored in 4 bits, and `base_bits` is 16"):
        load(made.root / "second", base_language_model=str(made.root / "nf4"), base_bits=16)


def test_a_base_in_adapter_form_is_refused(made):
    with pytest.raises(ValueError, match="is itself in adapter form: merge that first"):
        load(made.root / "second", base_language_model=str(made.adapter))


# Options of from_pretrained ------------------------------------------------------------------------------------------

PUBLISHED = ("adapter", "merged", "nf4")


def own_tensors(model: Any) -> list[torch.Tensor]:
    """Weights that no form quantises."""
    parts = (model.model.vision_tower, model.model.multi_modal_projector, model.lm_head)
    return [tensor for part in parts for tensor in part.state_dict().values() if tensor.is_floating_point()]


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_places_every_part(made, form, device_map):
    model = load(made.root / form, device_map=device_map)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert torch.equal(logits_of(model, made.inputs), logits_of(load(made.root / form), made.inputs))
    headless = AutoModel.from_pretrained(made.root / form, device_map=device_map)
    with torch.no_grad():
        states = headless(**made.inputs).last_hidden_state
        assert torch.equal(states, model.model(**made.inputs).last_hidden_state)


@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16", "auto"])
def test_the_precision_that_is_asked_for_reaches_every_part(made, form, dtype):
    model = load(made.root / form, dtype=dtype)
    stored = load_file(made.root / form / "model.safetensors")["model.multi_modal_projector.linear_1.weight"].dtype
    expected = stored if dtype == "auto" else dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {tensor.dtype for tensor in own_tensors(model)} == {expected}
    logits = logits_of(model, made.inputs)
    assert logits.dtype == expected
    original = logits_of(load(made.root / form), made.inputs)
    assert F.cosine_similarity(logits.float(), original.float()).min() > 0.99


@pytest.mark.parametrize("form", PUBLISHED)
def test_attention_implementations_agree(made, form):
    found = {}
    for name in ("eager", "sdpa"):
        model = load(made.root / form, attn_implementation=name)
        assert model.model.language_model.config._attn_implementation == name
        found[name] = logits_of(model, made.inputs)
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", PUBLISHED)
def test_4_bits_may_be_asked_of_any_form(made, form):
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = load(made.root / form, quantization_config=options, dtype=torch.bfloat16, device_map="auto")
    found = {name.removesuffix(".base_layer") for name in quantised(model)}
    assert found == linears(load(made.root / "merged"))
    assert {tensor.dtype for tensor in own_tensors(model)} == {torch.bfloat16}
    original = logits_of(load(made.root / "merged"), made.inputs)
    assert F.cosine_similarity(logits_of(model, made.inputs).float(), original).min() > 0.9


# A stranger ----------------------------------------------------------------------------------------------------------

STRANGER = """
import os, torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
root, inputs, found = os.environ["ROOT"], torch.load(os.environ["INPUTS"]), {}
for name in os.environ["FORMS"].split():
    model = AutoModelForImageTextToText.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    headless = AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    AutoProcessor.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    with torch.no_grad():
        states = headless(**inputs).last_hidden_state
        found[name] = {"logits": model(**inputs).logits, "states": states}
    found[name]["answers"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
torch.save(found, os.environ["FOUND"])
"""
FORMS = ("adapter", "merged", "nf4", "copy", "unpacked", "second")


@pytest.fixture(scope="module")
def found(made, run_stranger):
    torch.save(made.inputs, made.root / "inputs.pt")
    paths = {"ROOT": made.root, "INPUTS": made.root / "inputs.pt", "FOUND": made.root / "found.pt"}
    run_stranger(STRANGER, FORMS=" ".join(FORMS), **paths)
    return torch.load(made.root / "found.pt")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_by_the_same_lines_without_this_package(made, found, form):
    model = load(made.root / form)
    with torch.no_grad():
        assert torch.equal(found[form]["logits"], model(**made.inputs).logits)
        assert torch.equal(found[form]["states"], model.model(**made.inputs).last_hidden_state)
    assert torch.equal(found[form]["answers"], model.generate(**made.inputs, max_new_tokens=4, do_sample=False))


# A stranger's pipeline and options -----------------------------------------------------------------------------------

USES = """
import json, os, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, pipeline
torch.set_num_threads(1)
root, inputs, found = os.environ["ROOT"], torch.load(os.environ["INPUTS"]), {}
pictures, questions = [Image.open(f"{root}/{i}.png") for i in range(2)], json.loads(os.environ["QUESTIONS"])
chats = [
    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    for image, question in zip(pictures, questions)
]
texts = [f"<image>Question: {question}\\nAnswer:" for question in questions]
short = {"max_new_tokens": 4, "return_full_text": False}
options = {
    "device_map": {"device_map": "auto"},
    "attention": {"attn_implementation": "eager", "dtype": torch.bfloat16},
    "4 bits": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
}
for name in os.environ["FORMS"].split():
    ask = pipeline("image-text-to-text", model=f"{root}/{name}", trust_remote_code=True)
    assert type(ask.model).__module__.startswith("transformers_modules.")
    answers = {
        "one chat": [ask(text=chats[0], **short), ask(text=chats[1], **short)],
        "chats": ask(text=chats, **short),
        "chats in batches": ask(text=chats, batch_size=2, **short),
        "images and texts": ask(images=pictures, text=texts, **short),
    }
    found[name] = {
        way: [(one[0] if isinstance(one, list) else one)["generated_text"] for one in given]
        for way, given in answers.items()
    }
    for way, chosen in options.items():
        model = AutoModelForImageTextToText.from_pretrained(f"{root}/{name}", trust_remote_code=True, **chosen)
        with torch.no_grad():
            found[name][way] = model(**inputs).logits
torch.save(found, os.environ["FOUND"])
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "device_map": {"device_map": "auto"},
    "attention": {"attn_implementation": "eager", "dtype": torch.bfloat16},
    "4 bits": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
}


@pytest.fixture(scope="module")
def used(made, images, run_stranger):
    torch.save(made.inputs, made.root / "inputs.pt")
    for number, image in enumerate(images):
        image.save(made.root / f"{number}.png")
    paths = {"ROOT": made.root, "INPUTS": made.root / "inputs.pt", "FOUND": made.root / "used.pt"}
    run_stranger(USES, FORMS=" ".join(PUBLISHED), QUESTIONS=json.dumps(QUESTIONS), **paths)
    return torch.load(made.root / "used.pt")


@pytest.mark.slow
@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("way", ["one chat", "chats", "chats in batches", "images and texts"])
def test_the_pipeline_gives_the_answers_of_generate(made, used, images, form, way):
    model, processor = load(made.root / form), SigPhiProcessor.from_pretrained(made.root / form)
    expected = []
    for image, question in zip(images, QUESTIONS, strict=False):
        inputs = processor(images=image, text=f"<image>Question: {question}\nAnswer:", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.decode(tokens, skip_special_tokens=True))
    assert used[form][way] == expected
    assert len(set(expected)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", PUBLISHED)
@pytest.mark.parametrize("way", OPTIONS)
def test_options_work_without_this_package_too(made, used, form, way):
    model = load(made.root / form, **OPTIONS[way])
    with torch.no_grad():
        assert torch.equal(used[form][way], model(**made.inputs).logits)
