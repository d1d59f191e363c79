"""Language models of other kinds than Phi: the same commands, from their folder to answers in another process."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TOY_IMAGES, Originals, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from sigphi import SiglipResNetProcessor, SigPhiForConditionalGeneration
from sigphi.train import ask, describe, evaluation, plan, vlm
from sigphi.train.arguments import VlmModelArguments
from sigphi.train.errors import UserError
from sigphi.train.prompts import prepare_tokenizer
from sigphi.train.qlora import build_vlm, load_language_model

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 512,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 512}
LLAMA_LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
# Kind -> its config, and what LoRA adapts of it.
CONFIGS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any], list[str]]] = {
    "llama": (LlamaConfig, SMALL, LLAMA_LINEAR),
    # The embedding is the head, too.
    "qwen2": (Qwen2Config, SMALL | {"tie_word_embeddings": True}, LLAMA_LINEAR),
    "qwen3": (Qwen3Config, SMALL | {"head_dim": 16, "tie_word_embeddings": True}, LLAMA_LINEAR),
    # An embedding that is scaled, scores and logits that are capped, windows; tied.
    "gemma2": (
        Gemma2Config,
        SMALL | {"head_dim": 16, "sliding_window": 128, "query_pre_attn_scalar": 16},
        LLAMA_LINEAR,
    ),
    "gemma3_text": (Gemma3TextConfig, SMALL | {"head_dim": 16, "sliding_window": 128}, LLAMA_LINEAR),
    # Layers of the kind Conv1D; tied, and other names for everything.
    "gpt2": (GPT2Config, GPT2, ["c_attn", "c_fc", "c_proj"]),
    "gpt_neox": (GPTNeoXConfig, SMALL, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    "opt": (
        OPTConfig,
        {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
        | {"word_embed_proj_dim": 64},
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
    ),
    "bloom": (
        BloomConfig,
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512},
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    ),
    # Logits that are multiplied, and divided.
    "cohere": (CohereConfig, SMALL, LLAMA_LINEAR),
    "granite": (GraniteConfig, SMALL | {"logits_scaling": 8.0}, LLAMA_LINEAR),
    # Experts that are one tensor for all: they are left as they are.
    "mixtral": (MixtralConfig, SMALL | {"num_local_experts": 4}, ["k_proj", "o_proj", "q_proj", "v_proj"]),
}
# Those that go through all commands.
WHOLE = {"llama": 4, "qwen2": 16, "gemma2": 16, "gpt2": 16, "bloom": 16}  # and their bits
QUICK = ("gemma2",)


@pytest.fixture(scope="module")
def save_base(toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`save_base(kind)`: a folder with a language model of random weights and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(toy_base)

    def save(kind: str) -> Path:
        make_config, fields, _ = CONFIGS[kind]
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        # The usual range is for wide layers: here it would make all logits nearly equal.
        config = make_config(**fields, initializer_range=0.2, **token_ids(tokenizer))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def encoder_folder(shared: Originals, toy_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    shared["encoder"].save_pretrained(folder)
    SiglipResNetProcessor(shared["image_processor"], AutoTokenizer.from_pretrained(toy_base)).save_pretrained(folder)
    return folder


def build(encoder: Any, folder: Path, **options: Any) -> Any:
    arguments = VlmModelArguments(siglip_checkpoint="e", language_model=str(folder), lora_dropout=0.0, **options)
    language_model = load_language_model(arguments, torch.float32, "eager", torch.device("cpu"))
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(folder))
    return build_vlm(encoder.vision_model, language_model, tokenizer, arguments), language_model


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_parts_are_the_whole(save_base, tiny_encoder, kind, tmp_path):
    folder = save_base(kind)
    original = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model, _ = build(tiny_encoder, folder, bits=16)
    ids = torch.arange(3, 15)[None]
    image = torch.tensor([[model.config.image_token_id, 5, 6, 7, 8]])
    features = torch.randn(1, 1, 32)
    with torch.no_grad():
        expected = original(ids).logits
        torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    # LoRA: on each linear layer, never on the head; it learns, and is another base's in no place.
    assert model.config.lora["target_modules"] == CONFIGS[kind][2]
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert adapted and all(name.startswith("model.language_model.") for name in adapted)
    model.train()
    loss = model(input_ids=image, image_features=features, labels=image).loss
    loss.backward()
    assert all(one.grad.abs().max() > 0 for name, one in model.named_parameters() if ".lora_B." in name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 0.05 * torch.randn_like(parameter)
        given = {"input_ids": image, "image_features": features}
        adapter = model.eval()(**given).logits
        model.save_pretrained(tmp_path / "adapter")
        loaded = SigPhiForConditionalGeneration.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(loaded(**given).logits, adapter, rtol=1e-4, atol=1e-4)
        loaded.merge_lora().save_pretrained(tmp_path / "merged")
        merged = SigPhiForConditionalGeneration.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(**given).logits, adapter, rtol=1e-3, atol=1e-3)
    ties = original.config.get_text_config().tie_word_embeddings
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == ties


def test_a_language_model_that_does_more_is_refused(save_base, tiny_encoder):
    folder = save_base("cohere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 2.0}))  # which Cohere does not read
    with pytest.raises(UserError, match="a model of the kind 'cohere' does more than its embedding, layers and head"):
        build(tiny_encoder, folder, bits=16)


def test_layers_stay_whole_when_a_model_is_spread(save_base, tiny_encoder):
    model, language_model = build(tiny_encoder, save_base("llama"), bits=16)
    assert {"LlamaDecoderLayer", "SiglipResNetVisionModel"} <= set(model._no_split_modules)
    assert "PhiDecoderLayer" not in model._no_split_modules
    assert language_model._no_split_modules


def test_a_model_of_more_parts_than_text_is_refused(encoder_folder, tmp_path):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'gemma3' model, which has more parts than a language model"):
        vlm.check_models(
            VlmModelArguments(siglip_checkpoint=str(encoder_folder), language_model=str(tmp_path), bits=16)
        )


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_commands(
    save_base: Callable[[str], Path], encoder_folder: Path, toy_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], SimpleNamespace]:
    """`run_commands(kind)`: plan and train, once a kind; gives the words, the base and the folder."""
    done: dict[str, SimpleNamespace] = {}

    def run(kind: str) -> SimpleNamespace:
        if kind not in done:
            base, folder = save_base(kind), tmp_path_factory.mktemp("vlm")
            words = ["--siglip-checkpoint", str(encoder_folder), "--language-model", str(base)]
            words += ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--eval-fraction", "0.05"]
            words += ["--bits", str(WHOLE[kind]), "--num-image-tokens", "4", "--batch-size", "8", "--bf16", "false"]
            words += ["--report-to", "none", "--output-dir", str(folder), "--max-steps", "3", "--save-strategy", "no"]
            words += ["--disable-tqdm", "true", "--eval-strategy", "no", "--eval-samples", "0", "--use-cpu", "true"]
            plan.plan("vlm", [*words, "--tflops", "0.1"])
            vlm.main(words)
            done[kind] = SimpleNamespace(base=base, folder=folder)
        return done[kind]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield run


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in WHOLE]
)
def test_all_commands_run_on_another_language_model(run_commands, kind, toy_csv, images, tmp_path, capsys):
    trained = run_commands(kind)
    assert "It fits." in capsys.readouterr().out
    config = json.loads((trained.folder / "config.json").read_text())
    assert (config["base_language_model"], config["base_bits"]) == (str(trained.base), WHOLE[kind])
    options = ["--input-csv", str(toy_csv), "--images", TOY_IMAGES, "--max-images", "2", "--max-new-tokens", "4"]
    evaluation.main([str(trained.folder), *options])
    results = json.loads((trained.folder / "eval_results.json").read_text())
    assert 0 < results["eval_loss"] < 50
    picture = tmp_path / "picture.png"
    images[0].save(picture)
    ask.main([str(trained.folder), str(picture), "-q", "What is it?", "--max-new-tokens", "4"])
    describe.main([str(trained.folder), str(picture), "--max-new-tokens", "4"])


LOAD = """
import os, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
for folder in os.environ["FOLDERS"].split(os.pathsep):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([[model.config.image_token_id] * 4 + [5, 6, 7]])
    with torch.no_grad():
        logits = model(input_ids=ids, image_features=torch.ones(1, 4, 16)).logits[0, -1, :5]
    print(type(model.model.language_model).__name__, *logits.tolist())
"""


@pytest.mark.parametrize("kinds", [QUICK, pytest.param(tuple(WHOLE), marks=pytest.mark.slow)])
def test_a_stranger_loads_what_was_trained(run_commands, run_stranger, kinds):
    trained = [run_commands(kind) for kind in kinds]
    lines = run_stranger(LOAD, FOLDERS=":".join(str(one.folder) for one in trained)).splitlines()
    names = {"llama": "LlamaModel", "qwen2": "Qwen2Model", "gemma2": "Gemma2Model", "gpt2": "GPT2Model"}
    names["bloom"] = "BloomModel"
    assert [line.split()[0] for line in lines] == [names[kind] for kind in kinds]
    for one, line in zip(trained, lines, strict=True):
        model = SigPhiForConditionalGeneration.from_pretrained(one.folder)
        ids = torch.tensor([[model.config.image_token_id] * 4 + [5, 6, 7]])
        with torch.no_grad():
            logits = model(input_ids=ids, image_features=torch.ones(1, 4, 16)).logits[0, -1, :5]
        assert [float(number) for number in line.split()[1:]] == pytest.approx(logits.tolist(), rel=1e-4, abs=1e-4)
