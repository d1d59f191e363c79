"""Optimizers and schedules that cannot be made are refused before anything loads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SchedulerType

from sigphi import VlmTrainingArguments
from sigphi.train.errors import UserError
from sigphi.train.optimization import check_optimization

NEEDED: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 5000},
}


def check(folder: Path, **options: Any) -> None:
    check_optimization(VlmTrainingArguments(output_dir=str(folder), report_to="none", **options))


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_can_be_had(kind, tmp_path):
    check(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=NEEDED.get(kind))
    if kind in NEEDED:
        with pytest.raises(UserError, match=f"--lr-scheduler-type {kind} cannot be made: .*--lr-scheduler-kwargs"):
            check(tmp_path, lr_scheduler_type=kind)


@pytest.mark.parametrize(
    ("optim", "optim_args"),
    [("adamw_torch_fused", None), ("adamw_torch", "unread=1"), ("sgd", "momentum=0.9, nesterov=true")]
    + [("lion_8bit", ""), ("paged_adamw_8bit", None), ("ademamix", "alpha=4.0"), ("adafactor", None)],
)
def test_an_optimizer_that_can_be_made_passes_and_draws_no_random_number(optim, optim_args, tmp_path):
    before = torch.get_rng_state()
    check(tmp_path, optim=optim, optim_args=optim_args)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": "abc"}, "--optim-args abc: give name=value, with commas"),
        ({"optim_args": "a=1,,b=2"}, "--optim-args a=1,,b=2: give name=value"),
        ({"optim_args": "a=1=2"}, "--optim-args a=1=2: give name=value"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "--optim sgd --optim-args momentum=x cannot be made: .*'x'"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "--optim sgd .* cannot be made: Invalid momentum"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw cannot be made: .*galore_torch"),
        ({"lr_scheduler_kwargs": {"nope": 1}}, '--lr-scheduler-type cosine .*kwargs {"nope": 1} cannot .*nope'),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, '{"num_cycles": "x"} cannot be made: could not convert'),
        ({"lr_scheduler_kwargs": "nope"}, '--lr-scheduler-kwargs "nope" cannot be made'),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            "--lr-scheduler-type polynomial .* must be smaller",
        ),
    ],
)
def test_what_cannot_be_made_is_named(options, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        check(tmp_path, **options)
    assert len(str(error.value).splitlines()) == 1
