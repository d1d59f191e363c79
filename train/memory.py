"""Memory and work of a model without its weights: it runs on tensors that have a shape and no data.

A model is built on the meta device, each of its tensors gets a counterpart of torch's `FakeTensorMode`, and its own
forward and backward passes run on them. Whatever the architecture, the precision, autocast or checkpointing make it
allocate is seen, one operator after another; no formula knows the layers.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
)


@dataclass(frozen=True)
class Speed:
    """
    How fast a device is; an operator takes the longest of its three times.

    Args:
        flops (`float`): floating point operations a second, in matrix products.
        bandwidth (`float`): bytes a second that element-wise operators read and write.
        latency (`float`): seconds that the smallest operator takes.
    """

    flops: float
    bandwidth: float = float("inf")
    latency: float = 0.0


class MemoryMeter(TorchDispatchMode):
    """
    Counts, within its context, the bytes of tensors from their making to their release, and the work of operators.

    Tensors are counted by their storage, so that views and in-place results add nothing, under the kind that is
    current when they are made.

    Args:
        device (`torch.device`): only tensors there are counted.
        speed (`Speed`, *optional*): for `seconds`.

    Attributes:
        kind (`str`): the kind that new tensors get.
        alive (`Counter`): bytes by kind, now.
        moments (`dict[str, dict[str, int]]`): for each moment that [`begin`] named, `alive` where its sum was highest.
        flops (`int`), seconds (`float`): the work of all operators, and how long it takes.
    """

    def __init__(self, device: torch.device, speed: Speed | None = None) -> None:
        super().__init__()
        self.device_type = device.type
        self.speed = speed or Speed(1.0)
        self.kind = ""
        self.alive: Counter[str] = Counter()
        self.moments: dict[str, dict[str, int]] = {}
        self.flops = 0
        self.seconds = 0.0
        self._moment: str | None = None
        self._total = self._highest = 0
        self._storages: dict[int, tuple[str, int, weakref.ref]] = {}

    @property
    def total(self) -> int:
        """Bytes of all tensors that are alive now."""
        return self._total

    def begin(self, moment: str, kind: str) -> None:
        """From here on the highest sum is that of `moment`, and new tensors are of `kind`."""
        self._moment, self.kind, self._highest = moment, kind, 0
        self._note_highest()

    def end(self) -> None:
        """The moment is over: what is made from here on counts for none."""
        self._moment = None

    def move(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor, with all that shares its storage, under another kind."""
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size, reference = self._storages[key]
            self.alive[old] -= size
            self.alive[kind] += size
            self._storages[key] = (kind, size, reference)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        elif func.name() == "bitsandbytes::gemm_4bit":
            with self:
                return _dequantized_linear(*args, **kwargs)
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._watch(tensor)
        if made and not func.is_view:
            self._note_work(func, args, kwargs, out, made)
        return out

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages or _device_type(tensor) != self.device_type:
            return
        size = storage.nbytes()
        self._storages[key] = (self.kind, size, weakref.ref(storage, partial(self._release, key)))
        self.alive[self.kind] += size
        self._total += size
        self._note_highest()

    def _release(self, key: int, reference: weakref.ref) -> None:
        kind, size, _ = self._storages.pop(key)
        self.alive[kind] -= size
        self._total -= size

    def _note_highest(self) -> None:
        if self._moment is not None and self._total >= self._highest:
            self._highest = self._total
            self.moments[self._moment] = {kind: size for kind, size in self.alive.items() if size}

    def _note_work(self, func: Any, args: Any, kwargs: Any, out: Any, made: Sequence[torch.Tensor]) -> None:
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        traffic = sum(tensor.numel() * tensor.itemsize for tensor in (*read, *made))
        self.flops += flops
        self.seconds += max(flops / self.speed.flops, traffic / self.speed.bandwidth, self.speed.latency)


def _device_type(tensor: torch.Tensor) -> str:
    # The property of a fake tensor is an operator of its own, which would be dispatched.
    return (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type


def _positions(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with each mask that has data as the positions of its true values, whose number a fake cannot know."""
    positions: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            positions += index.nonzero().unbind(1)
        else:
            positions.append(index)
    return positions


def _dequantized_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    shape: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """`bitsandbytes::gemm_4bit` as its own fallback computes it: with the whole weight dequantised first."""
    ops = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        absmax = ops.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32) + absmax_offset
    weight = ops.dequantize_4bit(packed, absmax, blocksize, quant_type, shape, x.dtype)
    # Not `F.linear`, which would come here whole, without a count of its work.
    rows = x.reshape(-1, shape[1])
    out = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], shape[0])


def fake_mode() -> FakeTensorMode:
    """For [`materialize`]. It is to be active only where tensors are made: tensors with data, such as token ids and
    masks, then keep it, and what depends on their values can be run."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def materialize(
    model: nn.Module,
    device: torch.device,
    mode: FakeTensorMode,
    meter: MemoryMeter,
    kind_of: Callable[[str, torch.Tensor], str],
) -> None:
    """
    Give every parameter and buffer of a model on the meta device a fake counterpart on `device`, in place.

    Layers of bitsandbytes get their packed weights with all statistics, as loading a checkpoint into them would.

    Args:
        model (`nn.Module`): on the meta device.
        device (`torch.device`): which the fakes pretend to be on.
        mode (`FakeTensorMode`): from [`fake_mode`], not active.
        meter (`MemoryMeter`): active; counts what is made.
        kind_of (`Callable`): gives for the name of a parameter or buffer, and its tensor on the meta device, the kind
            to count it under.
    """
    done: dict[int, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is None:
                    continue
                if id(tensor) not in done:  # tied weights are one tensor
                    meter.kind = kind_of(f"{prefix}.{name}", tensor)
                    done[id(tensor)] = _counterpart(module, tensor, device, mode)
                tensors[name] = done[id(tensor)]


def _counterpart(module: nn.Module, tensor: torch.Tensor, device: torch.device, mode: FakeTensorMode) -> torch.Tensor:
    kind = type(tensor).__name__
    if kind == "Params4bit":
        return _packed(module, tensor, device, mode)
    if kind == "Int8Params":
        return _int8(module, tensor.shape, device, mode)
    with mode:
        data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _packed(layer: Any, weight: Any, device: torch.device, mode: FakeTensorMode) -> nn.Parameter:
    import bitsandbytes

    with mode:
        data = torch.empty(weight.shape, dtype=layer.compute_dtype, device=device)
    # A `Params4bit` cannot hold a fake tensor; its layer asks no more of it than the quantisation state.
    packed, state = bitsandbytes.functional.quantize_4bit(
        data,
        blocksize=weight.blocksize,
        compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type,
        quant_storage=weight.quant_storage,
    )
    layer.support_avx512bf16_for_cpu = False  # as `keep_4bit_weights`
    layer.quant_state = state
    parameter = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state  # type: ignore[attr-defined]
    return parameter


def _int8(layer: Any, shape: torch.Size, device: torch.device, mode: FakeTensorMode) -> nn.Parameter:
    # How many columns are outliers depends on the data; they are few.
    layer.state.threshold = 0.0
    with mode:
        data = torch.empty(shape, dtype=torch.int8, device=device)
        scales = torch.empty(shape[0], dtype=torch.float32, device=device)
    weight: Any = nn.Parameter(data, requires_grad=False)
    weight.CB, weight.SCB = data, scales
    return weight


__all__ = ["MemoryMeter", "Speed", "fake_mode", "materialize"]
