"""Run the training step again that a NaN has stopped.

sigphi replay outputs/siglip/_replay/step-120.safetensors
torchrun --nproc_per_node 2 -m sigphi.train.replay outputs/siglip/_replay/step-120.safetensors
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sigphi.train import siglip, vlm
from sigphi.train.errors import UserError, run_command
from sigphi.train.nonfinite import Finding, NonFiniteError
from sigphi.train.parser import parse_arguments
from sigphi.train.replay_file import Replay, read_replay, weights_of
from sigphi.train.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class _SavedBatches(torch.utils.data.Dataset):
    """The batches of a step, each as one row; a row for each process, since these share them out."""

    def __init__(self, batches: list[dict[str, Any]], world_size: int) -> None:
        self.batches, self.world_size = batches, world_size

    def __len__(self) -> int:
        return len(self.batches) * self.world_size

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.batches[row // self.world_size]


def _only_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return rows[0]


class _AtTheStep(TrainerCallback):
    """Brings a trainer to where the step began."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights and epoch; the trainer takes the random numbers itself."""
        weights = weights_of(kwargs["model"])
        missing = weights.keys() ^ self.replay.weights.keys()
        if missing:
            raise UserError(f"the replay file is of another model: {sorted(missing)[0]} is in one of the two alone.")
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(self.replay.weights[name])
        state.epoch, state.global_step = self.replay.about["epoch"], self.replay.finding.step - 1


def replay_step(trainer: ResumableTrainer, replay: Replay) -> Finding | None:
    """
    Run a step again.

    Args:
        trainer (`ResumableTrainer`): of the run, with a model that has its frozen weights. It is of no use afterwards.
        replay (`Replay`): of [`read_replay`].

    Returns:
        `Finding`, or `None` where all numbers are numbers now.
    """
    trainer.args.max_steps = 1
    trainer.args.gradient_accumulation_steps = len(replay.step.batches)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
    trainer.args.train_sampling_strategy = "sequential"
    trainer.train_dataset = _SavedBatches(replay.step.batches, trainer.args.world_size)
    trainer.data_collator = _only_row
    trainer.first_random = replay.step.random
    trainer.add_callback(_AtTheStep(replay))
    try:
        trainer.train()
    except NonFiniteError as error:
        return error.finding
    return None


def main(argv: list[str] | None = None) -> None:
    """`sigphi replay`: prints what was found, what is found now, and whether the two agree."""
    (name,) = parse_arguments([], argv, "sigphi replay", positionals=[("file", None, "what the stopped run wrote")])
    replay = read_replay(_file_of_rank(Path(name)))
    _check_world_size(name, replay.about["world_size"])
    options = replay.about["options"]
    if options is None:
        raise UserError(f"{name} is of a trainer made in Python: give it to sigphi.train.replay.replay_step there.")
    rebuild = siglip.rebuild_trainer if options["stage"] == "siglip" else vlm.rebuild_trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = rebuild(options, **_quiet(folder), **_without_budget(options))
        found = replay_step(trainer, replay)
    if trainer.is_world_process_zero():
        sys.stdout.write(_report(replay, found))
    if found is None or not found.equals(replay.finding):
        sys.exit(1)


def _quiet(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "resume_from_checkpoint": None,
        "push_to_hub": False,
    }


def _without_budget(options: dict[str, Any]) -> dict[str, Any]:
    """The batches are made already."""
    return {"tokens_per_batch": 0} if options["stage"] == "vlm" else {}


def _file_of_rank(path: Path) -> Path:
    """Each process has a file of its own, which is named after that of the first one."""
    rank = int(os.environ.get("RANK", "0"))
    return path if rank == 0 else path.with_name(f"{path.stem}-rank-{rank}{path.suffix}")


def _check_world_size(name: str, recorded: int) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != recorded:
        raise UserError(
            f"{name} is of a run of {recorded} processes, and {world} replay it. Launch: torchrun --nproc_per_node "
            f"{recorded} -m sigphi.train.replay {name}"
        )


def _report(replay: Replay, found: Finding | None) -> str:
    """A few lines for the user."""
    lines = [f"recorded: {replay.finding.what()}"]
    rows = replay.about["rows"]
    if rows is not None:
        lines += [f"rows of the training data: {', '.join(str(row) for part in rows for row in part)}"]
    if found is None:
        return "\n".join([*lines, "replayed: all numbers are numbers"]) + "\n"
    verdict = "the same, bit for bit" if found.equals(replay.finding) else "not the same, bit for bit"
    lines += [f"replayed: {found.what()}", f"          {verdict}", f"likely cause: {found.cause}"]
    return "\n".join(lines) + "\n"


__all__ = ["main", "replay_step"]

if __name__ == "__main__":
    run_command(main, "python -m sigphi.train.replay")
