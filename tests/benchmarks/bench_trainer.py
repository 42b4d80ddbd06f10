"""What our training loop costs over the bare one, and what a second process brings.

    uv run python tests/benchmarks/bench_trainer.py [--rounds 3] [--steps 100]

Both with the course's "tiny" model of 1.4M parameters, batches of 8 × 128 tokens.

The loop: `train` with everything on (accumulation over 2 batches, clipping, the history, the bar,
watching for explosions, a checkpoint every 100 steps) against forward, backward, AdamW and nothing
else, over as many batches. They take turns; each ratio is of two neighbours, the median counts.

Processes: one process with one thread, then two with one thread each, which share their gradients
by gloo. Tokens per second are those of the median step, all processes together.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time

import torch

from common import distributed
from common.allocator import keep_freed_memory
from common.checkpoint import Checkpoints
from common.gpt import GPT, PRESETS
from common.objectives import objective_loss
from common.training import TrainingSettings, parameter_groups, train

CONFIG = PRESETS["tiny"]
BATCH, TOKENS, ACCUMULATION = 8, 128, 2


class RandomIds:
    """Batches of random token ids: as much work as real ones, and nothing to read."""

    def __init__(self):
        self.number = distributed.rank()

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(self.number)
        self.number += distributed.world_size()
        ids = torch.randint(CONFIG.vocab_size, (BATCH, TOKENS + 1), generator=generator)
        return ids[:, :-1], ids[:, 1:]

    def state_dict(self) -> dict:
        return {"number": self.number}

    def load_state_dict(self, state: dict) -> None:
        self.number = state["number"]


def make() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def bare_loop(steps: int) -> float:
    """Tokens per second of what no training loop can leave out."""
    keep_freed_memory()
    model, batches = make(), RandomIds()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True)
    start = time.perf_counter()
    for _ in range(steps):
        for _ in range(ACCUMULATION):
            loss = objective_loss(model, *next(batches)) / ACCUMULATION
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps * ACCUMULATION * BATCH * TOKENS / (time.perf_counter() - start)


def our_loop(steps: int) -> float:
    """Tokens per second of `train`, from the call to its return: checkpoints included."""
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingSettings(
            steps, accumulation_steps=ACCUMULATION, warmup_steps=steps // 10, checkpoint_every=100
        )
        model, checkpoints = make(), Checkpoints(folder)
        start = time.perf_counter()
        train(model, RandomIds(), objective_loss, settings, checkpoints=checkpoints)
        return steps * ACCUMULATION * BATCH * TOKENS / (time.perf_counter() - start)


def one_of_several(rank: int, size: int, port: int, steps: int, results) -> None:
    """A process with one thread; rank 0 says how fast all of them are together."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(torch.device("cpu"))
    history = train(make(), RandomIds(), objective_loss, TrainingSettings(steps), progress=False)
    if rank == 0:
        speeds = [step.tokens_per_second for step in history.steps]
        results.put(statistics.median(speeds[len(speeds) // 5 :]))  # the first ones warm up
    distributed.stop()


def processes(size: int, steps: int) -> float:
    """Tokens per second of `size` processes with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    started = [
        context.Process(target=one_of_several, args=(rank, size, port, steps, results))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    speed = results.get()
    for process in started:
        process.join()
    return speed


def compare(names: tuple[str, str], measure: tuple, rounds: int) -> None:
    """Both in turns; prints the medians, and the median of the ratios."""
    pairs = [tuple(run() for run in measure) for _ in range(rounds)]
    ratios = sorted(second / first for first, second in pairs)
    for name, speeds in zip(names, zip(*pairs, strict=True), strict=True):
        print(f"{name:<34} {statistics.median(speeds):8,.0f} tokens/s")
    spread = f"from {ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"{'second to first':<34} {statistics.median(ratios):8.3f}, {spread}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    steps, rounds = arguments.steps, arguments.rounds

    print(f"{torch.get_num_threads()} threads, {rounds} rounds of {steps} steps")
    bare_loop(2), our_loop(10)  # warm up
    loops = (lambda: bare_loop(steps), lambda: our_loop(steps))
    compare(("bare loop", "train, everything on"), loops, rounds)
    numbers = (lambda: processes(1, steps), lambda: processes(2, steps))
    compare(("one process, one thread", "two processes, one thread each"), numbers, rounds)


if __name__ == "__main__":
    main()
