"""The first loss or gradient that is no number ends a training, with the step on disk and the likely cause by name."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from sigphi.train.errors import UserError
from sigphi.train.fingerprints import digest, tensor_parts
from sigphi.train.random_state import RandomState, own_random_numbers, set_random_state


@dataclass
class Step:
    """
    What an update is computed from, besides the weights.

    Args:
        batches (`list[dict]`): as the collator made them.
        num_items (`torch.Tensor` or `int`, *optional*): supervised tokens of the update, as the Trainer counts them.
        random (`RandomState`): before the first forward pass.
        losses (`list[torch.Tensor]`): of each batch, as far as the step has come.
    """

    batches: list[dict[str, Any]] = field(default_factory=list)
    num_items: Any = None
    random: RandomState | None = None
    losses: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """
    What was found of a step with a number that is none.

    Args:
        step (`int`): the number of the update, from 1.
        losses (`list[torch.Tensor]`): of each of its batches.
        grad_norm (`torch.Tensor`): of its gradients.
        gradients (`str`): a hash over its gradients before they are clipped, of a second run of the step.
        is_repeatable (`bool`): whether that second run gave the same losses, bit for bit.
        cause (`str`): what is the likely cause, as a sentence.
    """

    step: int
    losses: list[torch.Tensor]
    grad_norm: torch.Tensor
    gradients: str
    is_repeatable: bool
    cause: str

    def equals(self, other: "Finding") -> bool:
        """Whether two runs of a step agree, bit for bit."""
        return (
            self.gradients == other.gradients
            and same_bits(self.losses, other.losses)
            and same_bits([self.grad_norm], [other.grad_norm])
        )

    def what(self) -> str:
        """Which number is none."""
        losses = ", ".join(f"{loss.item():g}" for loss in self.losses)
        return f"step {self.step}: the loss is {losses}, the norm of the gradients {self.grad_norm.item():g}"


class NonFiniteError(UserError):
    """
    A training has met a number that is none, in its loss or its gradients.

    Args:
        message (`str`): for the user.
        finding (`Finding`): the same for a program.
    """

    def __init__(self, message: str, finding: Finding) -> None:
        super().__init__(message)
        self.finding = finding


def same_bits(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether two lists hold the same numbers, NaNs of the same kind included."""
    return digest(tensor_parts(dict(_numbered(some)))) == digest(tensor_parts(dict(_numbered(others))))


