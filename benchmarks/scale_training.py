"""How much faster two processes of `sigphi train-siglip` are than one: a part of benchmarks/scale.py."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cifar10 import train_seconds
from scale_processes import tell

BATCH, STEPS, TURNS = 256, 40, 3
IMAGES = "synthetic:2000"
RECIPES = Path(__file__).parents[1] / "train" / "recipes"
# Processes, and the threads of each.
WAYS = ((1, 1), (1, 2), (2, 1))


def _run(*words: str, threads: int = 1) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", *words], check=True, env=environment, stdout=sys.stderr)


def _prepare(folder: Path) -> list[str]:
    """Questions about drawn pictures, and a text tower of random weights; the options that name them."""
    csv, base = str(folder / "train.csv"), str(folder / "base")
    data = ("--input-csv", csv, "--images", IMAGES)
    _run("sigphi", "data", "build", "--images", IMAGES, "--output", csv)
    recipe = ("--config", str(RECIPES / "cifar10_base.yaml"), "--max-steps", "1")
    _run("sigphi.train.base_lm", *recipe, *data, "--output-dir", base)
    return [*data, "--text-model", base]


def _images_per_second(folder: Path, names: list[str], processes: int, threads: int) -> float:
    """Of a training by the recipe `cpu-small`, whose batch the processes share."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m")
    words = ["--recipe", "cpu-small", "--save-text-tower", "false", "--eval-fraction", "0", "--eval-strategy", "no"]
    words += ["--max-steps", str(STEPS), "--batch-size", str(BATCH // processes), "--output-dir", str(folder)]
    _run(*launcher, "sigphi.train.siglip", "--use_cpu", *names, *words, threads=threads)
    return BATCH * STEPS / train_seconds(folder)


def training() -> list[dict[str, Any]]:
    """
    Images a second of [`WAYS`] to train with the same batch, in turns.

    Returns:
        `list` of `dict`: `processes`, the `threads` of each, `images_per_second` of each turn, and by the turn `over`,
        how many times those of one process of one thread.
    """
    with tempfile.TemporaryDirectory() as place:
        names = _prepare(Path(place))
        found: dict[tuple[int, int], list[float]] = {way: [] for way in WAYS}
        for turn in range(TURNS):
            for way, speeds in found.items():
                folder = Path(place) / f"{way[0]}-{way[1]}-{turn}"
                speeds.append(_images_per_second(folder, names, *way))
    alone = found[WAYS[0]]
    return [
        {
            "processes": processes,
            "threads": threads,
            "batch": BATCH,
            "images_per_second": speeds,
            "over": [speed / one for speed, one in zip(speeds, alone, strict=True)],
        }
        for (processes, threads), speeds in found.items()
    ]


if __name__ == "__main__":
    tell({"training": training})
