"""Functions in processes of their own, for the parts of benchmarks/scale.py."""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def in_processes(function: Callable[..., Any], processes: int, *arguments: Any) -> list[Any]:
    """What `function(rank, processes, *arguments)` returns in each of so many processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        futures = [pool.submit(function, rank, processes, *arguments) for rank in range(processes)]
        return [future.result() for future in futures]


def in_own_network(command: list[str]) -> list[str]:
    """A command line that runs another one where nothing but loopback is."""
    return ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]


def tell(parts: dict[str, Callable[[], Any]]) -> None:
    """Write what the part that the command line names has found, as JSON."""
    sys.stdout.write(json.dumps(parts[sys.argv[1]]()))
