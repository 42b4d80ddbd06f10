"""The loss of a large vocabulary: all logits at once, and in chunks (`common.losses`).

    uv run python tests/benchmarks/bench_cross_entropy.py [--rounds 3] [--tokens 2048] [--threads 2]

Counted is what head and loss do, forward and backward: hidden (N, C) and the head's weights (V, C)
to a loss and both gradients. Memory is the peak of the resident set of a process of its own, above
what it had after a warm-up on 8 tokens with hidden states and weights in place: so logits, their
gradients, and the gradients of hidden states and weights. Time is the median step of the same
processes; the contenders take turns, and the ratio is that of the median round. Last, how far loss
and gradients are from those of float64.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from common.losses import linear_cross_entropy


def plain(hidden, weight, targets):
    """The cross-entropy as everybody writes it."""
    return F.cross_entropy((hidden @ weight.T).float(), targets)


CONTENDERS = {"plain": plain} | {
    f"chunks of {n}": partial(linear_cross_entropy, chunk_size=n) for n in (64, 128, 256, 512)
}


def step(loss_of, hidden, weight, targets, bf16: bool) -> tuple[torch.Tensor, ...]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(hidden, weight, targets)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def make(N: int, C: int, V: int) -> tuple[torch.Tensor, ...]:
    """As in a fresh GPT: normalised hidden states, and weights of spread 0.02."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(V, C, generator=generator).mul_(0.02).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def peak() -> int:
    """The most bytes that this process ever had resident."""
    if sys.platform.startswith("linux"):  # where getrusage begins with the parent's peak
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(name: str, args: argparse.Namespace) -> None:
    """Runs in a process of its own; prints what `main` reads."""
    torch.set_num_threads(args.threads)
    hidden, weight, targets = make(args.tokens, args.width, args.vocabulary)
    run = partial(step, CONTENDERS[name], bf16=args.bf16)
    few = hidden.detach()[:8].requires_grad_()
    run(few, weight.detach()[:8].requires_grad_(), targets[:8] % 8)
    before, seconds = peak(), []
    for _ in range(args.steps):
        start = time.perf_counter()
        run(hidden, weight, targets)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak() - before}))


def differences(args: argparse.Namespace) -> None:
    """Relative distance of loss and gradients from float64, on a part of the tokens."""
    hidden, weight, targets = make(min(args.tokens, 256), args.width, args.vocabulary)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    loss = F.cross_entropy(logits, targets)
    expected = loss, *torch.autograd.grad(loss, exact)
    for name in ("plain", "chunks of 128"):
        found = step(CONTENDERS[name], hidden, weight, targets, args.bf16)
        apart = [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
        print(
            f"{name:<14} from float64: "
            + "loss {:.0e}, d_hidden {:.0e}, d_weight {:.0e}".format(*apart)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16 (autocast)")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure, args)

    rounds: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds[name].append(json.loads(output))
    print(f"{args.threads} threads, {args.rounds} rounds, {'bf16' if args.bf16 else 'fp32'}")
    for name, results in rounds.items():
        pairs = list(zip(results, rounds["plain"], strict=True))
        seconds = statistics.median(r["seconds"] for r in results)
        slower = statistics.median(r["seconds"] / p["seconds"] for r, p in pairs)
        peak = max(r["peak"] for r in results)
        share = peak / max(p["peak"] for _, p in pairs)
        print(f"{name:<14} {seconds:6.2f} s {slower:5.2f} x   {peak / 1e6:6.0f} MB {share:5.2f} x")
    return differences(args)


if __name__ == "__main__":
    main()
