"""What each step from GPT-2 to SmolLM2 does to a tiny model's loss, over several seeds.

    uv run python tests/benchmarks/bench_since_gpt2.py

Seven models of about 0.2 million parameters, each the one before with one thing changed, read the
same batches of Shakespeare, and are asked about pages that they have not read. It prints the table
that `ch04_gpt_model/bonus_since_gpt2.ipynb` shows; the notebook repeats two of these runs live.
About 15 minutes on one CPU core; `--steps 20 --seeds 1` for a quick look.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional as F
from tqdm import tqdm

from common.assets import fetch
from common.gpt import GPT, GPTConfig
from common.tokenizer import BPETokenizer

T, BATCH, LEARNING_RATE, WARM_UP = 64, 16, 3e-3, 30

WALK = {
    "GPT-2's choices": {},
    "RMSNorm": {"norm": "rms"},
    "no biases": {"bias": False},
    "rotary": {"position": "rotary"},
    "SwiGLU": {"mlp": "swiglu", "d_ff": 168},
    "grouped queries": {"n_kv_heads": 1},
    "deeper, thinner": {"n_layers": 8, "d_model": 48, "n_heads": 3, "d_ff": 128},
}


def configs() -> dict[str, GPTConfig]:
    """Each step of `WALK` applied to the result of the one before."""
    config, steps = GPTConfig(512, 4 * T, d_model=64, n_layers=4, n_heads=4), {}
    for name, change in WALK.items():
        steps[name] = config = replace(config, **change)
    return steps


def read_shakespeare() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to learn from and to be asked about: 1.8 MB of plays, the 0.2 MB that follow."""
    plays = sorted(fetch("shakespeare").glob("*/*.md"))
    text = "\n".join(play.read_text(encoding="utf8") for play in plays)[:2_000_000]
    tokenizer = BPETokenizer.train(text[:1_000_000], 512)
    ids = torch.tensor(tokenizer.encode(text))
    return ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]


def batch(ids: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` windows of T + 1 tokens, drawn at random: (size, T + 1)."""
    starts = torch.randint(len(ids) - T, (size,), generator=generator)
    return torch.stack([ids[start : start + T + 1] for start in starts])


def loss_of(model: GPT, windows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(config: GPTConfig, ids: torch.Tensor, seed: int, steps: int) -> Iterator[GPT]:
    """Yields the model after each batch; the seed decides its first weights and its batches."""
    torch.manual_seed(seed)
    model, generator = GPT(config), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, step / WARM_UP)
        loss = loss_of(model, batch(ids, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 600], help="when to ask")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    learn, ask = read_shakespeare()
    questions = batch(ask, 256, torch.Generator().manual_seed(0))
    losses = {step: {name: [] for name in WALK} for step in args.steps}
    for seed in tqdm(range(args.seeds)):
        for name, config in configs().items():
            for step, model in enumerate(train(config, learn, seed, max(args.steps)), 1):
                if step in losses:
                    with torch.no_grad():
                        losses[step][name].append(round(loss_of(model, questions).item(), 3))
    for step, table in losses.items():
        print(f"after {step} batches of {BATCH} x {T} tokens")
        for name, values in table.items():
            print(f'    "{name}": {values},')


if __name__ == "__main__":
    main()
