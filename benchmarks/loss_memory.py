"""Memory and seconds of the sigmoid loss, forward and backward, by chunk size; writes results/loss_memory.json.

    OMP_NUM_THREADS=1 python benchmarks/loss_memory.py

A row that the file has is measured again only with `--again`. Each row is a process of its own. Memory is the peak of
resident memory above what the process had with its embeddings made. Three ways are compared: ours (gradients made
chunk by chunk in the forward pass), the same chunks through `torch.utils.checkpoint` (logits made again in the
backward pass), and all logits at once.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
from provenance import provenance
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sigphi import global_sigmoid_loss, sigmoid_loss
from sigphi.modeling.modeling_siglip_resnet import pairwise_logits
from sigphi.train.records import write_json

RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
DIM = 512
CASES = [(way, 4096, 256) for way in ("ours", "checkpoint", "at once")]
CASES += [("ours", 32768, chunk) for chunk in (1024, 256, 64)]


def checkpointed_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Image i with text i, each chunk of logits computed twice."""

    def chunk_loss(start: int) -> torch.Tensor:
        logits = pairwise_logits(images[start : start + chunk_size], texts, scale, bias)  # (chunk, texts)
        return F.softplus(logits).sum() - logits.diagonal(start).sum()

    starts = range(0, len(images), chunk_size)
    return torch.stack([checkpoint(chunk_loss, start, use_reentrant=False) for start in starts]).sum() / len(images)


def memory(field: str) -> int:
    """Bytes of resident memory now (`VmRSS`), or at most since the process started (`VmHWM`)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(way: str, batch: int, chunk_size: int) -> dict[str, float | int | str]:
    """One case, in this process."""
    torch.manual_seed(0)
    images, texts = (F.normalize(torch.randn(batch, DIM), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (math.log(10.0), -10.0))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.perf_counter()
    if way == "ours":
        loss = global_sigmoid_loss(images, texts, scale, bias, chunk_size=chunk_size)
    elif way == "checkpoint":
        loss = checkpointed_loss(images, texts, scale, bias, chunk_size)
    else:
        loss = sigmoid_loss(images, texts, scale, bias)
    loss.backward()
    seconds = time.perf_counter() - start
    peak = (memory("VmHWM") - before) / 1e6
    return {
        "way": way,
        "batch": batch,
        "chunk_size": chunk_size,
        "peak_mb": round(peak, 1),
        "seconds": round(seconds, 2),
        "loss": loss.item(),
    }


def main() -> None:
    """Measure one case where it is given, else every case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=3, metavar=("WAY", "BATCH", "CHUNK_SIZE"))
    parser.add_argument("--again", action="store_true", help="measure every row anew")
    options = parser.parse_args()
    if options.case is not None:
        way, batch, chunk_size = options.case
        sys.stdout.write(json.dumps(measure(way, int(batch), int(chunk_size))))
        return
    has_rows = RESULTS.exists() and not options.again
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if has_rows else []
    about = provenance() | {"dim": DIM}  # before the file changes, which is one of the commit
    measured = {(row["way"], row["batch"], row["chunk_size"]) for row in rows}
    for one in CASES:
        if one not in measured:
            command = [sys.executable, __file__, "--case", *map(str, one)]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            write_json(RESULTS, about | {"rows": rows})


if __name__ == "__main__":
    main()
