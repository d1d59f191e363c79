"""`sigphi plan vlm ...`, `sigphi plan siglip ...`: whether a training fits, how long it takes, and what to change.

The options are those of `sigphi train-vlm` and `sigphi train-siglip`; no weights are read.

```bash
sigphi plan vlm --input-csv qa.csv --siglip-checkpoint outputs/siglip --memory-limit 6GB
```
"""

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import HfArg

from sigphi.train import siglip, vlm
from sigphi.train.arguments import (
    DataArguments,
    EncoderDataArguments,
    SiglipModelArguments,
    SiglipTrainingArguments,
    VlmModelArguments,
    VlmTrainingArguments,
)
from sigphi.train.data_check import check_csv
from sigphi.train.errors import UserError, run_command
from sigphi.train.machine import Machine
from sigphi.train.parser import parse_arguments
from sigphi.train.plan_cases import Case, as_options, read_siglip_case, read_vlm_case
from sigphi.train.plan_report import (
    GLIBC_KEEPS,
    Disk,
    Estimate,
    as_bytes,
    check_text,
    data_text,
    disk_text,
    fatal_errors,
    heap_keeps_freed_blocks,
    memory_text,
    time_text,
)
from sigphi.train.sharding import way_of

logger = logging.getLogger(__name__)

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

# Stage -> its options, what reads its data, and its recipes.
STAGES: dict[str, tuple[tuple[type, type, type], Callable[..., Case], tuple[Path, ...]]] = {
    "vlm": ((VlmModelArguments, DataArguments, VlmTrainingArguments), read_vlm_case, vlm.RECIPES),
    "siglip": (
        (SiglipModelArguments, EncoderDataArguments, SiglipTrainingArguments),
        read_siglip_case,
        siglip.RECIPES,
    ),
}


@dataclass
class PlanArguments:
    """What is planned for."""

    _argument_group_name = "plan"

    memory_limit: str | None = HfArg(
        help="Memory that may be used, such as 6GB or 8GiB; by default that of the accelerator, or what is free on "
        "this machine.",
        default=None,
    )
    tflops: float | None = HfArg(
        help="Speed of the device in 10^12 operations a second; measured here by default.", default=None
    )

    def __post_init__(self) -> None:
        if self.tflops is not None and self.tflops <= 0:
            raise UserError(f"--tflops must be above 0, got {self.tflops}.")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)


