"""Functions run in processes of their own, which may be killed: for the tests of long runs.

Forked where that can be done: a new Python would import PyTorch for seconds before each kill.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable

import torch

CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def start(function: Callable, *arguments) -> multiprocessing.Process:
    """A process that runs `function`; what it prints on stderr goes where `stderr_to` says."""
    process = CONTEXT.Process(target=_alone, args=(function, *arguments), daemon=True)
    process.start()
    return process


def _alone(function: Callable, *arguments) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def ranks(
    n: int, function: Callable, *arguments, missing: int = 0
) -> list[multiprocessing.Process]:
    """n processes with the variables that torchrun sets, but for the last `missing` ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(_as_rank, rank, n, port, function, *arguments) for rank in range(n - missing)]


def _as_rank(rank: int, n: int, port: int, function: Callable, *arguments) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*arguments)


def join(processes: list[multiprocessing.Process], seconds: float = 60) -> list[int | None]:
    """Their exit statuses: 0 is fine, -9 killed; None for one that had to be stopped."""
    statuses = []
    for process in processes:
        process.join(seconds)
        statuses.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return statuses
