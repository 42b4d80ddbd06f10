"""One training step of 30M parameters on the CPU: ours, `transformers`' GPT-2, and the limit.

    uv run python tests/benchmarks/bench_training_step.py [--rounds 3] [--steps 4]

Vocabulary 50,257, context 256, batch 8, fused AdamW, the same architecture in both. "kept" means
that glibc keeps freed memory (`common.allocator`), "as shipped" that nobody told it to. Ours takes
its loss in chunks (`common.objectives`); with "all logits" it holds them at once, as transformers
does. The limit is the bare matrix products of a step, forward and backward. Every measurement is a
process of its own, so that peak memory is its own, too; the contenders take turns, and the median
round counts. bf16 is left out on a CPU that has no instructions for it, where it takes minutes.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from common.allocator import keep_freed_memory
from common.gpt import GPT, GPTConfig
from common.objectives import next_token_loss

CONFIG = GPTConfig(50_257, context_length=256, d_model=384, n_layers=6, n_heads=6)
BATCH, TOKENS = 8, CONFIG.context_length
CONTENDERS = {  # name: (what runs, its dtype, whether freed memory is kept)
    "transformers fp32, as shipped": ("transformers", "fp32", False),
    "transformers fp32, kept": ("transformers", "fp32", True),
    "ours fp32": ("ours", "fp32", False),
    "ours fp32, kept": ("ours", "fp32", True),
    "ours fp32, all logits": ("all logits", "fp32", False),
    "ours bf16 (autocast)": ("ours", "bf16", False),
    "ours bf16, kept": ("ours", "bf16", True),
    "ours bf16, all logits, kept": ("all logits", "bf16", True),
    "limit fp32: matrix products": ("products", "fp32", True),
}
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or platform.machine() in ("arm64", "aarch64")


def our_step(autocast: bool, all_logits: bool) -> Callable[[torch.Tensor], None]:
    model = GPT(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if all_logits:
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            else:
                loss = next_token_loss(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def transformers_step() -> Callable[[torch.Tensor], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CONFIG.vocab_size,
            n_positions=CONFIG.context_length,
            n_embd=CONFIG.d_model,
            n_layer=CONFIG.n_layers,
            n_head=CONFIG.n_heads,
            attn_implementation="sdpa",
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )
    assert model.num_parameters() == sum(p.numel() for p in GPT(CONFIG).parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: torch.Tensor) -> None:
        loss = model(ids[:, :-1], labels=ids[:, :-1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def matrix_products() -> Callable[[torch.Tensor], None]:
    """What no implementation can leave out: x @ W forward, dy @ W and dy.T @ x backward."""
    linears = [m.weight.data for m in GPT(CONFIG).modules() if isinstance(m, torch.nn.Linear)]
    linears.append(torch.randn(CONFIG.vocab_size, CONFIG.d_model))
    inputs = {n: torch.randn(BATCH * TOKENS, n) for n in {w.shape[1] for w in linears}}

    def step(ids: torch.Tensor) -> None:
        for weight in linears:
            x = inputs[weight.shape[1]]
            y = x @ weight.T
            y @ weight
            y.T @ x

    return step


def peak_megabytes() -> float:
    """The most memory this process ever had resident."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def measure(name: str, steps: int) -> None:
    """Runs in a process of its own; prints what `main` reads."""
    kind, dtype, keep = CONTENDERS[name]
    if keep:
        keep_freed_memory()
    torch.manual_seed(0)
    make = {
        "ours": lambda: our_step(dtype == "bf16", all_logits=False),
        "all logits": lambda: our_step(dtype == "bf16", all_logits=True),
        "transformers": transformers_step,
        "products": matrix_products,
    }
    step, seconds = make[kind](), []
    for _ in range(2 + steps):
        ids = torch.randint(CONFIG.vocab_size, (BATCH, TOKENS + 1))
        start = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - start)
    rate = BATCH * TOKENS / statistics.median(seconds[2:])  # the first two warm up
    print(json.dumps({"rate": rate, "peak": peak_megabytes()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(arguments.measure, arguments.steps)

    contenders = [name for name, how in CONTENDERS.items() if how[1] != "bf16" or HAS_BF16]
    rounds: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name in contenders:
            command = [sys.executable, __file__, "--measure", name, "--steps", str(arguments.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds[name].append(json.loads(output.splitlines()[-1]))
    baseline = rounds["transformers fp32, as shipped"]
    print(
        f"{torch.get_num_threads()} threads, {arguments.rounds} rounds of {arguments.steps} steps"
    )
    for name, results in rounds.items():
        rate = statistics.median(r["rate"] for r in results)
        ratio = statistics.median(
            r["rate"] / b["rate"] for r, b in zip(results, baseline, strict=True)
        )
        peak = max(r["peak"] for r in results)
        print(f"{name:<30} {rate:7.0f} tokens/s  {ratio:5.2f} x  peak {peak:6.0f} MB")
    if not HAS_BF16:
        print("bf16: left out, this CPU has no instructions for it")
    return None


if __name__ == "__main__":
    main()
