"""Functions run in several processes of one job: CPU, gloo, started from a server that has the imports ready."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# A copy of the test's own process would be quicker to make, but has the half of its threads' locks and pools: training
# in one has corrupted its heap.
multiprocessing.set_forkserver_preload(["sigphi.train.siglip", "sigphi.train.vlm"])


def run_processes(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `world_size` processes; `torch.save` can write it and them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # By a file: tensors that are handed over are shared between the processes, which would train the same weights.
    torch.save((function, arguments), folder / "call.pt")
    mp.start_processes(_run, (world_size, port, folder), nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate divides the cores among the processes
    torch.set_num_threads(1)
    function, arguments = torch.load(folder / "call.pt", weights_only=False)
    torch.save(function(*arguments), folder / f"{rank}.pt")
