"""Muon, for the kernels of convolutions; AdamW for all other weights."""

from collections.abc import Callable
from typing import Any

import torch

from sigphi.train.precision import cpu_has_bfloat16

# Of the polynomial that takes every singular value from 0.003 up to near 1 in five steps (Jordan, 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def is_kernel(parameter: torch.Tensor) -> bool:
    """Whether it is the kernel of a convolution behind the first, which reads colors."""
    return parameter.ndim == 4 and parameter.shape[1] > 3


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """
    `U S' V^T` of a matrix `U S V^T`, with every singular value brought near 1 (between 0.7 and 1.2).

    It is computed in bfloat16, or in float32 on a CPU that has no bfloat16.

    Args:
        matrix (`torch.Tensor` of shape `(rows, columns)`): of any scale.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    is_coarse = matrix.device.type != "cpu" or cpu_has_bfloat16()
    values = (matrix.t() if is_tall else matrix).to(torch.bfloat16 if is_coarse else torch.float32)
    values = values / values.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = values @ values.t()
        values = torch.addmm(values, torch.addmm(gram, gram, gram, beta=b, alpha=c), values, beta=a)
    return values.t() if is_tall else values


class Muon(torch.optim.AdamW):
    """
    AdamW, but the kernels of [`is_kernel`] move by their orthogonalised momentum.

    Muon is by Jordan (kellerjordan.github.io/posts/muon). The length of a step is matched to that of AdamW (Liu et
    al., arXiv 2502.16982, section 2.2), so that one learning rate and one weight decay suit all weights.
    `torch.optim.Muon` takes matrices alone; a kernel is one of shape `(out, in * height * width)`.

    Its arguments are those of `torch.optim.AdamW`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of all weights."""
        groups = self.param_groups
        self.param_groups = [group | {"params": [p for p in group["params"] if not is_kernel(p)]} for group in groups]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"]:
                if is_kernel(parameter) and parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])
        return loss

    def _move(self, kernel: torch.Tensor, learning_rate: float, weight_decay: float) -> None:
        assert kernel.grad is not None
        state = self.state[kernel]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(kernel)
            state["step"] = torch.tensor(0.0)  # unused, but AdamW asks for it when states are loaded
        momentum = state["momentum_buffer"].lerp_(kernel.grad, 1 - _MOMENTUM)
        update = orthogonalized(kernel.grad.lerp(momentum, _MOMENTUM).flatten(1))  # (out, in * height * width)
        kernel.mul_(1 - learning_rate * weight_decay)
        kernel.add_(update.view_as(kernel), alpha=-learning_rate * 0.2 * max(update.shape) ** 0.5)


__all__ = ["Muon", "is_kernel", "orthogonalized"]
