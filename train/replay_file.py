"""The file that holds a training step: its batches, their rows, the weights and the random numbers."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainingArguments

from sigphi.hub_card.files import written_aside
from sigphi.train.averaging import averaged_tensors
from sigphi.train.errors import UserError
from sigphi.train.nonfinite import Finding, Step, tensors_of

# Under the output folder. The Trainer's uploads to the Hub pass over names that begin so: rows may be private.
FOLDER = "_replay"
_FORMAT = 1


@dataclass(frozen=True)
class Replay:
    """
    A step as a file holds it.

    Args:
        step (`Step`): its batches, losses and random numbers.
        weights (`dict[str, torch.Tensor]`): what is trained, and the statistics of BatchNorm, see [`weights_of`];
            before the update.
        finding (`Finding`): what was found.
        about (`dict`): `epoch` (float, as far as training had come), `world_size` and `rank`; `rows`, for each batch
            the numbers of its rows in the training data, or `None` where they are not known, and `contents`, these
            rows; `options`, which rebuild the trainer, or `None`.
    """

    step: Step
    weights: dict[str, torch.Tensor]
    finding: Finding
    about: dict[str, Any]


def replay_path(output_dir: Path, step: int, rank: int) -> Path:
    """Where a step is kept: a file for each process."""
    suffix = "" if rank == 0 else f"-rank-{rank}"
    return output_dir / FOLDER / f"step-{step}{suffix}.safetensors"


def write_replay(path: Path, replay: Replay) -> None:
    """Write a [`Replay`] as one safetensors file, which appears whole or not at all."""
    step, finding = replay.step, replay.finding
    assert step.random is not None, "a step begins with its random numbers"
    tensors, others = step.random
    content = {f"random/{name}": tensor for name, tensor in tensors.items()}
    content |= {f"weights/{name}": tensor for name, tensor in replay.weights.items()}
    content |= {f"losses/{number:06}": loss for number, loss in enumerate(finding.losses)}
    content |= {"grad_norm": finding.grad_norm}
    for number, batch in enumerate(step.batches):
        content |= {f"batches/{number:06}/{name}": tensor for name, tensor in tensors_of(batch)}
    about = replay.about | {
        "format": _FORMAT,
        "random": others,
        "plain": [_plain_values(batch) for batch in step.batches],
        "step": finding.step,
        "gradients": finding.gradients,
        "is_repeatable": finding.is_repeatable,
        "cause": finding.cause,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Clones, since tensors that share memory have no place in such a file.
    cloned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in content.items()}
    with written_aside(path) as aside:
        save_file(cloned, aside, metadata={"sigphi_replay": json.dumps(about, default=str)})


def _plain_values(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if isinstance(value, bool | int | float | str)}


def read_replay(path: Path) -> Replay:
    """
    Read what [`write_replay`] wrote.

    Raises:
        UserError: if the file is none of these.
    """
    try:
        about, tensors = _read(path)
        if about["format"] == _FORMAT:
            return _replay_of(about, tensors)
    # Whatever a file may hold that something else has written.
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is no replay file. A training that a NaN stops writes one, {FOLDER}/step-N.safetensors in its "
            f"--output-dir."
        ) from error
    raise UserError(f"{path} was written by another version of sigphi: replay it with that one.")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {})["sigphi_replay"])
        return about, {name: file.get_tensor(name) for name in file.keys()}


def _replay_of(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Replay:
    """What a file holds, as a [`Replay`]; raises one of several errors if it is of another form."""
    absent = sorted({"epoch", "world_size", "rank", "rows", "contents", "options"} - about.keys())
    if absent:
        raise KeyError(absent[0])
    losses = _under(tensors, "losses")
    finding = Finding(
        about["step"],
        [losses[name] for name in sorted(losses)],
        tensors["grad_norm"],
        about["gradients"],
        about["is_repeatable"],
        about["cause"],
    )
    batches = _batches(about["plain"], _under(tensors, "batches"))
    step = Step(batches, None, (_under(tensors, "random"), about["random"]), finding.losses)
    return Replay(step, _under(tensors, "weights"), finding, about)


def _under(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _batches(plain: list[dict[str, Any]], tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """The batches as the collator nests them."""
    batches = [dict(values) for values in plain]
    for name, tensor in tensors.items():
        number, *keys, last = name.split("/")
        place: dict[str, Any] = batches[int(number)]
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = tensor
    return batches


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What of a model a replay file has to hold: all else comes from where the training took it."""
    return averaged_tensors(model)


def recorded_options(options: Any) -> dict[str, Any]:
    """
    The fields of a dataclass of options, as JSON can hold them; of the many of
    [`~transformers.TrainingArguments`] those whose value is not the default of their field, and no token.

    Args:
        options: an instance.
    """
    if not isinstance(options, TrainingArguments):
        return dataclasses.asdict(options)
    given = options.to_dict()
    # By their fields: an instance with all defaults is refused on a GPU without bfloat16.
    fields = [field for field in dataclasses.fields(options) if field.init and not field.name.endswith("_token")]
    return {field.name: given[field.name] for field in fields if given[field.name] != _default_of(field)}


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


__all__ = ["FOLDER", "Replay", "read_replay", "recorded_options", "replay_path", "weights_of", "write_replay"]
