"""What `sigphi plan` makes of a training's costs, and the lines it prints."""

import os
import platform
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants, try_to_load_from_cache

from sigphi.train.check_report import CheckReport
from sigphi.train.costs import Costs, highest
from sigphi.train.machine import Machine
from sigphi.train.plan_cases import Case, SiglipCase

# What the training commands do before they put the model on an accelerator.
_ON_HOST = ("loading", "text features", "whitening of the text projection")
# What `--on-faulty-answers skip` leaves out.
_SKIPPED = ("half-empty pair", "failure as answer")
_INDENT = " " * 10

# The most that benchmarks/plan.py has seen on a CPU, as a factor of the whole process.
GLIBC_KEEPS = 1.7


# What a training comes to --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """
    What a training needs of a machine.

    Args:
        costs (`Costs`): those of the model.
        moments (`dict[str, dict[str, float]]`): as those of `costs`, on this machine's device, with all else that lies
            there.
        on_host (`dict[str, float]`): bytes of the data in the machine's own memory, where the device is another.
    """

    costs: Costs
    moments: dict[str, dict[str, float]]
    on_host: dict[str, float]

    @classmethod
    def of(cls, case: Case, machine: Machine) -> "Estimate":
        """The estimate for a training."""
        costs = case.costs(machine.speed)
        data = {"decoded images": float(case.num_images * case.image_bytes)}
        if machine.device.type != "cpu":
            moments = {name: kinds for name, kinds in costs.moments.items() if name not in _ON_HOST}
            return cls(costs, {name: kinds | machine.taken for name, kinds in moments.items()}, data)
        moments = {name: kinds | data | machine.taken for name, kinds in costs.moments.items()}
        return cls(costs, moments, {})

    @property
    def moment(self) -> str:
        """When most is needed."""
        return highest(self.moments)[0]

    @property
    def need(self) -> float:
        """Bytes at that moment."""
        return highest(self.moments)[1]


@dataclass(frozen=True)
class Disk:
    """
    What a training writes.

    Args:
        folder (`Path`): of the output, or the next one above it that exists.
        checkpoints (`int`): how many lie there at once.
        checkpoint, final, download (`float`): bytes of one checkpoint, of the final folder, of weights that are not
            here yet.
    """

    folder: Path
    checkpoints: int
    checkpoint: float
    final: float
    download: float

    @classmethod
    def of(cls, case: Case, estimate: Estimate) -> "Disk":
        """What the training of `case` writes."""
        folder = Path(case.training.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        costs, training = estimate.costs, case.training
        final = sum(costs.weights[part] for part in case.saved_parts(costs))
        return cls(
            folder=folder,
            checkpoints=_checkpoints(training, case.steps, case.steps_an_epoch),
            checkpoint=final + (0 if training.save_only_model else costs.optimizer),
            final=final,
            download=costs.base * 2.0 if _is_elsewhere(case.base_model) else 0.0,
        )

    @property
    def need(self) -> float:
        """Bytes in the output folder."""
        return self.checkpoints * self.checkpoint + self.final

    @property
    def free(self) -> int:
        """Bytes that are free there."""
        return shutil.disk_usage(self.folder).free


def _checkpoints(training: Any, steps: int, steps_an_epoch: int) -> int:
    """How many checkpoints lie on the disk at once: the oldest goes when the newest is whole."""
    strategy = str(training.save_strategy.value)
    if strategy == "no":
        return 0
    every = steps_an_epoch
    if strategy == "steps":
        every = int(training.save_steps if training.save_steps >= 1 else np.ceil(training.save_steps * steps))
    saves = max(-(-steps // every), 1)
    return saves if training.save_total_limit is None else min(saves, training.save_total_limit + 1)


def _is_elsewhere(name: str) -> bool:
    """Whether the weights of a model have to be downloaded."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    return not Path(name).exists() and not any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


# Lines ---------------------------------------------------------------------------------------------------------------


def as_bytes(size: float) -> str:
    """A size in the decimal unit that suits it, such as `"2.28 GB"`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1e3:.0f} KB"


def as_duration(seconds: float) -> str:
    """A time in words, such as `"2 h 10 min"`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def check_text(report: CheckReport, path: str, num_fatal: int) -> str:
    """What the check of a CSV found, one line a kind."""
    warnings = sum(problem.count for problem in report.problems if not problem.is_error)
    text = f"CSV       {path}: {report.num_pairs} questions about {report.num_images} images, "
    text += f"{num_fatal} errors, {warnings} warnings\n"
    for problem in report.problems:
        text += f"{_INDENT}{'ERROR' if problem.is_error else 'warning'}  {problem.kind}: {problem.count}\n"
    return text + (
        f"{_INDENT}`sigphi data check {path}` names the places and what to do.\n" if report.problems else ""
    )


