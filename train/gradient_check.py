"""Whether what a VLM trains gets gradients at all: seen in the first updates, before hours have gone by."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sigphi.train.errors import UserError

logger = logging.getLogger(__name__)

# Parts of the names of what has to have a gradient from the first update on, with the likely cause when it has none.
_CAUSES = {
    ".multi_modal_projector.": "the images do not reach the answers: features of the encoder that are all zero, or "
    "questions without their image",
    ".lora_B.": "the answers do not depend on these layers: --lora-dropout of 1, lora_A of zeros, or, where all are "
    "meant, gradient checkpointing of the reentrant kind",
    ".lora_magnitude_vector.": "the answers do not depend on these layers",
}
_LORA_A, _LORA_B = ".lora_A.", ".lora_B."
_CAUSE_A = "lora_B has moved, and nothing comes through it: --lora-dropout of 1, or layers whose input is zero"
# Names that a message shows.
_SHOWN = 3


class GradientCheck(TrainerCallback):
    """
    Ends a training in which something that is to be trained gets no gradient.

    At the first update every tensor of the projector, every `lora_B` and every magnitude vector of DoRA has to have a
    gradient that is not zero. Those of `lora_A` are exactly zero as long as `lora_B` is, which it is at the start, and
    stays while the learning rate is 0: they are looked at in the first update that finds a `lora_B` moved, usually the
    second, behind a warm-up from 0 the third. A step whose gradients are not finite proves nothing: the next one is
    looked at.

    The gradients are those that the optimizer gets: of all accumulated batches and all processes, clipped. Each
    process sees the same. Costs one number a tensor, at two updates of a training.

    Raises:
        UserError: naming the tensors, and the likely cause.
    """

    def __init__(self) -> None:
        self.is_waiting_for_start = self.is_waiting_for_lora_a = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A training that goes on from a checkpoint is checked too."""
        self.is_waiting_for_start = self.is_waiting_for_lora_a = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind the backward passes of an update, before its step."""
        if not (self.is_waiting_for_start or self.is_waiting_for_lora_a):
            return
        trained = {name: one for name, one in kwargs["model"].named_parameters() if one.requires_grad}
        update = state.global_step + 1
        if self.is_waiting_for_start:
            first = {name: one for name, one in trained.items() if any(part in name for part in _CAUSES)}
            self.is_waiting_for_start = not _is_checked(first, update)
        lora_b = [one for name, one in trained.items() if _LORA_B in name]
        if not lora_b or bool(lora_b[0].any()):
            lora_a = {name: one for name, one in trained.items() if _LORA_A in name}
            self.is_waiting_for_lora_a = not _is_checked(lora_a, update)


def _is_checked(parameters: dict[str, nn.Parameter], update: int) -> bool:
    """Whether the gradients could be judged, and are there."""
    gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
    sizes: dict[str, float] = {}
    if gradients:
        largest = [torch.linalg.vector_norm(gradient, float("inf")) for gradient in gradients.values()]
        sizes = dict(zip(gradients, torch.stack(largest).tolist(), strict=True))
        if not all(size < float("inf") for size in sizes.values()):
            return False
    silent = [name for name in parameters if sizes.get(name, 0.0) == 0.0]
    if silent:
        raise UserError(_finding(silent, len(parameters), update))
    return True


def _finding(silent: list[str], count: int, update: int) -> str:
    shown = ", ".join(name.removeprefix("module.") for name in silent[:_SHOWN])
    more = f" and {len(silent) - _SHOWN} more" if len(silent) > _SHOWN else ""
    cause = next((cause for part, cause in _CAUSES.items() if part in silent[0]), _CAUSE_A)
    return (
        f"update {update}: {len(silent)} of {count} tensors that are trained get no gradient: {shown}{more}.\n"
        f"Likely {cause}."
    )


__all__ = ["GradientCheck"]
