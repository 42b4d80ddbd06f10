"""Token shards: memory, speed, and what is lost across a resume.

    uv run python tests/benchmarks/bench_shards.py            # about a minute, 0.5 GB of disk
    uv run python tests/benchmarks/bench_shards.py --quick    # a tenth of the corpus

1. Write and read a corpus ten times larger than the memory allowed. The operating system enforces
   the limit (RLIMIT_DATA, so on Linux only): 32 MiB above what Python has after its imports.
2. Microseconds per batch of 8 × 256, in turn with the usual ways to do it, in the same process.
3. An epoch interrupted at random places: is any window lost or repeated?
4. Writing with GPT-2's tokenizer: tokens per second by number of workers.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np

from common.corpus import Document, read_shakespeare
from common.shards import TokenShards, write_shards
from common.tokenizer import gpt2_tokenizer

ALLOWED = 32 * 2**20  # bytes
B, T = 8, 256


class ByteTokenizer:
    """As cheap as can be, so that the shards are what is measured."""

    n_vocab = 257
    eot_token = 256

    def encode(self, text):
        return np.frombuffer(text.encode("utf8"), np.uint8)

    def decode_single_token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b"<|endoftext|>"


def plays(n_characters: float):
    """Shakespeare's plays again and again, read from the disk each time."""
    for round_ in count():
        for play in read_shakespeare():
            yield Document(f"{play.name}/{round_}", play.text)
            n_characters -= len(play.text)
            if n_characters <= 0:
                return