def fatal_errors(report: CheckReport, on_faulty_answers: str) -> int:
    """How many errors of a CSV remain, without those that the training is told to leave out."""
    skipped = _SKIPPED if on_faulty_answers == "skip" else ()
    return sum(problem.count for problem in report.problems if problem.is_error and problem.kind not in skipped)


def data_text(case: Case) -> str:
    """Sizes, tokens, padding and steps."""
    unit = "images" if isinstance(case, SiglipCase) else "questions"
    middle, high = np.percentile(case.lengths, [50, 95])
    accumulated = case.training.gradient_accumulation_steps
    rows = f"{len(case.batches[0])}{f' x {accumulated}' if accumulated > 1 else ''} {unit}"
    return (
        f"data      {case.num_train} {unit} to train on, {case.num_eval} held out, {case.num_images} images in all\n"
        f"tokens    {'a text' if unit == 'images' else 'a question with its answer'}: mean {case.lengths.mean():.1f}, "
        f"median {middle:.0f}, 95 % at most {high:.0f}, longest {case.lengths.max()}\n"
        f"padding   {case.padding:.0%} of the tokens\n"
        f"steps     {case.steps_an_epoch} an epoch, {case.steps} in all, of {rows}\n"
    )


def memory_text(estimate: Estimate, machine: Machine, limit: float) -> str:
    """Parameters, and the memory where it is highest, by kind; the other moments by their sums."""
    kinds = estimate.moments[estimate.moment]
    costs = estimate.costs
    share = costs.trained / costs.parameters
    text = f"model     {costs.parameters:,.0f} parameters, {costs.trained:,.0f} of them trained ({share:.2%})\n"
    text += f"memory    {as_bytes(estimate.need)} of {as_bytes(limit)} on {machine.device.type}, "
    text += f"highest at: {estimate.moment}\n"
    for kind, size in sorted(kinds.items(), key=lambda item: -item[1]):
        if size >= 1e5:
            text += f"{_INDENT}{as_bytes(size):>10}  {kind}\n"
    sums = {moment: sum(parts.values()) for moment, parts in estimate.moments.items()}
    others = [f"{moment} {as_bytes(size)}" for moment, size in sums.items() if moment != estimate.moment]
    text += _wrapped(f"at other moments: {'; '.join(others)}")
    if estimate.on_host:
        held = ", ".join(f"{kind} {as_bytes(size)}" for kind, size in estimate.on_host.items())
        text += _wrapped(f"in the machine's own memory, beside: {held}")
    elif heap_keeps_freed_blocks():
        text += _wrapped(
            f"The process may come to hold {GLIBC_KEEPS} times as much, because glibc keeps blocks that are freed. "
            "MALLOC_MMAP_THRESHOLD_=262144 in the environment of the training prevents that, and makes it slower."
        )
    return text


def heap_keeps_freed_blocks() -> bool:
    """Whether this process, and a training in its place, uses glibc's heap with its default settings."""
    return platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 119, initial_indent=_INDENT, subsequent_indent=_INDENT) + "\n"


def time_text(case: Case, estimate: Estimate, machine: Machine) -> str:
    """How long the training takes."""
    costs = estimate.costs
    share = case.mean_share * case.training.gradient_accumulation_steps
    step = costs.seconds * share
    text = f"time      {as_duration(step * case.steps)}: {case.steps} steps of {as_duration(step)}, "
    text += f"{costs.flops * share / 1e12:.3g} TFLOP each at {machine.speed.flops / 1e12:.3g} TFLOP/s"
    if case.caches_features:
        before = case.num_features * costs.feature_seconds
        text += f"; before them {as_duration(before)} for {case.num_features} cached features"
    return text + "; evaluations come on top\n"


def disk_text(disk: Disk) -> str:
    """What is written, beside what is free."""
    text = f"disk      {as_bytes(disk.need)} of {as_bytes(disk.free)} free in {disk.folder}: "
    text += f"{disk.checkpoints} checkpoints of {as_bytes(disk.checkpoint)}, final folder {as_bytes(disk.final)}\n"
    if disk.download:
        text += f"{_INDENT}{as_bytes(disk.download)} of weights to download to {constants.HF_HUB_CACHE}\n"
    return text


__all__ = [
    "GLIBC_KEEPS",
    "Disk",
    "Estimate",
    "as_bytes",
    "as_duration",
    "check_text",
    "data_text",
    "disk_text",
    "fatal_errors",
    "heap_keeps_freed_blocks",
    "memory_text",
    "time_text",
]
