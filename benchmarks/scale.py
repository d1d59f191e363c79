"""What grows with the data and the processes, measured on two cores and projected; writes results/scale.json.

    OMP_NUM_THREADS=1 python benchmarks/scale.py
    OMP_NUM_THREADS=1 python benchmarks/scale.py --parts reading resuming

Each part says of which commit it is, and how busy the machine was beside it. `communication` and `training` count
bytes in a network namespace of their own, which needs `unshare` and `ip`. `projection` computes with the other parts'
constants and measures nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from scale_loss import (
    DIM,
    communication,
    gradient_bytes,
    in_own_network,
    loss_bytes,
    trainable_parameters,
    training,
)
from scale_reading import image_store, loading, reading, resuming

from sigphi.configuration.configuration_siglip_resnet import PHI_2
from sigphi.train.feature_cache import cached_features
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "scale.json"
PAIRS = (10**6, 10**8, 10**10)
BATCH = 32_768  # of all processes, as in the paper
LINKS = (10, 100, 400)  # Gbit/s
HIDDEN_SIZE = PHI_2["hidden_size"]
CACHES = [
    ("text", (2_000, HIDDEN_SIZE), torch.float32),
    ("text", (2_000, HIDDEN_SIZE), torch.bfloat16),
    ("image", (2_000, 1, DIM), torch.float32),
    ("image", (500, 49, 2048), torch.bfloat16),
]


def measure_in_own_network(part: str) -> Any:
    """The rows of a part, by a process that is alone on its loopback device."""
    command = in_own_network([sys.executable, __file__, "--alone", part])
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


ALONE: dict[str, Callable[[], Any]] = {
    "communication": lambda: communication(
        [(variant, processes, 1_200) for variant in ("ring", "gather") for processes in (2, 3, 4)]
    ),
    "training": lambda: training(batch=128, turns=3),
}


def loss_memory() -> dict[str, Any]:
    """
    Peak memory of the loss by texts and chunk, and the two constants that the peaks are explained by: bytes of each
    logit of a chunk, and how many arrays as large as the embeddings of one side there are beside them.
    """
    script = Path(__file__).with_name("loss_memory.py")
    cases = [(4_096, 128), (4_096, 1_024), (8_192, 128), (8_192, 512), (8_192, 1_024)]
    rows = []
    for batch, chunk in cases:
        command = [sys.executable, script, "--case", "ours", str(batch), str(chunk)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    terms = np.array([[batch * chunk, 4 * batch * DIM] for batch, chunk in cases], dtype=float)
    peaks = np.array([1e6 * row["peak_mb"] for row in rows])
    (logit, arrays), *_ = np.linalg.lstsq(terms, peaks, rcond=None)
    off = float(np.abs(terms @ np.array([logit, arrays]) / peaks - 1).max())
    rates = [6 * row["batch"] ** 2 * DIM / row["seconds"] for row in rows]
    return {
        "rows": [{name: row[name] for name in ("batch", "chunk_size", "peak_mb", "seconds")} for row in rows],
        "bytes_per_logit": float(logit),
        "arrays_of_embeddings": float(arrays),
        "largest_error": off,
        "flops_per_second": max(rates),
    }


def caches() -> list[dict[str, Any]]:
    """Files of features as training writes them, against rows x numbers of a row x bytes of a number."""
    found = []
    for kind, shape, dtype in CACHES:
        with tempfile.TemporaryDirectory() as folder:
            rows = torch.zeros(shape, dtype=dtype)
            about = {"kind": kind, "shape": list(shape)}
            option = f"--{kind}-cache"
            cached_features(option, folder, about, shape, dtype, lambda rows=rows: [(range(len(rows)), rows)])
            size = next(Path(folder).iterdir()).stat().st_size
        names = {"kind": kind, "numbers_of_a_row": rows[0].numel(), "dtype": str(dtype).removeprefix("torch.")}
        formula = rows.numel() * dtype.itemsize
        found.append(names | {"rows": len(rows), "file_bytes": size, "formula_bytes": formula})
    return found


def projection(parts: dict[str, Any]) -> dict[str, Any]:
    """What the constants of the other parts come to for more pairs and more processes than are measured."""
    whole = parts["loading"]["found"]
    read = {(one["shards"], one["processes"], one["decoded"]): one for one in parts["reading"]["found"]}
    stores = {int(one["size"]): one for one in parts["image_store"]["found"]}
    seconds = {decoded: read[4, 1, decoded]["processor_seconds_per_1000_rows"] / 1000 for decoded in (True, False)}
    by_pairs = [
        {
            "pairs": pairs,
            "steps": pairs // BATCH,
            "text_cache_float32_bytes": pairs * HIDDEN_SIZE * 4,
            "text_cache_bfloat16_bytes": pairs * HIDDEN_SIZE * 2,
            "image_store_32_bytes": pairs * stores[32]["bytes"],
            "image_store_224_bytes": pairs * stores[224]["bytes"],
            "whole_set_core_hours": pairs * (whole["copy_seconds"] + whole["seconds"]) / 3600,
            "whole_set_held_bytes": pairs * whole["held_bytes"],
            "whole_set_copied_bytes": pairs * whole["copied_bytes"],
            "cores_to_read_in_a_day": pairs * seconds[True] / 86_400,
            "hours_to_skip_half": pairs / 2 * seconds[False] / 3600,
        }
        for pairs in PAIRS
    ]
    parameters, rate = trainable_parameters(), parts["loss_memory"]["found"]["flops_per_second"]
    by_processes = []
    for processes in (8, 64, 512):
        sent = {variant: loss_bytes(variant, BATCH, processes) for variant in ("ring", "gather")}
        gradients = gradient_bytes(parameters, processes)
        by_processes.append(
            {
                "processes": processes,
                "ring_bytes": sent["ring"],
                "gather_bytes": sent["gather"],
                "gradient_bytes": gradients,
                "seconds_of_ring_and_gradients": {
                    str(link): 8 * (sent["ring"] + gradients) / (1e9 * link) for link in LINKS
                },
                "loss_core_seconds": 6 * BATCH**2 * DIM / processes / rate,
            }
        )
    return {"batch": BATCH, "parameters": parameters, "by_pairs": by_pairs, "by_processes": by_processes}


def part_of(name: str, folder: Path) -> Any:
    """What one part measures."""
    if name in ALONE:
        return measure_in_own_network(name)
    measures: dict[str, Callable[[], Any]] = {
        "loss_memory": loss_memory,
        "caches": caches,
        "image_store": lambda: image_store(folder, 1_000, (32, 224)),
        "loading": lambda: loading(folder, 4_000, 16_000),
        "reading": lambda: reading(folder, 8_000, shards=(1, 2, 4), turns=2),
        "resuming": lambda: resuming(folder, 8_000, shards=4, left_after=2_750),
    }
    return measures[name]()


PARTS = ("communication", "training", "loss_memory", "caches", "image_store", "loading", "reading", "resuming")


def main() -> None:
    """Measure the parts that are asked for, and project from all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        sys.stdout.write(json.dumps(ALONE[options.alone]()))
        return
    parts = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    about = provenance()  # before the file changes, which is one of the commit
    with tempfile.TemporaryDirectory() as folder:
        for name in options.parts:
            load = os.getloadavg()[0]
            found = part_of(name, Path(folder))
            parts[name] = about | {"load_before": load, "load_behind": os.getloadavg()[0], "found": found}
            write_json(RESULTS, parts)
    if all(name in parts for name in PARTS):
        parts["projection"] = {"found": projection(parts)}
        write_json(RESULTS, parts)


if __name__ == "__main__":
    main()
