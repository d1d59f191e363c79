"""The average of the weights of a training, for evaluation and for the model that it leaves."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Beside the averaged weights of a checkpoint, which are its model: those that training goes on with.
LIVE_WEIGHTS = "live_weights.safetensors"


def averaged_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """
    What is averaged, by name: the parameters that are trained, and the statistics of BatchNorm.

    Args:
        model (`nn.Module`): any; its frozen parameters need no average.
    """
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    for place, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            buffers = module.named_buffers(place)
            tensors |= {name: buffer for name, buffer in buffers if buffer.is_floating_point()}
    return tensors


class _Tensors(nn.Module):
    """The tensors of [`averaged_tensors`] themselves as a module, since `AveragedModel` copies whole modules."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for number, tensor in enumerate(tensors.values()):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(str(number), tensor)
            else:
                self.register_buffer(str(number), tensor)


class WeightAverage(TrainerCallback):
    """
    Keeps an exponential moving average of the weights (Polyak and Juditsky, 1992), see `torch.optim.swa_utils`.

    It starts as the weights after the first step. At the end of training the model gets it, for good.

    Args:
        decay (`float`): of the average in each step, above 0 and below 1.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.live: dict[str, torch.Tensor] = {}  # the model's own tensors, while it is trained
        self.average: AveragedModel | None = None
        self._resumed: dict[str, torch.Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start; where training is resumed, the model holds the average, and gets the weights to go on with."""
        self.live = averaged_tensors(kwargs["model"])
        update = get_ema_multi_avg_fn(self.decay)
        self.average = AveragedModel(_Tensors(self.live), multi_avg_fn=update, use_buffers=True)
        if self._resumed is not None:
            self.average.n_averaged.fill_(state.global_step)
            with torch.no_grad():
                for name, tensor in self.live.items():
                    tensor.copy_(self._resumed[name])
            self._resumed = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the new weights into the average."""
        assert self.average is not None
        self.average.update_parameters(_Tensors(self.live))
        self._share_statistics(list(self.average.module.buffers()))

    @staticmethod
    @torch.no_grad()
    def _share_statistics(buffers: list[torch.Tensor]) -> None:
        """Every process has BatchNorm's statistics of its own batches: the average is of the first one's, as saved."""
        if not buffers or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, 0)
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is its average from now on."""
        self._exchange()
        self.stop()

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model is its average; before and behind training nothing changes."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def stop(self) -> None:
        """Leave the model as it is."""
        self.live, self.average = {}, None

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average is None:
            return
        # Values, not tensors: others hold on to these. One at a time, so that no second copy lies in memory.
        for tensor, other in zip(self.live.values(), self._tensors_of(self.average), strict=True):
            kept = tensor.clone()
            tensor.copy_(other)
            other.copy_(kept)

    @staticmethod
    def _tensors_of(average: AveragedModel) -> list[torch.Tensor]:
        """In the order of `live`."""
        tensors = dict(average.module.named_parameters()) | dict(average.module.named_buffers())
        return [tensors[str(number)] for number in range(len(tensors))]

    def save_live_weights(self, folder: Path) -> None:
        """Into a checkpoint, so that training can go on from it."""
        save_file({name: tensor.contiguous() for name, tensor in self.live.items()}, folder / LIVE_WEIGHTS)

    def resume(self, folder: Path) -> None:
        """Read what [`save_live_weights`] wrote; the model is read from the same folder."""
        self._resumed = load_file(folder / LIVE_WEIGHTS)


__all__ = ["LIVE_WEIGHTS", "WeightAverage", "averaged_tensors"]
