"""What grows with the data and the processes, measured on two cores and projected; writes results/scale.json.

    OMP_NUM_THREADS=1 python benchmarks/scale.py
    OMP_NUM_THREADS=1 python benchmarks/scale.py --parts resuming

Each part is a process of its own, and says of which commit it is and how busy the machine was. `communication` counts
bytes in a network namespace of its own, which needs `unshare` and `ip`. `loss_memory` explains what
benchmarks/loss_memory.py has measured; `sizes` and `traffic` compute what is too large to measure here. `reading` and
`training` compare one process with two, for which both cores have to be free; `training` takes ten minutes.
"""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit
from scale_loss import DIM, gradient_bytes, loss_bytes
from scale_processes import in_own_network

RESULTS = Path(__file__).parent / "results" / "scale.json"
LOSS_MEMORY = RESULTS.with_name("loss_memory.json")
ENCODER = RESULTS.with_name("encoder.json")  # has the number of weights of a ResNet-50 image tower
PAIRS = (10**6, 10**8, 10**10)
BATCH = 32_768  # of all processes, as in the paper
LINKS = (10, 100, 400)  # Gbit/s
HIDDEN_SIZE = 2560  # of Phi-2
# Part -> the script that measures it.
SCRIPTS = {
    "communication": "scale_loss",
    "caches": "scale_caches",
    "resuming": "scale_reading",
    "reading": "scale_reading",
    "training": "scale_training",
}
PACKAGES = ("torch", "transformers", "datasets", "torchdata", "pyarrow")


def measure(part: str) -> Any:
    """What the script of a part finds."""
    command = [sys.executable, str(Path(__file__).with_name(f"{SCRIPTS[part]}.py")), part]
    command = in_own_network(command) if part == "communication" else command
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def about(revision: str) -> dict[str, Any]:
    """Where the figures of a part come from."""
    versions = {name: version(name) for name in PACKAGES}
    return {"commit": revision, "cores": os.cpu_count(), "versions": versions, "load": os.getloadavg()[0]}


def loss_memory() -> dict[str, Any]:
    """
    The two constants that explain the measured peaks of the loss: bytes of each logit of a chunk, and how many arrays
    as large as the embeddings of one side there are beside them.
    """
    measured = json.loads(LOSS_MEMORY.read_text(encoding="utf-8"))
    rows = [row for row in measured["rows"] if row["way"] == "ours"]
    terms = np.array([[row["batch"] * row["chunk_size"], 4 * row["batch"] * DIM] for row in rows], dtype=float)
    peaks = np.array([1e6 * row["peak_mb"] for row in rows])
    constants, *_ = np.linalg.lstsq(terms / peaks[:, None], np.ones(len(rows)), rcond=None)  # least relative errors
    explained = terms @ constants
    return {
        "rows": [
            {name: row[name] for name in ("batch", "chunk_size", "peak_mb", "seconds")} | {"explained_mb": mb / 1e6}
            for row, mb in zip(rows, explained.tolist(), strict=True)
        ],
        "bytes_per_logit": float(constants[0]),
        "arrays_of_embeddings": float(constants[1]),
        "largest_error": float(np.abs(explained / peaks - 1).max()),
    }


def sizes() -> list[dict[str, Any]]:
    """What more pairs take, by the formulas that the part `caches` and the tests check."""
    return [
        {
            "pairs": pairs,
            "steps": pairs // BATCH,
            "text_cache_float32_bytes": pairs * HIDDEN_SIZE * 4,
            "text_cache_bfloat16_bytes": pairs * HIDDEN_SIZE * 2,
            "image_store_32_bytes": pairs * 3 * 32**2,
            "image_store_224_bytes": pairs * 3 * 224**2,
        }
        for pairs in PAIRS
    ]


def traffic() -> dict[str, Any]:
    """What more processes send in a step, by the formula that the part `communication` checks."""
    towers = json.loads(ENCODER.read_text(encoding="utf-8"))["towers"]
    weights = towers["parameters"]["sigphi"]
    rows = []
    for processes in (8, 64, 512):
        sent = {variant: loss_bytes(variant, BATCH, processes) for variant in ("ring", "gather")}
        gradients = gradient_bytes(weights, processes)
        both = {str(link): 8 * (sent["ring"] + gradients) / (1e9 * link) for link in LINKS}
        rows.append(
            {
                "processes": processes,
                "ring_bytes": sent["ring"],
                "gather_bytes": sent["gather"],
                "gradient_bytes": gradients,
                "seconds_of_ring_and_gradients": both,
            }
        )
    return {"batch": BATCH, "weights": weights, "rows": rows}


def main() -> None:
    """Measure the parts that are asked for, and project from all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    options = parser.parse_args()
    parts = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    revision = commit()  # before the file of results is another one than the commit's
    for part in options.parts:
        parts[part] = about(revision) | {"found": measure(part)}
        _write(parts)
    parts |= {"sizes": {"found": sizes()}, "traffic": {"found": traffic()}, "loss_memory": {"found": loss_memory()}}
    _write(parts)


def _write(parts: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