def private_memory() -> int:
    """Bytes of private writable memory, what RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text(encoding="utf8")
    return 1024 * int(status.split("VmData:")[1].split()[0])


def limit_memory() -> None:
    import resource

    limit = private_memory() + ALLOWED
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


# ------------------------------------------------- 1. a corpus larger than memory (own processes)


def write_limited(folder: str, n_tokens: str) -> None:
    tokenizer = ByteTokenizer()
    read_shakespeare()  # verified once, before the limit
    limit_memory()
    start = time.perf_counter()
    shards = write_shards(plays(int(n_tokens)), tokenizer, folder, shard_tokens=20_000_000)
    seconds = time.perf_counter() - start
    size = 2 * len(shards)
    print(
        f"  written: {size / 2**20:,.0f} MiB, {size / ALLOWED:.1f} times the memory allowed, in "
        f"{len(shards.arrays)} shards, {len(shards) / seconds / 1e6:.1f} M tokens/s"
    )


def read_limited(folder: str) -> None:
    import torch

    from common.dataloader import RandomBatches

    torch.set_num_threads(1)
    torch.from_numpy(np.zeros(1, np.int64))  # torch's own first time
    limit_memory()
    start = time.perf_counter()
    shards = TokenShards(folder)
    opened = time.perf_counter() - start
    batches = RandomBatches(shards, batch_size=B, context_length=T)
    next(batches)
    first = time.perf_counter() - start
    n = batches.n_windows // B
    before = private_memory()
    for _ in range(n):
        next(batches)
    print(
        f"  read: opened in {opened * 1e3:.1f} ms, the first batch after {first * 1e3:.1f} ms; an "
        f"epoch of {n:,} batches took {(private_memory() - before) / 2**20:.1f} MiB more"
    )
    try:
        np.concatenate(batches.shards.arrays)
        print("  (loading the corpus fits too: the limit does not hold on this system)")
    except MemoryError:
        print("  loading the corpus instead: MemoryError, as it should be under this limit")


# ---------------------------------------------------------------------------- 2. time per batch


def ways_to_batch(folder: Path) -> dict:
    """Name -> a function that returns the next (inputs, targets)."""
    import torch
    from torch.utils.data import DataLoader

    from common.dataloader import RandomBatches, SlidingWindowDataset, create_dataloader

    one = write_shards(plays(4e6), ByteTokenizer(), folder / "one")
    many = write_shards(plays(4e6), ByteTokenizer(), folder / "many", shard_tokens=200_000)
    path = folder / "one" / "shard_00000.bin"
    kept = np.memmap(path, np.uint16, mode="r")

    def memmap_rows(data):
        places = torch.randint(len(data) - T, (B,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in places])
        y = torch.stack(
            [torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in places]
        )
        return x, y

    def endless(loader):
        while True:
            yield from loader

    class MappedWindows(torch.utils.data.Dataset):
        def __len__(self):
            return (len(kept) - 1) // T

        def __getitem__(self, i):
            window = torch.from_numpy(kept[i * T : i * T + T + 1].astype(np.int64))
            return window[:-1], window[1:]

    ours = RandomBatches(one, batch_size=B, context_length=T)
    ours_many = RandomBatches(many, batch_size=B, context_length=T)
    windows = SlidingWindowDataset(np.asarray(kept), T, T)
    sampled = endless(DataLoader(windows, B, shuffle=True, drop_last=True))
    mapped = endless(DataLoader(MappedWindows(), B, shuffle=True, drop_last=True))
    created = endless(create_dataloader(np.asarray(kept), batch_size=B, context_length=T))
    return {
        "RandomBatches, 1 shard": lambda: next(ours),
        f"RandomBatches, {len(many.arrays)} shards": lambda: next(ours_many),
        "np.memmap reopened, row by row": lambda: memmap_rows(np.memmap(path, np.uint16, mode="r")),
        "np.memmap kept open, row by row": lambda: memmap_rows(kept),
        "DataLoader over a memmap": lambda: next(mapped),
        "DataLoader over windows in memory": lambda: next(sampled),
        "create_dataloader, in memory": lambda: next(created),
    }


def time_batches(folder: Path, rounds: int = 15, n: int = 400) -> None:
    import torch

    torch.set_num_threads(1)
    ways = ways_to_batch(folder)
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, batch in ways.items():
            start = time.perf_counter()
            for _ in range(n):
                batch()
            times[name].append((time.perf_counter() - start) / n * 1e6)
    best = min(times["RandomBatches, 1 shard"])
    print(f"\n2. one batch of {B} × {T} (best and median of {rounds} × {n}, µs)")
    for name, found in times.items():
        print(f"  {name:36}{min(found):7.1f}{median(found):8.1f}   {min(found) / best:5.1f} ×")


# ------------------------------------------------------------------------------- 3. and 4.


def interrupt(folder: Path) -> None:
    from common.dataloader import RandomBatches

    shards = TokenShards(folder / "many")
    rng = random.Random(0)
    make = lambda: RandomBatches(shards, batch_size=B, context_length=T, seed=1)
    straight, batches, n_resumes = make(), make(), 0
    n = straight.n_windows // B
    same = 0
    for _ in range(n):
        if rng.random() < 0.02:
            state = batches.state_dict()
            for _ in range(rng.randrange(5)):
                next(batches)  # done after the checkpoint, lost in the crash
            batches = make()
            batches.load_state_dict(state)
            n_resumes += 1
        same += all(
            bool((a == b).all()) for a, b in zip(next(straight), next(batches), strict=True)
        )
    print(
        f"\n3. {n:,} batches, interrupted {n_resumes} times: {same:,} as in a run without a break"
    )
    assert same == n


def time_writing(folder: Path, n_characters: float) -> None:
    print("\n4. writing with GPT-2's tokenizer (tiktoken)")
    documents = list(plays(n_characters))
    for workers in (0, 1, 2):
        start = time.perf_counter()
        target = folder / f"gpt2_{workers}"
        shards = write_shards(documents, gpt2_tokenizer(), target, workers=workers)
        seconds = time.perf_counter() - start
        print(
            f"  {workers} workers: {len(shards) / 1e6:.1f} M tokens in {seconds:.1f} s, "
            f"{len(shards) / seconds / 1e6:.2f} M tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)  # a limited process of part 1
    args = parser.parse_args()
    if args.step:
        {"write": write_limited, "read": read_limited}[args.step[0]](*args.step[1:])
        return
    scale = 0.1 if args.quick else 1.0
    folder = Path(tempfile.mkdtemp(prefix="bench_shards_"))
    try:
        if sys.platform == "linux":
            print(f"1. a corpus larger than memory: {ALLOWED / 2**20:.0f} MiB allowed", flush=True)
            n_tokens = int(10 * ALLOWED / 2 * scale * 1.01)
            for step in (
                ["write", str(folder / "large"), str(n_tokens)],
                ["read", str(folder / "large")],
            ):
                subprocess.run([sys.executable, __file__, "--step", *step], check=True)
        time_batches(folder)
        interrupt(folder)
        time_writing(folder, 4e7 * scale)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
