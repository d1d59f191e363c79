"""The device that would train: how much memory it has, and how fast it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from sigphi.train.memory import Speed


@dataclass(frozen=True)
class Machine:
    """
    The device that would train.

    Args:
        device (`torch.device`): of this process.
        speed (`Speed`): measured now, or given.
        memory (`float`): bytes that this process can have there, including what it holds.
        taken (`dict[str, float]`): bytes there that are taken whatever is trained, by kind.
    """

    device: torch.device
    speed: Speed
    memory: float
    taken: dict[str, float]

    @classmethod
    def present(cls, training: Any, tflops: float | None) -> "Machine":
        """The device of `training`, the options of one. On a CPU the data is to be read before."""
        device = training.device
        dtype = torch.bfloat16 if training.bf16 else torch.float32
        speed = Speed(tflops * 1e12) if tflops else measured_speed(device, dtype)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            others = total - free - torch.cuda.memory_reserved(device)
            workspaces = torch.cuda.memory_allocated(device)
            return cls(device, speed, total, {"CUDA context, other processes": others, "workspaces": workspaces})
        own = psutil.Process().memory_info()
        # Pages of libraries and mapped files can be dropped when memory is short.
        private = own.rss - own.shared
        memory = psutil.virtual_memory().available + private
        return cls(device, speed, memory, {"Python, libraries, questions and encoded images": private})


def measured_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """
    Matrix products, copies and the smallest operator on a device, each run for about a quarter of a second.

    Args:
        device (`torch.device`): the device.
        dtype (`torch.dtype`): of the matrix products.
    """
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    vector = torch.zeros(2**24 if device.type == "cpu" else 2**28, device=device)
    product = _seconds(lambda: matrix @ matrix, device)
    copy = _seconds(lambda: vector + 1.0, device)
    small = _seconds(lambda: vector[:1] + 1.0, device)
    return Speed(2 * size**3 / product, 2 * vector.nbytes / copy, small)


def _seconds(operation: Callable[[], Any], device: torch.device, budget: float = 0.25) -> float:
    """Mean time of an operation, after one run that does not count."""
    synchronize = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    operation()
    synchronize()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < budget:
        operation()
        synchronize()
        count += 1
    return (time.perf_counter() - start) / count


__all__ = ["Machine", "measured_speed"]
