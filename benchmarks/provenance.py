"""Where a result comes from: the code, the machine and the versions."""

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def commit() -> str:
    """The checked-out commit, with `-dirty` behind it where files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()


def provenance() -> dict[str, Any]:
    """What each file of results begins with: `commit`, `cores` and `environment`."""
    from sigphi.train.records import environment  # takes seconds

    return {"commit": commit(), "cores": os.cpu_count(), "environment": environment()}


def machine(*packages: str) -> dict[str, Any]:
    """Versions, those of `packages` too, and the processor."""
    from sigphi.train.records import environment  # takes seconds

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = {name: version(name) for name in packages}
    return environment() | versions | {"cores": os.cpu_count(), "processor": processor}
