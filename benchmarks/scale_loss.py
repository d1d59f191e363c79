"""What the loss of several processes sends, and what a step of theirs takes: parts of benchmarks/scale.py.

The bytes are those that the loopback device has sent, headers included, in a network namespace that only these
processes are in.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sigphi import SiglipResNetConfig, SiglipResNetModel, global_sigmoid_loss

DIM = 512
REPEATS = 5  # of a loss
STEPS, WARM_UP = 6, 2  # of a training
# The image tower of the recipe cpu-small, and texts as wide as those of its small text tower.
TOWER = {
    "vision_config": {
        "layer_type": "basic",
        "embedding_size": 64,
        "hidden_sizes": [64, 256, 256],
        "depths": [1, 1, 1],
        "downsample_in_first_stage": True,
        "stem": "cifar",
        "image_size": 32,
    },
    "text_config": {"model_type": "phi", "hidden_size": 256, "num_attention_heads": 4},
    "include_text_tower": False,
}


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


def in_processes(function: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
    """What `function(rank, processes, *arguments)` returns in each of so many processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        futures = [pool.submit(function, rank, processes, *arguments) for rank in range(processes)]
        return [future.result() for future in futures]


def sent_bytes() -> int:
    """What the loopback device of this network namespace has sent so far."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def in_own_network(command: list[str]) -> list[str]:
    """A command line that runs another one where nothing but loopback is."""
    return ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def _join(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)


def _leave(processes: int) -> None:
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def _sent_of_loss(rank: int, processes: int, variant: str, texts: int, folder: str) -> float:
    """Bytes of one loss, of all processes together."""
    _join(rank, processes, folder)
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
    _leave(processes)
    return sent


def communication(cases: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Bytes per process and loss, sent and by the formula, for cases of variant, processes and texts."""
    rows = []
    for variant, processes, texts in cases:
        with tempfile.TemporaryDirectory() as folder:
            sent = in_processes(_sent_of_loss, processes, variant, texts, folder)[0] / processes
        expected = loss_bytes(variant, texts, processes)
        rows.append(
            {
                "variant": variant,
                "processes": processes,
                "texts": texts,
                "sent_bytes": round(sent),
                "formula_bytes": round(expected),
                "ratio": round(sent / expected, 4),
            }
        )
    return rows


def _train(rank: int, processes: int, batch: int, folder: str) -> dict[str, float]:
    """Steps of a training on made-up images, with the batch shared out: seconds, of the processor too, and bytes."""
    _join(rank, processes, folder)
    torch.manual_seed(0)
    model: Any = SiglipResNetModel(SiglipResNetConfig(**TOWER))
    wrapped: nn.Module = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    own = batch // processes
    pixels = torch.randn(own, 3, 32, 32).to(memory_format=torch.channels_last)
    features = torch.randn(own, TOWER["text_config"]["hidden_size"])  # type: ignore[index]
    walls, processor, before = [], 0.0, 0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            if processes > 1:
                dist.barrier()
            processor, before = time.process_time(), sent_bytes()
        start = time.perf_counter()
        outputs = wrapped(pixel_values=pixels, text_features=features, return_logits=False)
        embeds = (outputs.image_embeds, outputs.text_embeds)
        global_sigmoid_loss(*embeds, model.logit_scale, model.logit_bias).backward()
        optimizer.step()
        optimizer.zero_grad()
        walls.append(time.perf_counter() - start)
    processor = (time.process_time() - processor) / STEPS
    if processes > 1:
        dist.barrier()
    sent = (sent_bytes() - before) / STEPS
    _leave(processes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": min(walls[WARM_UP:]), "processor": processor, "sent": sent, "parameters": parameters}


def training(batch: int, turns: int) -> list[dict[str, Any]]:
    """
    A step with one process and with two of one thread each, at the same batch, in turns.

    Returns:
        `list` of two `dict`: `seconds` (of the quickest step of all turns), `processor_seconds` (of all processes
        together, the least of the turns), and the bytes that each process sent and should have sent.
    """
    found: dict[int, list[list[dict[str, float]]]] = {1: [], 2: []}
    for _ in range(turns):
        for processes, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(in_processes(_train, processes, batch, folder))
    rows = []
    for processes, runs in found.items():
        parameters = int(runs[0][0]["parameters"])
        expected = loss_bytes("ring", batch, processes) + gradient_bytes(parameters, processes)
        rows.append(
            {
                "processes": processes,
                "batch": batch,
                "parameters": parameters,
                "seconds": min(max(one["seconds"] for one in run) for run in runs),
                "processor_seconds": min(sum(one["processor"] for one in run) for run in runs),
                "sent_bytes": round(min(run[0]["sent"] for run in runs) / processes),
                "formula_bytes": round(expected),
            }
        )
    return rows


def trainable_parameters() -> int:
    """Those of the default encoder, a ResNet-50 whose text tower is Phi-2 and frozen."""
    with torch.device("meta"):
        model = SiglipResNetModel(SiglipResNetConfig(include_text_tower=False))
    return sum(parameter.numel() for parameter in model.parameters())
