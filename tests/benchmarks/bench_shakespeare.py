"""What two minutes on a CPU teach: bits per character on plays that were held out.

    uv run python tests/benchmarks/bench_shakespeare.py [--seeds 2] [--dtype float32]

The command of the README, start to finish (reading, a tokenizer, shards, training, evaluation on
all of the held-out plays), with the parts of Llama and then with those of GPT-2: the same data,
steps and settings, and nearly the same number of parameters. For comparison, a character model of
nanoGPT's README reaches 1.88 nats, 2.71 bits, on a laptop's CPU in about 3 minutes, on a smaller
Shakespeare, split otherwise.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = "-m common.pretrain --text shakespeare --steps 1500 --learning-rate 6e-3"
SIZE = "--batch-size 8 --context-length 128 --evaluate-every 500"
CONFIGS = ("tiny-llama", "tiny")


def run(config: str, seed: int, dtype: str) -> tuple[float, float]:
    """Bits per character on the held-out plays, and seconds from the first to the last line."""
    options = ["--config", config, "--seed", str(seed), "--dtype", dtype]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *COMMAND.split(), *SIZE.split(), *options, "--out", folder]
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        final = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))["final"]
    return final["bits_per_character"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    bits = {config: [] for config in CONFIGS}
    for seed in range(arguments.seeds):
        for config in CONFIGS:
            loss, seconds = run(config, seed, arguments.dtype)
            bits[config].append(loss)
            print(f"seed {seed}  {config:10}  {loss:.3f} bits per character  {seconds:4.0f} s")
    llama, gpt2 = (statistics.mean(bits[config]) for config in CONFIGS)
    print(f"the parts of Llama need {llama / gpt2:.2f} times the bits of GPT-2's")


if __name__ == "__main__":
    main()
