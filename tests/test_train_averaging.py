"""The average of the weights: its value, what is evaluated and saved by it, and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Originals
from safetensors.torch import load_file
from test_train_siglip_trainer import make_images, make_trainer
from torch import nn
from transformers import TrainerCallback

from sigphi import SiglipResNetModel, SiglipTrainer
from sigphi.train.averaging import LIVE_WEIGHTS, averaged_tensors
from sigphi.train.collators import SiglipCollator
from sigphi.train.errors import UserError

DECAY = 0.8
OPTIONS: dict[str, Any] = {"ema_decay": DECAY, "max_steps": 6, "augment": True, "learning_rate": 1e-2}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}


class Weights(TrainerCallback):
    """Keeps what is averaged as each step leaves it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(copies(averaged_tensors(kwargs["model"])))


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def naive_average(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Weight by weight, in float64."""
    average = {name: tensor.double() for name, tensor in steps[0].items()}
    for step in steps[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * step[name] for name in average}
    return average


@pytest.fixture
def make(shared: Originals, tiny_encoder_processor: Any, tmp_path: Path) -> Any:
    """`make("folder", option=value)`: a trainer of the same encoder each time."""

    def make(folder: str, **options: Any) -> SiglipTrainer:
        encoder = shared["encoder"]
        encoder.text_model.language_model.requires_grad_(False)
        collator = SiglipCollator(tiny_encoder_processor, make_images())
        together = OPTIONS | CHECKPOINTS | options
        return make_trainer(tmp_path / folder, encoder, collator, processor=tiny_encoder_processor, **together)

    return make


@pytest.fixture
def whole(make: Any) -> tuple[SiglipTrainer, Weights]:
    """Six steps in one go."""
    trainer, weights = make("whole"), Weights()
    trainer.add_callback(weights)
    trainer.train()
    return trainer, weights


def test_training_leaves_the_average(whole):
    trainer, weights = whole
    left = averaged_tensors(trainer.model)
    assert len(weights.steps) == 6
    for name, expected in naive_average(weights.steps).items():
        torch.testing.assert_close(left[name].double(), expected, rtol=1e-4, atol=1e-6)
    assert (left["logit_scale"] - weights.steps[-1]["logit_scale"]).abs() > 1e-4


def test_what_is_frozen_is_not_averaged(whole):
    model = whole[0].model
    names = averaged_tensors(model).keys()
    assert {"logit_scale", "vision_model.projection.weight", "text_model.projection.bias"} <= names
    assert not [name for name in names if name.startswith("text_model.language_model.")]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(".running_" in name for name in names) == 2 * norms > 0


def test_evaluations_and_checkpoints_are_of_the_average(whole, make):
    trainer, weights = whole
    folder = Path(trainer.args.output_dir) / "checkpoint-3"
    saved, live = load_file(folder / "model.safetensors"), load_file(folder / LIVE_WEIGHTS)
    assert live.keys() == averaged_tensors(trainer.model).keys()
    for name, expected in naive_average(weights.steps[:3]).items():
        torch.testing.assert_close(saved[name].double(), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(live[name], weights.steps[2][name])
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    other = make("other", ema_decay=0.0)
    other.model.load_state_dict(saved, strict=False)
    assert other.evaluate()["eval_loss"] == pytest.approx(logged[3], rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[6], rel=1e-6)


def test_a_resumed_run_is_the_whole_run_bit_for_bit(whole, make):
    trainer, _ = whole
    folder = Path(trainer.args.output_dir)
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    for name in ("model.safetensors", LIVE_WEIGHTS):
        expected, found = (load_file(Path(one) / "checkpoint-6" / name) for one in (folder, resumed.args.output_dir))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), name
    left, expected = resumed.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(left[key], tensor) for key, tensor in expected.items())
    logs = [
        {key: value for entry in one.state.log_history for key, value in entry.items() if key in ("loss", "eval_loss")}
        for one in (trainer, resumed)
    ]
    assert logs[0] == logs[1]


def test_the_best_model_is_that_of_its_checkpoint(make):
    trainer = make("best", load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3", "the loss falls, and the greatest is wanted"
    trainer.save_model()
    saved, expected = (load_file(folder / "model.safetensors") for folder in (Path(trainer.args.output_dir), best))
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
    assert not (Path(trainer.args.output_dir) / LIVE_WEIGHTS).exists()
    assert SiglipResNetModel.from_pretrained(trainer.args.output_dir) is not None


def test_a_checkpoint_and_its_run_keep_an_average_or_neither(whole, make):
    folder = Path(whole[0].args.output_dir) / "checkpoint-3"
    with pytest.raises(UserError, match="--ema-decay was 0.8, is 0.0"):
        make("without", ema_decay=0.0).train(resume_from_checkpoint=str(folder))
    (folder / LIVE_WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"its file {LIVE_WEIGHTS} is missing"):
        make("with").train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_is_a_share(make, decay):
    with pytest.raises(UserError, match="--ema-decay must be at least 0 .* below 1"):
        make("wrong", ema_decay=decay)
