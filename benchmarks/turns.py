"""Contestants in turns: each trains in a process of its own, and says at the end of its output what it measured."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class EnoughError(Exception):
    """Raised in a trainer's loop when everything is measured."""


def resident_bytes() -> int:
    """The highest resident memory of this process; `getrusage` would count the process that started it too."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def say(found: dict[str, Any]) -> None:
    """What a contestant ends with: its measurements as the last line of its output."""
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def run_contestant(name: str, script: str, *words: str) -> dict[str, Any]:
    """Run a script of this folder in a process of its own; what it [`say`]s."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(by_turn: dict[str, list[float]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair the first's value over the second's: the median over turns, the least and the most."""
    rows = []
    for ours, theirs in pairs:
        found = sorted(a / b for a, b in zip(by_turn[ours], by_turn[theirs], strict=True))
        row = {"of": ours, "to": theirs, "median": statistics.median(found), "least": found[0], "most": found[-1]}
        rows.append({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()})
    return rows
