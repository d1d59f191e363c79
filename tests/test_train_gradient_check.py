"""A training in which something gets no gradient ends in its first updates, with names."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from processes import run_processes
from torch import nn
from transformers import TrainerCallback

from sigphi import VlmTrainingArguments
from sigphi.train.collators import VlmCollator
from sigphi.train.errors import UserError
from sigphi.train.gradient_check import GradientCheck
from sigphi.train.trainers import VlmTrainer

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "target_modules": ["q_proj", "fc1"]}
NUM_B = 4


class Seen(TrainerCallback):
    """What the check still waits for behind each update."""

    def __init__(self) -> None:
        self.waiting: list[tuple[bool, bool]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check = self.check
        self.waiting.append((check.is_waiting_for_start, check.is_waiting_for_lora_a))


def new_model(make_vlm: Any, base_folder: Path, **lora: Any) -> Any:
    """The tiny VLM with LoRA as training starts it: lora_B is zero."""
    model = make_vlm(base_language_model=str(base_folder)).requires_grad_(False)
    model.add_lora(LORA | lora)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def train(model: Any, folder: Path, features: torch.Tensor | None = None, **values: Any) -> list[tuple[bool, bool]]:
    image = model.config.image_token_id
    rows = [{"image_index": i % 3, "prompt_ids": [image, 5 + i, 6], "answer_ids": [9 + i, 0]} for i in range(8)]
    fixed: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "bf16": False, "eval_strategy": "no"}
    fixed |= {"save_strategy": "no", "use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 4}
    fixed |= {"warmup_steps": 0, "gradient_checkpointing": False}
    features = torch.randn(3, 1, 32) if features is None else features
    seen = Seen()
    trainer = VlmTrainer(
        model=model,
        args=VlmTrainingArguments(output_dir=str(folder), **fixed | values),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=VlmCollator(model.config.pad_token_id, image_features=features),
        callbacks=[seen],
    )
    seen.check = next(one for one in trainer.callback_handler.callbacks if isinstance(one, GradientCheck))
    trainer.train()
    return seen.waiting


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_sound_training_is_checked_in_two_updates(make_vlm, base_folder, tmp_path, options, use_dora):
    waiting = train(new_model(make_vlm, base_folder, use_dora=use_dora), tmp_path, **options)
    assert waiting == [(False, True), (False, False), (False, False), (False, False)]


def test_lora_a_is_looked_at_when_lora_b_has_moved(make_vlm, base_folder, tmp_path):
    # The first step of a warm-up has the learning rate 0.
    waiting = train(new_model(make_vlm, base_folder), tmp_path, warmup_steps=3)
    assert waiting == [(False, True), (False, True), (False, False), (False, False)]


def test_a_model_without_lora_has_no_lora_to_check(make_vlm, tmp_path):
    model = make_vlm()
    model.model.vision_tower.requires_grad_(False)
    assert train(model, tmp_path, max_steps=1) == [(False, False)]


def test_images_that_say_nothing_are_named_with_the_projector(make_vlm, base_folder, tmp_path):
    with pytest.raises(
        UserError, match=r"(?s)update 1: 2 of 8 .*: model.multi_modal_projector.linear_1.weight, .*\n.*encoder"
    ):
        train(new_model(make_vlm, base_folder), tmp_path, features=torch.zeros(3, 1, 32))


def test_a_layer_that_nothing_comes_through_is_named(make_vlm, base_folder, tmp_path):
    model = new_model(make_vlm, base_folder)
    name = "model.language_model.layers.1.mlp.fc1"
    nn.init.zeros_(model.get_submodule(name).lora_A["default"].weight)
    with pytest.raises(UserError, match=f"(?s)update 1: 1 of 8 .*: {name}.lora_B.default.*\n.*lora_A of zeros"):
        train(model, tmp_path)


def test_all_names_would_be_too_many(make_vlm, base_folder, tmp_path):
    with pytest.raises(UserError, match=r"(?s)update 1: 4 of 8 .* and 1 more\.\n.*--lora-dropout of 1"):
        train(new_model(make_vlm, base_folder, lora_dropout=1.0), tmp_path)


def test_what_is_cut_off_behind_lora_b_is_named_at_the_second_update(make_vlm, base_folder, tmp_path):
    model = new_model(make_vlm, base_folder)
    name = "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    model.get_parameter(name).register_hook(torch.zeros_like)
    with pytest.raises(UserError, match=rf"(?s)update 2: 1 of {NUM_B} .*: {name}\.\n.*lora_B has moved"):
        train(model, tmp_path)


def test_a_step_that_overflows_proves_nothing(make_vlm, base_folder, tmp_path):
    model, calls = new_model(make_vlm, base_folder), []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) == 1 else gradient

    model.get_parameter("model.multi_modal_projector.linear_2.bias").register_hook(overflow)
    check = GradientCheck()
    for update in range(3):
        model.zero_grad()
        ids = torch.tensor([[model.config.image_token_id, 5, 6, 7]])
        model(input_ids=ids, image_features=torch.randn(1, 1, 32), labels=ids).loss.backward()
        state = type("State", (), {"global_step": update})
        check.on_pre_optimizer_step(None, state, None, model=model)
        assert check.is_waiting_for_start == (update == 0)
        assert check.is_waiting_for_lora_a, "lora_B has not moved"


def two_processes(model: Any, folder: Path) -> tuple[list[tuple[bool, bool]], str]:
    waiting = train(model, folder, max_steps=2)
    model.get_submodule("model.language_model.layers.0.mlp.fc1").lora_A["default"].weight.data.zero_()
    try:
        train(model, folder, max_steps=1)
    except UserError as error:
        return waiting, str(error)
    return waiting, ""


def test_two_processes_find_the_same(make_vlm, base_folder, tmp_path):
    results = run_processes(two_processes, 2, tmp_path, new_model(make_vlm, base_folder), tmp_path)
    assert results[0] == results[1]
    waiting, error = results[0]
    assert waiting == [(False, True), (False, False)]
    assert error.startswith("update 1: 1 of 8") and ": model.language_model.layers.0.mlp.fc1.lora_B" in error
