"""Functions run in several processes of one job: CPU, gloo, forked from the test so that nothing is imported again."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState


def run_processes(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns in each of `world_size` processes, that `torch.save` can write."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_run, (function, world_size, port, folder, arguments), nprocs=world_size, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(
    rank: int, function: Callable[..., Any], world_size: int, port: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # of the test's own process
    torch.save(function(*arguments), folder / f"{rank}.pt")