def _numbered(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, tensor in enumerate(tensors):
        yield f"{number:06}", tensor


def all_finite(losses: list[torch.Tensor], grad_norm: Any) -> bool:
    """
    Whether all are numbers. Waits for a GPU once.

    Args:
        losses (`list[torch.Tensor]`): of each batch of an update, scalars.
        grad_norm (`torch.Tensor` or `float`, *optional*): `None` where it is not known, or says nothing.
    """
    values = losses if grad_norm is None else [*losses, torch.as_tensor(grad_norm, device=losses[0].device)]
    return bool(torch.isfinite(torch.stack([value.float() for value in values])).all())


def examine(trainer: Trainer, model: nn.Module, step: Step, grad_norm: Any) -> Finding:
    """
    Run a step again, with an eye on every module, and tell where the first number that is none comes from.

    Args:
        trainer (`Trainer`): which has computed the gradients of the step, but not updated the weights.
        model (`nn.Module`): as the Trainer calls it, in its wrappers.
        step (`Step`): the step.
        grad_norm (`torch.Tensor` or `float`): of the gradients.
    """
    # In this order: bad data may have been what a weight was started from.
    cause = _bad_input(step) or _bad_weight(model)
    watch = _Watch()
    with own_random_numbers(), watch.over(model):
        losses = _run_again(trainer, model, step)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Finding(
        trainer.state.global_step + 1,
        [loss.detach().cpu() for loss in step.losses],
        torch.as_tensor(grad_norm).detach().cpu(),
        digest(tensor_parts(gradients)),
        same_bits(losses, step.losses),
        cause or watch.cause(losses),
    )


def _run_again(trainer: Any, model: nn.Module, step: Step) -> list[torch.Tensor]:
    """The losses of a step; its gradients are left in the parameters."""
    assert step.random is not None, "a step begins with its random numbers"
    model.zero_grad()
    set_random_state(step.random)
    losses = []
    for number, batch in enumerate(step.batches):
        is_last = number == len(step.batches) - 1
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        with contextlib.nullcontext() if is_last else trainer.accelerator.no_sync(model):
            losses.append(trainer.one_batch(model, dict(batch), step.num_items))
    return losses


def _bad_weight(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return (
                f"the weight {_plain(name)} was no number before this step: an earlier update has broken it (lower "
                f"--learning-rate), or it was read so."
            )
    return None


def _bad_input(step: Step) -> str | None:
    for number, batch in enumerate(step.batches):
        for name, tensor in tensors_of(batch):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                rows = (~torch.isfinite(tensor.flatten(1))).any(1).nonzero().flatten().tolist() if tensor.ndim else []
                where = f" in row {', '.join(map(str, rows[:5]))}" if rows else ""
                return (
                    f"`{name}` of batch {number} is no number{where} before the model sees it: the data are broken, "
                    f"or the file of cached features."
                )
    return None


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dictionaries, lists and tuples, by the path to each, such as `"pairs/text_ids"`."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from tensors_of(item, f"{name}/{key}" if name else str(key))


class _Watch:
    """Notes the first module and the first weight whose output or gradient is no number, in the order of the run."""

    def __init__(self) -> None:
        self.module: str | None = None
        self.largest = 0.0  # number that went into it
        self.dtype: torch.dtype | None = None
        self.weight: str | None = None

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Within it the model is watched."""
        handles = [module.register_forward_hook(self._see_output(name)) for name, module in model.named_modules()]
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        handles += [p.register_post_accumulate_grad_hook(self._see_gradient(name)) for name, p in trained]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_output(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            floats = [tensor for _, tensor in tensors_of(output) if tensor.is_floating_point()]
            if self.module is None and not all(torch.isfinite(tensor).all() for tensor in floats):
                given = [tensor for _, tensor in tensors_of(inputs) if tensor.is_floating_point() and tensor.numel()]
                self.module, self.dtype = _plain(name), floats[0].dtype
                self.largest = max((tensor.abs().max().item() for tensor in given), default=0.0)

        return see

    def _see_gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        def see(parameter: torch.Tensor) -> None:
            if self.weight is None and not torch.isfinite(parameter.grad).all():  # type: ignore[arg-type]
                self.weight = _plain(name)

        return see

    def cause(self, losses: list[torch.Tensor]) -> str:
        """The likely cause, as a sentence."""
        if self.module is not None:
            others = "" if self.dtype == torch.float32 else " or --bf16 false --fp16 false"
            return (
                f"{self.module or 'the model'} is the first module whose output is no number ({self.dtype}; numbers "
                f"up to {self.largest:.3g} go in): they overflow, or something is divided by 0. Try a lower "
                f"--learning-rate{others}."
            )
        if not all_finite(losses, None):
            return "all modules give numbers and the loss is none: it overflows. Try a lower --learning-rate."
        if self.weight is not None:
            return (
                f"the loss is a number, and the gradient of {self.weight} is the first that is none: something is "
                f"divided by 0 in the backward pass, or overflows. Try a lower --learning-rate."
            )
        return (
            "run again, the step gives gradients that are numbers, too large for a norm or other ones than before: "
            "try a lower --learning-rate, or another machine."
        )


def _plain(name: str) -> str:
    """The name of a module or weight as the model has it, without the wrapper of several processes."""
    return name.removeprefix("module.")


__all__ = ["Finding", "NonFiniteError", "Step", "all_finite", "examine", "same_bits", "tensors_of"]
