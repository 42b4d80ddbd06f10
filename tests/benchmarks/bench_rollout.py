"""How fast a policy writes its rollouts: with the cache, and reading the prefix anew each time.

    uv run python tests/benchmarks/bench_rollout.py [--model tiny-llama small-llama] [--rounds 3]

A batch of 32 prompts of 16 to 48 tokens, 96 new tokens each, drawn at temperature 1 with their
log-probabilities, random weights (the speed doesn't depend on them). Both take turns; ratios are
taken within a round, the median counts. Both must draw the same. Exit status 1 below 3 times.
"""

import argparse
import statistics
import sys
import time

import torch

from common.gpt import GPT, PRESETS
from common.rollout import Rollout, rollout

ROWS, NEW, LEAST = 32, 96, 3.0


def play(model: GPT, prompts: list[list[int]], use_cache: bool) -> tuple[Rollout, float]:
    """A rollout that no end token stops, and its tokens per second."""
    generator, begun = torch.Generator().manual_seed(0), time.perf_counter()
    played = rollout(model, prompts, NEW, None, generator=generator, use_cache=use_cache)
    return played, int(played.mask.sum()) / (time.perf_counter() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny-llama"], choices=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    lowest = float("inf")
    for name in arguments.model:
        model = GPT(PRESETS[name]).eval()
        lengths = torch.randint(16, 49, (ROWS,)).tolist()
        prompts = [torch.randint(model.config.vocab_size, (n,)).tolist() for n in lengths]
        play(model, prompts[:2], use_cache=True)
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(arguments.rounds):
            drawn = []
            for use_cache, found in speeds.items():
                played, speed = play(model, prompts, use_cache)
                found.append(speed)
                drawn.append(played.logprobs)
            torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)
        ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
        cached, plain = (statistics.median(found) for found in speeds.values())
        print(
            f"{name}, {arguments.threads} threads: {cached:,.0f} tokens/s with the cache, "
            f"{plain:,.0f} without: {ratio:.1f} times"
        )
        lowest = min(lowest, ratio)
    return int(lowest < LEAST)


if __name__ == "__main__":
    sys.exit(main())
