"""The random numbers of Python, NumPy and PyTorch: taken down, and set again."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

# Of this process, as tensors and as what JSON can hold: both go to a safetensors file.
RandomState = tuple[dict[str, torch.Tensor], dict[str, Any]]


def random_state() -> RandomState:
    """The state of all generators. Costs some ten microseconds: nothing waits for a GPU."""
    name, keys, *rest = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": random.getstate(), "numpy": [name, *rest]}


def set_random_state(state: RandomState) -> None:
    """Go on with the random numbers behind [`random_state`]; also when it has been through JSON."""
    tensors, others = state
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))
    name, *rest = others["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    devices = sorted((name for name in tensors if name.startswith("cuda.")), key=lambda name: int(name[5:]))
    if devices:
        torch.cuda.set_rng_state_all([tensors[name] for name in devices])


@contextlib.contextmanager
def own_random_numbers(seed: int = 0) -> Iterator[None]:
    """Within it random numbers are those of `seed`; those outside go on as if nothing had been drawn."""
    state = random_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state)


__all__ = ["RandomState", "own_random_numbers", "random_state", "set_random_state"]
