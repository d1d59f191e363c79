"""The Trainers of the two stages."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from sigphi.hub_card.cards import write_card
from sigphi.modeling.modeling_sigphi import LORA_FOLDER, LORA_WEIGHTS
from sigphi.train.arguments import check_launch
from sigphi.train.collators import random_shift_and_flip
from sigphi.train.errors import UserError


class _ArtifactTrainer(Trainer):
    """A Trainer whose output folders can be loaded and pushed as they are.

    Args:
        extra_evaluation (`Callable`, *optional*): called with the model after each evaluation; gives further metrics
            by name, without prefix.
        kwargs: those of [`~transformers.Trainer`].
    """

    def __init__(self, *, extra_evaluation: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any) -> None:
        check_launch(kwargs["args"])
        super().__init__(**kwargs)
        self.extra_evaluation = extra_evaluation

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels decay; scalars, biases and the weights of norms do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def learning_rate_of(self, name: str) -> float:
        """The peak learning rate of the parameter called `name`."""
        return self.args.learning_rate

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, over groups by learning rate and weight decay."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer: torch.optim.Optimizer = optimizer_class(self._parameter_groups(model), **options)
        return self.optimizer

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((self.learning_rate_of(name), decay), []).append(parameter)
        # The Trainer logs the learning rate of the first group: that of the most parameters.
        ordered = sorted(groups.items(), key=lambda group: -sum(parameter.numel() for parameter in group[1]))
        return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in ordered]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As the Trainer's, with the metrics of `extra_evaluation`."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.extra_evaluation is not None:
            model = self.accelerator.unwrap_model(self.model).eval()
            extra = {f"{metric_key_prefix}_{name}": value for name, value in self.extra_evaluation(model).items()}
            self.log(extra)
            metrics.update(extra)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A final folder holds no pickle: the arguments go to a JSON file. Checkpoints keep the Trainer's own."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            (folder / TRAINING_ARGS_NAME).unlink()
            (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")
        if self.args.should_save:
            write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is rendered from the folder's recorded facts, also before the Trainer pushes."""
        if self.is_world_process_zero():
            write_card(Path(self.args.output_dir))


class SiglipTrainer(_ArtifactTrainer):
    """
    Trains a [`SiglipResNetModel`] on batches of images with all their texts (see [`SiglipCollator`]).

    Gradient accumulation does not add negatives: the loss compares the pairs of one micro-batch. For the same reason
    it runs in one process: the pairs of several are not gathered.

    Raises:
        UserError: in a job of several processes.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs["args"].world_size > 1:
            raise UserError(
                f"the encoder trains in one process, and this job has {kwargs['args'].world_size}: each would compare "
                f"only its own pairs. Launch one process, with a larger --batch-size."
            )
        super().__init__(**kwargs)

    def learning_rate_of(self, name: str) -> float:
        """Temperature and bias are two numbers on a scale of ten; at the rate of the weights they would not move."""
        is_logit = name in ("logit_scale", "logit_bias")
        return self.args.logit_learning_rate if is_logit else self.args.learning_rate

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Augments the images of a training batch, on its device, and computes the sigmoid loss."""
        pixel_values = inputs["pixel_values"]  # (images, 3, height, width)
        if model.training and self.args.augment:
            pixel_values = random_shift_and_flip(pixel_values, shift=pixel_values.shape[-1] // 8)
        if self.args.channels_last:
            pixel_values = pixel_values.to(memory_format=torch.channels_last)
        return super().compute_loss(model, inputs | {"pixel_values": pixel_values}, return_outputs)


class VlmTrainer(_ArtifactTrainer):
    """
    Trains a [`SigPhiForConditionalGeneration`], by LoRA or in full.

    The projector has its own learning rate, `args.projector_learning_rate`. The evaluation loss is the mean over all
    supervised tokens of the evaluation set, however they are batched.
    """

    def learning_rate_of(self, name: str) -> float:
        """The projector starts from random weights and learns faster than what is already trained."""
        is_projector = ".multi_modal_projector." in f".{name}"
        return self.args.projector_learning_rate if is_projector else self.args.learning_rate

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the Trainer's, but no rows are repeated to fill the last batches of several processes."""
        even_batches = self.accelerator.even_batches
        self.accelerator.even_batches = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.accelerator.even_batches = even_batches

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Sums loss and supervised tokens over all batches and processes; no logits are kept."""
        model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64)  # loss, supervised tokens, rows
        for batch in dataloader:
            batch = self._prepare_inputs(batch)
            tokens = (batch["labels"][:, 1:] != -100).sum()
            with self.compute_loss_context_manager():
                loss = model(**batch, logits_to_keep=1).loss
            totals += torch.stack([loss.double() * tokens, tokens.double(), torch.tensor(len(batch["labels"]))]).cpu()
            self.control: Any = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        totals = self.accelerator.reduce(totals.to(self.args.device).float(), "sum").cpu()
        metrics = {f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=int(totals[2]))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """
        A checkpoint in adapter form brings only what was trained, and the image tower; the base is already there.
        """
        vlm: Any = self.accelerator.unwrap_model(model or self.model)
        if vlm.config.lora is None:
            super()._load_from_checkpoint(resume_from_checkpoint, vlm)
            return
        weights = load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
        lora = load_file(os.path.join(resume_from_checkpoint, LORA_FOLDER, LORA_WEIGHTS))
        vlm.load_adapter_weights(weights | vlm.lora_keys(lora))

    def _load_best_model(self) -> None:
        """As the Trainer's, for the adapter form too."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)


__all__ = ["SiglipTrainer", "VlmTrainer"]
