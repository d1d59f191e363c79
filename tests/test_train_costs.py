"""What trainings need, against trainings that run."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig

from sigphi import SiglipResNetConfig, SiglipResNetModel
from sigphi.train.arguments import (
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
)
from sigphi.train.costs import (
    ENCODED_AT_ONCE,
    GRADIENTS,
    Costs,
    SiglipBatch,
    SiglipSetup,
    VlmBatch,
    VlmSetup,
    highest,
    optimizer_of,
    siglip_costs,
    vlm_costs,
)
from sigphi.train.errors import UserError
from sigphi.train.losses import global_sigmoid_loss
from sigphi.train.memory import MemoryMeter
from sigphi.train.muon import is_kernel
from sigphi.train.qlora import build_vlm, load_language_model

PHI_2_FOLDER = Path(__file__).parents[2] / "shared" / "models" / "phi-2"
BATCH = VlmBatch(rows=6, length=20, images=6, supervised=30, longest_prompt=12, longest=20)


@pytest.fixture
def text_config(tokenizer) -> PhiConfig:
    return PhiConfig(**TEXT_CONFIG, **token_ids(tokenizer))


@pytest.fixture
def make_setup(tokenizer, text_config, tmp_path):
    """`make_setup(bits=16, text=config, ...)`: of the tiny VLM; what is no option of the model is one of training."""

    def make(text: Any = None, evaluates: bool = False, caches: bool = True, **options: Any) -> VlmSetup:
        model = {name: options.pop(name) for name in list(options) if name in VlmModelArguments.__dataclass_fields__}
        encoder = SiglipResNetConfig(
            vision_config=VISION_CONFIG, text_config=text_config, projection_dim=32, include_text_tower=False
        )
        return VlmSetup(
            VlmModelArguments(siglip_checkpoint="encoder", language_model="base", lora_dropout=0.0, **model),
            VlmTrainingArguments(output_dir=str(tmp_path), report_to="none", **options),
            encoder,
            text or text_config,
            tokenizer,
            caches,
            evaluates,
        )

    return make


def sums(costs: Costs) -> dict[str, float]:
    return {moment: sum(kinds.values()) for moment, kinds in costs.moments.items()}


# Against models with data --------------------------------------------------------------------------------------------


@pytest.fixture
def real_step(base_folder, tiny_encoder, tokenizer):
    """The moments of two real steps with what `setup` says, as the meter sees them, and the optimizer behind them."""

    def run(setup: VlmSetup) -> tuple[dict[str, float], torch.optim.Optimizer]:
        setup.model.language_model = str(base_folder)
        dtype = torch.bfloat16 if setup.training.bf16 else torch.float32
        with MemoryMeter(torch.device("cpu")) as meter:
            base_dtype = torch.float32 if setup.model.tuning == "full" else dtype
            base = load_language_model(setup.model, base_dtype, "sdpa", torch.device("cpu"))
            tower = copy.deepcopy(tiny_encoder.vision_model).to(dtype)
            model = build_vlm(tower, base, tokenizer, setup.model)
            del base, tower
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.detach()  # the meter sees only what an operator gives, and weights are read from a file
            model.config.use_cache = False
            if setup.training.gradient_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, fused=True)
            model.train()
            for _ in range(2):
                inputs = real_batch(model.config.image_token_id)
                meter.begin("forward", "")
                with torch.autocast("cpu", torch.bfloat16, enabled=setup.training.bf16):
                    loss = model(**inputs).loss
                del inputs
                meter.begin("backward", "")
                loss.backward()
                del loss
                meter.begin("update", "")
                nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                meter.end()
                optimizer.zero_grad()
        return {name: sum(kinds.values()) for name, kinds in meter.moments.items()}, optimizer

    return run


def real_batch(image_token_id: int) -> dict[str, torch.Tensor]:
    """Of the size of `BATCH`."""
    ids = torch.full((BATCH.rows, BATCH.length), 7)
    ids[:, 0] = image_token_id
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    labels = torch.full_like(ids, -100)
    labels[:, -5:] = 7
    features = torch.randn(BATCH.rows, 1, VISION_CONFIG["projection_dim"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_features": features}


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 16, "bf16": False, "gradient_checkpointing": False},
        {"bits": 16, "bf16": True, "gradient_checkpointing": True},
        {"bits": 4, "bf16": True, "gradient_checkpointing": False},
        {"bits": 4, "bf16": False, "gradient_checkpointing": True},
        {"bits": 8, "bf16": True, "gradient_checkpointing": False},
        {"bits": 16, "tuning": "full", "bf16": True, "gradient_checkpointing": False},
    ],
    ids=lambda options: "-".join(f"{name}_{value}" for name, value in options.items()),
)
def test_each_moment_needs_what_a_real_step_needs(make_setup, real_step, options):
    setup = make_setup(**options)
    expected = sums(vlm_costs(setup, BATCH))
    measured, _ = real_step(setup)
    for moment, size in measured.items():
        assert expected[moment] == pytest.approx(size, rel=0.03), moment


def test_optimizer_states_are_those_of_a_real_optimizer(make_setup, real_step):
    setup = make_setup(bits=16)
    costs = vlm_costs(setup, BATCH)
    _, optimizer = real_step(setup)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert costs.optimizer == sum(value.numel() * value.itemsize for value in states)
    assert costs.optimizer == pytest.approx(8 * costs.trained, rel=0.01)


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit", "paged_adamw_32bit"])
def test_the_states_of_bitsandbytes_are_those_of_a_real_optimizer(make_setup, optim):
    # Of a tensor with fewer than 4096 numbers they are whole.
    costs = vlm_costs(make_setup(bits=16, lora_r=64, optim=optim), BATCH)
    setup = make_setup(bits=16, lora_r=64, optim=optim)
    with torch.device("cpu"):
        language_model = AutoModelForCausalLM.from_config(setup.text)
        tower = SiglipResNetModel(setup.encoder).vision_model
    model = build_vlm(tower, language_model, setup.tokenizer, setup.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU nothing is paged
        optimizer = optimizer_of(setup.training, model, trained)
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    states = [
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not name.startswith("qmap")  # one for all parameters
    ]
    assert costs.optimizer == sum(states)
    if "8bit" in optim:
        assert costs.optimizer < (5 if "adam" in optim else 3) * costs.trained


def test_dora_trains_the_lengths_too(make_setup):
    plain, dora = (vlm_costs(make_setup(bits=16, use_dora=use), BATCH) for use in (False, True))
    hidden, inner = TEXT_CONFIG["hidden_size"], TEXT_CONFIG["intermediate_size"]
    assert dora.trained - plain.trained == TEXT_CONFIG["num_hidden_layers"] * (5 * hidden + inner)
    assert sums(dora)["forward"] > sums(plain)["forward"]


@pytest.mark.parametrize("steps", [1, 4])
def test_gradients_are_kept_through_the_forward_where_they_accumulate(make_setup, steps):
    costs = vlm_costs(make_setup(bits=16, gradient_accumulation_steps=steps), BATCH)
    kept = costs.moments["forward"].get(GRADIENTS, 0)
    assert kept == (0 if steps == 1 else 4 * costs.trained)


def test_what_an_evaluation_needs_grows_with_its_batch_alone(make_setup):
    small, large = (
        sums(vlm_costs(make_setup(bits=16, evaluates=True, per_device_eval_batch_size=size), BATCH))
        for size in (4, 64)
    )
    differing = {moment for moment in small if small[moment] != large[moment]}
    assert differing == {"evaluation, questions", "evaluation, answers"}
    assert "evaluation, answers" not in vlm_costs(make_setup(bits=16), BATCH).moments


# Depth ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"bits": 4}, {"bits": 16, "gradient_checkpointing": False}, {"tuning": "full", "bits": 16}]
)
def test_many_layers_cost_what_the_line_through_few_says(make_setup, text_config, monkeypatch, options):
    deep = type(text_config).from_dict(text_config.to_dict() | {"num_hidden_layers": 10})
    by_line = vlm_costs(make_setup(text=deep, evaluates=True, **options), BATCH)
    monkeypatch.setattr("sigphi.train.costs._FEW_LAYERS", (10, 20))
    whole = vlm_costs(make_setup(text=deep, evaluates=True, **options), BATCH)
    assert (by_line.parameters, by_line.trained, by_line.weights) == (whole.parameters, whole.trained, whole.weights)
    assert by_line.flops == pytest.approx(whole.flops)
    for moment, size in sums(whole).items():
        assert sums(by_line)[moment] == pytest.approx(size, rel=0.01), moment


@pytest.mark.skipif(not PHI_2_FOLDER.exists(), reason=f"no Phi-2 configuration in {PHI_2_FOLDER}")
def test_phi_2_is_counted_without_its_weights(make_setup):
    phi_2 = AutoConfig.from_pretrained(PHI_2_FOLDER)
    costs = vlm_costs(make_setup(text=phi_2, bits=4, bf16=True, lora_r=16), BATCH)
    linear = 32 * (4 * 2560 * 2560 + 2 * 2560 * 10240)  # q, k, v, dense, fc1 and fc2 of each layer
    assert costs.base == 2_779_683_840  # the model card's 2.7 B
    quantised = costs.weights["language model, quantised"]
    assert 0.5 * linear < quantised < 0.53 * linear  # half a byte each, and a scale a 64
    assert costs.weights["language model, not quantised"] == pytest.approx(2 * (costs.base - linear), rel=1e-3)
    assert costs.weights["LoRA"] == 4 * 32 * 16 * (4 * 2 * 2560 + 2 * (2560 + 10240))


# The encoder ---------------------------------------------------------------------------------------------------------


def encoder_setup(text: PhiConfig, folder: Path, trains: bool = False, **options: Any) -> SiglipSetup:
    config = SiglipResNetConfig(vision_config=VISION_CONFIG, text_config=text, projection_dim=32)
    model = SiglipModelArguments(text_model="base", train_text_tower=trains)
    return SiglipSetup(
        model, SiglipTrainingArguments(output_dir=str(folder), report_to="none", **options), config, True
    )


def real_encoder_step(setup: SiglipSetup, batch: SiglipBatch) -> dict[str, float]:
    """The moments of two real steps on random images and texts."""
    with MemoryMeter(torch.device("cpu")) as meter:
        model = SiglipResNetModel(copy.deepcopy(setup.encoder)).train()
        tower: Any = model.text_model.language_model
        tower.requires_grad_(setup.model.train_text_tower)
        if setup.caches_features:
            model.text_model.language_model = tower = None
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for _ in range(2):
            inputs = {"pixel_values": torch.rand(batch.images, 3, 32, 32), "return_logits": False}
            ids = {
                "image_ids": torch.randint(batch.texts, (batch.images, 1)),
                "text_ids": torch.arange(batch.texts)[:, None] * torch.tensor([1, 0, 0]),
            }
            if setup.caches_features:
                inputs["text_features"] = torch.randn(batch.texts, TEXT_CONFIG["hidden_size"])
            else:
                inputs["input_ids"] = torch.randint(9, (batch.texts, batch.length))
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            meter.begin("forward", "")
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.training.bf16):
                outputs = model(**inputs)
                parameters = (model.logit_scale, model.logit_bias)
                loss = global_sigmoid_loss(outputs.image_embeds, outputs.text_embeds, *parameters, **ids)
            del inputs, outputs
            meter.begin("backward", "")
            loss.backward()
            del loss
            meter.begin("update", "")
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            meter.end()
            optimizer.zero_grad()
    return {name: sum(kinds.values()) for name, kinds in meter.moments.items()}


@pytest.mark.parametrize(("trains", "bf16"), [(False, False), (False, True), (True, False)])
def test_each_moment_of_the_encoder_needs_what_a_real_step_needs(text_config, tmp_path, trains, bf16):
    setup = encoder_setup(text_config, tmp_path, trains, bf16=bf16, augment=False, channels_last=False)
    batch = SiglipBatch(images=16, texts=40, length=12, all_texts=300)
    expected = sums(siglip_costs(setup, batch))
    for moment, size in real_encoder_step(setup, batch).items():
        assert expected[moment] == pytest.approx(size, rel=0.05), moment


def test_an_average_of_the_weights_is_a_copy_of_what_is_trained(text_config, tmp_path):
    batch = SiglipBatch(images=16, texts=40, length=12, all_texts=300)
    without, averaged = (
        siglip_costs(encoder_setup(text_config, tmp_path, ema_decay=decay), batch) for decay in (0, 0.9)
    )
    copies = averaged.weights["average of the trained weights"]
    assert averaged.weights == without.weights | {"average of the trained weights": copies}
    assert 4 * without.trained < copies < 4.2 * without.trained  # BatchNorm has statistics beside its weights
    assert all(sums(averaged)[moment] == size + copies for moment, size in sums(without).items())


def test_muon_keeps_one_state_for_a_kernel(text_config, tmp_path):
    batch = SiglipBatch(images=16, texts=40, length=12, all_texts=300)
    costs = [siglip_costs(encoder_setup(text_config, tmp_path, muon=muon), batch) for muon in (False, True)]
    vision: Any = SiglipResNetModel(encoder_setup(text_config, tmp_path).encoder).vision_model
    kernels = sum(tensor.numel() for tensor in vision.parameters() if is_kernel(tensor))
    assert costs[0].optimizer - costs[1].optimizer == pytest.approx(4 * kernels, abs=200)  # and a number of steps each


def test_parts_of_a_batch_need_less_memory_and_more_work(text_config, tmp_path):
    batch = SiglipBatch(images=64, texts=160, length=12, all_texts=300)
    whole, parts = (
        siglip_costs(encoder_setup(text_config, tmp_path, True, bf16=False, micro_batch_size=size), batch)
        for size in (0, 16)
    )
    assert sums(parts)["backward"] < 0.5 * sums(whole)["backward"]
    assert {"first pass", "loss over all parts"} == set(parts.moments) - set(whole.moments)
    assert 1.2 * whole.flops < parts.flops < 1.5 * whole.flops  # the forward pass twice, of three that a step is


def test_an_encoder_that_caches_texts_does_not_run_its_tower_in_a_step(text_config, tmp_path):
    cached, trained = (
        siglip_costs(
            encoder_setup(text_config, tmp_path, trains, bf16=False),
            SiglipBatch(images=4, texts=20, length=12, all_texts=300),
        )
        for trains in (False, True)
    )
    assert cached.flops < trained.flops
    assert "whitening of the text projection" in cached.moments
    assert "text tower" in cached.moments["text features"]
    assert not any("text tower" in kinds for name, kinds in cached.moments.items() if name != "text features")


def test_a_whitened_stem_has_no_gradients(text_config, tmp_path):
    setup, batch = encoder_setup(text_config, tmp_path), SiglipBatch(images=4, texts=20, length=12, all_texts=300)
    arguments = SiglipModelArguments(text_model="base", embedding_size=8, whiten_stem=True)
    plain, whitened = siglip_costs(setup, batch), siglip_costs(replace(setup, model=arguments), batch)
    assert whitened.flops < plain.flops and whitened.parameters == plain.parameters


# Errors --------------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_needs_data_is_an_error(make_setup):
    with pytest.raises(UserError, match="--optim adafactor .* adamw_torch_fused"):
        vlm_costs(make_setup(bits=16, optim="adafactor"), BATCH)


def test_dora_on_quantised_weights_is_an_error(make_setup):
    with pytest.raises(UserError, match="--use-dora with --bits 4 cannot be planned"):
        vlm_costs(make_setup(bits=4, use_dora=True), BATCH)


def test_features_are_counted_for_one_item(make_setup):
    costs = vlm_costs(make_setup(bits=16), BATCH)
    assert costs.feature_bytes == 4 * VISION_CONFIG["projection_dim"]
    whole = sums(costs)["image features"] - sum(costs.weights.values())
    assert whole > ENCODED_AT_ONCE * costs.feature_bytes
    assert highest({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 2.0}}) == ("a", 3.0)
