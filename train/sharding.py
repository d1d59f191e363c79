"""How the processes of a training share its weights, and which options go with each way."""

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config
from transformers.utils import strtobool

from sigphi.train.errors import UserError

OTHER_NUMBER = "`--resume` by another number of processes"
SAVE_TEXT_TOWER = "`--save-text-tower`"
# What was seen to fail, or to do something else without a word, and what to do; by the ways whose names begin so and
# by the option. docs/many_gpus.md has the same as a table.
_REFUSED: dict[tuple[str | tuple[str, ...], str], str] = {
    (("FSDP", "ZeRO"), "`--ema-decay`"): "averages whole weights: leave it out, or launch with ddp.yaml.",
    ("ZeRO", "`--micro-batch-size`"): (
        "makes several backward passes an update, which DeepSpeed counts as several batches: leave it out, or launch "
        "with ddp.yaml or fsdp2.yaml."
    ),
    ("ZeRO", "`--muon true`"): (
        "needs whole kernels, and DeepSpeed gives the optimizer pieces, so that AdamW would move them: leave it out, "
        "or launch with ddp.yaml or fsdp2.yaml."
    ),
    (("FSDP", "ZeRO"), "`train-siglip --bf16 true`"): (
        "gives BatchNorm weights in bfloat16 beside statistics in float32: train with --bf16 false, or launch with "
        "ddp.yaml."
    ),
    ("ZeRO-3", SAVE_TEXT_TOWER): (
        "would put a whole tower beside divided weights: leave it out, or launch with ddp.yaml or zero2.yaml."
    ),
    ("ZeRO", OTHER_NUMBER): "finds the optimizer's state in as many pieces as there were processes: launch as many.",
}


def way_of(arguments: TrainingArguments) -> str:
    """
    How the processes share the weights: `"DDP"` (each has all of them, also where there is one process), `"FSDP1"`,
    `"FSDP2"`, or `"ZeRO-"` with its stage; whether an option says so or `accelerate launch`.
    """
    if arguments.deepspeed_plugin is not None:
        return f"ZeRO-{arguments.deepspeed_plugin.zero_stage}"
    if arguments.fsdp_plugin_args is not None:
        return f"FSDP{arguments.fsdp_plugin_args['fsdp_version']}"
    if strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return "DDP"


def divides_weights(arguments: TrainingArguments) -> bool:
    """Whether weights are whole only within a forward pass, which all processes have to make as often."""
    return way_of(arguments) in ("FSDP2", "ZeRO-3")


def reason_against(way: str, option: str) -> str | None:
    """
    Why an option does not go with a way of sharing, as the rest of a sentence that begins with the two, or `None`.

    Args:
        way (`str`): of [`way_of`].
        option (`str`): such as ``"`--muon true`"``.
    """
    return next((why for (ways, name), why in _REFUSED.items() if name == option and way.startswith(ways)), None)


def check_options(arguments: TrainingArguments, used: Mapping[str, bool]) -> None:
    """Raise a [`UserError`] if one of the options that are `used` does not go with the way that weights are shared."""
    way = way_of(arguments)
    for option, is_used in used.items():
        reason = reason_against(way, option) if is_used else None
        if reason is not None:
            raise UserError(f"{option.strip('`')} under {way} {reason}")


def check_deepspeed(arguments: TrainingArguments) -> None:
    """
    Check `--deepspeed`, before transformers reads it.

    Raises:
        UserError: if DeepSpeed is not installed, or the file cannot be read, or has an optimizer or a schedule.
    """
    if not arguments.deepspeed:
        return
    if find_spec("deepspeed") is None:
        raise UserError("--deepspeed needs DeepSpeed: pip install --no-build-isolation 'sigphi[deepspeed]'.")
    config = arguments.deepspeed
    if isinstance(config, str):
        try:
            config = json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"--deepspeed {arguments.deepspeed}: a file of JSON is needed ({error}).") from error
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(
                f"--deepspeed {arguments.deepspeed}: its {section!r} would take the place of the training's own, "
                f"which has several learning rates. Remove it; --learning-rate, --optim, --lr-scheduler-type count."
            )


def check_way(arguments: TrainingArguments) -> None:
    """
    Refuse ways of sharing that would be something else than what they are called.

    Raises:
        UserError: for FSDP1, for FSDP on CPUs or in one process, where accelerate leaves it out, and where folders
            would hold no model, since no process has it whole.
    """
    way = way_of(arguments)
    if way == "FSDP1":
        raise UserError("FSDP1 is not supported: say fsdp_version: 2 in the configuration, as fsdp2.yaml does.")
    if way == "FSDP2":
        _check_fsdp2(arguments)
    if way == "ZeRO-3" and not arguments.deepspeed_plugin.zero3_save_16bit_model:
        raise UserError(
            f"{way} without zero3_save_16bit_model: folders would hold no model. Say zero3_save_16bit_model: true in "
            f"the configuration, as zero3.yaml does (stage3_gather_16bit_weights_on_model_save in a --deepspeed file)."
        )


def _check_fsdp2(arguments: TrainingArguments) -> None:
    kind, saves = arguments.distributed_state.distributed_type, _state_dict_type(arguments)
    if kind in (DistributedType.MULTI_CPU, DistributedType.NO):
        place = "on CPUs" if kind == DistributedType.MULTI_CPU else "in one process without a launcher"
        raise UserError(
            f"FSDP2 {place}: accelerate leaves it out there, and each process would hold all weights. Launch with "
            f"ddp.yaml, or leave --fsdp out."
        )
    if saves != "FULL_STATE_DICT":
        raise UserError(
            f"FSDP2 with {saves}: folders would hold no model. Say fsdp_state_dict_type: FULL_STATE_DICT in the "
            f"configuration, as fsdp2.yaml does."
        )


def _state_dict_type(arguments: TrainingArguments) -> str:
    """How FSDP saves: by an option, or as `accelerate launch` says, whose default is in parts."""
    if arguments.fsdp_plugin_args is not None:
        return str(arguments.fsdp_plugin_args["state_dict_type"])
    return os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")


def storage_dtype(arguments: TrainingArguments, dtype: torch.dtype) -> torch.dtype:
    """What 4-bit weights beside others of `dtype` are packed into: under FSDP2 the same, so that it divides them."""
    return dtype if way_of(arguments) == "FSDP2" else torch.uint8


def load_whole() -> None:
    """
    Let each process load models whole under ZeRO-3 too, where transformers would divide them as they are read: they
    are put together from parts, and tried, before DeepSpeed divides them.
    """
    unset_hf_deepspeed_config()


__all__ = [
    "OTHER_NUMBER",
    "SAVE_TEXT_TOWER",
    "check_deepspeed",
    "check_options",
    "check_way",
    "divides_weights",
    "load_whole",
    "reason_against",
    "storage_dtype",
    "way_of",
]