def parse_bytes(text: str) -> int:
    """
    Bytes of a size such as `"6GB"` or `"512 MiB"`.

    Raises:
        UserError: if it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    size = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0
    if size < 1:
        raise UserError(f"--memory-limit {text}: write a size with its unit, such as 6GB, 512MB or 8GiB.")
    return int(size)


@dataclass(frozen=True)
class Advice:
    """
    Changes of options, and the bytes that the training would need with them by the same estimate.
    """

    changes: dict[str, Any]
    need: float


def advise(case: Case, need: Callable[[Case], float], limit: float) -> list[Advice]:
    """
    What to change so that a training fits.

    Args:
        case (`Case`): which does not fit.
        need (`Callable`): the bytes that a case needs.
        limit (`float`): the bytes that there are.

    Returns:
        `list[Advice]`: the single changes that suffice, the one that leaves most memory first. When none does, one
        advice that joins changes, each as mild as the others let it be; it joins the strongest when nothing suffices.
    """
    families = case.remedies()
    single = [_mildest(case, family, need, limit) for family in families]
    enough = sorted((one for one in single if one.need <= limit), key=lambda one: one.need)
    if enough or not families:
        return enough
    joined: dict[int, dict[str, Any]] = {}  # of each family that is needed
    for index in sorted(range(len(families)), key=lambda index: single[index].need):  # the most helpful first
        joined[index] = single[index].changes
        if need(case.changed(_united(joined))) <= limit:
            break
    for index in list(joined):
        others = case.changed(_united({key: changes for key, changes in joined.items() if key != index}))
        joined[index] = {} if need(others) <= limit else _mildest(others, families[index], need, limit).changes
    return [Advice(_united(joined), need(case.changed(_united(joined))))]


def _united(changes: dict[int, dict[str, Any]]) -> dict[str, Any]:
    return {name: value for one in changes.values() for name, value in one.items()}


def _mildest(case: Case, family: list[dict[str, Any]], need: Callable[[Case], float], limit: float) -> Advice:
    """The first change of a family, each of which saves more than the one before, that suffices; else its last."""
    low, high = 0, len(family) - 1
    needs = {high: need(case.changed(family[high]))}
    if needs[high] <= limit:
        while low < high:
            middle = (low + high) // 2
            needs[middle] = need(case.changed(family[middle]))
            low, high = (low, middle) if needs[middle] <= limit else (middle + 1, high)
    return Advice(family[high], needs[high])


def verdict_text(need: float, limit: float, device_type: str, advice: list[Advice]) -> str:
    """The lines that say whether it fits, and what to change when it does not."""
    if need > limit:
        return _advice_text(advice, limit)
    if device_type == "cpu" and need * GLIBC_KEEPS > limit and heap_keeps_freed_blocks():
        return "It fits where the heap gives freed memory back; with glibc's default it may not.\n"
    return "It fits.\n"


def _advice_text(advice: list[Advice], limit: float) -> str:
    if not advice or advice[0].need > limit:
        return (
            "It does not fit with any of the options that plan knows"
            + (f", not even with {as_options(advice[0].changes)} ({as_bytes(advice[0].need)})" if advice else "")
            + ": take a smaller model, or a device with more memory.\n"
        )
    lines = [f"  {as_options(one.changes):<60} {as_bytes(one.need)}\n" for one in advice]
    return "It would fit with" + (" one of" if len(lines) > 1 else "") + ":\n" + "".join(lines)


def main(argv: list[str] | None = None) -> None:
    """
    `sigphi plan STAGE`: the report to standard output.

    Raises:
        UserError: if the training would not start, the CSV has errors, or it does not fit.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(
            "usage: sigphi plan vlm|siglip [options]\n\n"
            "vlm     plan `sigphi train-vlm` with the same options\n"
            "siglip  plan `sigphi train-siglip` with the same options\n"
        )
        sys.exit(0)
    if not words or words[0] not in STAGES:
        given = f"there is no stage {words[0]!r}" if words else "the stage is missing"
        raise UserError(f"{given}; write `sigphi plan vlm ...` or `sigphi plan siglip ...`.")
    plan(words[0], words[1:])


def plan(stage: str, words: list[str]) -> None:
    """Plan a training of `stage` with the options in `words`; errors as those of [`main`]."""
    types, read, recipes = STAGES[stage]
    model, data, training, options = parse_arguments(
        [*types, PlanArguments], words, f"sigphi plan {stage}", recipes=recipes
    )
    if way_of(training) != "DDP" or training.torch_compile:
        logger.warning("planned as without DeepSpeed, FSDP and --torch-compile, which plan knows nothing about")
    errors = 0
    if data.input_csv:  # and not a set that is no CSV
        report = check_csv(data.input_csv, data.images, data.image_split)
        errors = fatal_errors(report, data.on_faulty_answers)
        _show(check_text(report, data.input_csv, errors))
    case = read(model, data, training)
    _show(data_text(case))
    machine = Machine.present(training, options.tflops)
    limit = parse_bytes(options.memory_limit) if options.memory_limit else machine.memory
    estimate = Estimate.of(case, machine)
    disk = Disk.of(case, estimate)
    _show(memory_text(estimate, machine, limit) + time_text(case, estimate, machine) + disk_text(disk))
    advice = advise(case, lambda other: Estimate.of(other, machine).need, limit) if estimate.need > limit else []
    _show(verdict_text(estimate.need, limit, machine.device.type, advice))
    faults = []
    if errors:
        faults.append(f"{data.input_csv} has {errors} errors.")
    if estimate.need > limit:
        faults.append(f"{as_bytes(estimate.need)} of memory are needed, and there are {as_bytes(limit)}.")
    if disk.need > disk.free:
        faults.append(
            f"{as_bytes(disk.need)} of disk are needed, and {as_bytes(disk.free)} are free in {disk.folder}: choose "
            f"another --output-dir, or --save-strategy no."
        )
    if faults:
        raise UserError("\n".join(faults))


def _show(text: str) -> None:
    # At once: what follows may take a while, or end in an error.
    sys.stdout.write(text)
    sys.stdout.flush()


__all__ = ["STAGES", "Advice", "PlanArguments", "advise", "main", "parse_bytes"]

if __name__ == "__main__":
    run_command(main, "sigphi plan")
