"""The options of the optimizer and of the schedule of its learning rate, tried before anything loads."""

import json

import torch
from torch.nn.utils import skip_init
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler

from sigphi.train.errors import UserError, printable

# Of the schedule that is tried, in steps.
_WARMUP, _TOTAL = 1, 1000


def check_optimization(arguments: TrainingArguments) -> None:
    """
    Check what the Trainer would refuse when model and data are loaded, by an optimizer of one small layer.

    Args:
        arguments (`TrainingArguments`): of the training.

    Raises:
        UserError: if `--optim` with `--optim-args`, or `--lr-scheduler-type` with `--lr-scheduler-kwargs`, is nothing
            that can be made.
    """
    _check_form(arguments.optim_args)
    _check_optimizer(arguments)
    _check_schedule(arguments)


def _check_form(optim_args: str | None) -> None:
    if not optim_args:
        return
    for pair in optim_args.split(","):
        name, *values = pair.split("=")
        if not name.strip() or len(values) != 1:
            raise UserError(f"--optim-args {printable(optim_args)}: give name=value, with commas between several.")


def _check_optimizer(arguments: TrainingArguments) -> None:
    layer = skip_init(torch.nn.Linear, 2, 2)  # draws no random numbers
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
        optimizer_class([{"params": [layer.weight]}], **options)
    except (ImportError, TypeError, ValueError) as error:
        given = f" --optim-args {printable(arguments.optim_args)}" if arguments.optim_args else ""
        raise UserError(
            f"--optim {arguments.optim.value}{given} cannot be made: {printable(str(error))[:300].rstrip('.')}. Give "
            f"other --optim-args, or another optimizer."
        ) from error


def _check_schedule(arguments: TrainingArguments) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    kind, options = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        schedule = get_scheduler(kind, optimizer, _WARMUP, _TOTAL, options)
        if isinstance(schedule, LambdaLR):
            for step in (0, _WARMUP + 1, _TOTAL):  # a value of a wrong type is met behind the warm-up
                schedule.lr_lambdas[0](step)
    except (ArithmeticError, TypeError, ValueError) as error:
        given = f" --lr-scheduler-kwargs {printable(json.dumps(options))}" if options else ""
        raise UserError(
            f"--lr-scheduler-type {kind.value}{given} cannot be made: {printable(str(error))[:300].rstrip('.')}. Give "
            f"other --lr-scheduler-kwargs, or another schedule."
        ) from error


__all__ = ["check_optimization"]
