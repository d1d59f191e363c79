"""What the loss of several processes sends: a part of benchmarks/scale.py.

The bytes are those that the loopback device has sent, headers included, in a network namespace that only these
processes are in.
"""

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scale_processes import in_processes, tell
from torch.nn import functional as F

from sigphi.train.losses import global_sigmoid_loss

DIM = 512
REPEATS = 5  # of a loss
TEXTS = 1_200


def loss_bytes(variant: str, texts: int, processes: int, dim: int = DIM, itemsize: int = 4) -> float:
    """
    Bytes that each process sends for one loss: embeddings and their gradients, and the ids of the texts.

    In the ring the texts and their gradients pass through every process and come home. Else the texts are gathered,
    and the gradients of all of them added up, by gloo and NCCL in rings: (P - 1) / P of the whole to gather, twice
    that to add up.

    Args:
        variant (`str`): `"ring"` or `"gather"`.
        texts (`int`): distinct texts of all processes.
        processes (`int`): how many share the batch.
        dim (`int`, *optional*, defaults to 512): size of an embedding.
        itemsize (`int`, *optional*, defaults to 4): bytes of one of its numbers; the loss is made in float32.
    """
    if processes == 1:
        return 0.0
    share = (processes - 1) / processes
    rows, ids = texts * dim * itemsize, 3 * 8 * texts
    return share * ids + (2 * rows if variant == "ring" else 3 * share * rows)


def gradient_bytes(parameters: int, processes: int, itemsize: int = 4) -> float:
    """Bytes that each process sends for a step of `DistributedDataParallel`, which adds gradients up in a ring."""
    return 2 * (processes - 1) / processes * parameters * itemsize


def sent_bytes() -> int:
    """What the loopback device of this network namespace has sent so far."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def join(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)


def leave(processes: int) -> None:
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _sent_of_loss(rank: int, processes: int, variant: str, texts: int, folder: str) -> float:
    """Bytes of one loss, of all processes together."""
    join(rank, processes, folder)
    own = texts // processes
    torch.manual_seed(rank)
    embeds = [F.normalize(torch.randn(own, DIM), dim=-1).requires_grad_() for _ in range(2)]
    logits = [torch.tensor(value, requires_grad=True) for value in (math.log(10.0), -10.0)]
    before = 0
    for repeat in range(1 + REPEATS):
        if repeat == 1:  # connections are made, and what they cost once is sent
            dist.barrier()
            before = sent_bytes()
            dist.barrier()
        global_sigmoid_loss(*embeds, *logits, variant=variant).backward()
    dist.barrier()
    sent = (sent_bytes() - before) / REPEATS
    leave(processes)
    return sent


def communication() -> list[dict[str, Any]]:
    """Bytes per process and loss, sent and by the formula, by variant and processes."""
    rows = []
    for variant, processes in [(variant, processes) for variant in ("ring", "gather") for processes in (2, 3, 4)]:
        with tempfile.TemporaryDirectory() as folder:
            sent = in_processes(_sent_of_loss, processes, variant, TEXTS, folder)[0] / processes
        expected = loss_bytes(variant, TEXTS, processes)
        rows.append(
            {
                "variant": variant,
                "processes": processes,
                "texts": TEXTS,
                "sent_bytes": round(sent),
                "formula_bytes": round(expected),
                "ratio": round(sent / expected, 4),
            }
        )
    return rows


if __name__ == "__main__":
    tell({"communication": communication})
