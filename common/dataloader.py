"""From token ids to batches of (inputs, targets): targets are the inputs, one token later.

    from common.dataloader import create_dataloader
    for inputs, targets in create_dataloader(text, tokenizer, batch_size=8, context_length=256): ...

For a text in memory: `SlidingWindowDataset` and `create_dataloader`. For a corpus on disk, larger
than memory or not: `write_shards` and `TokenShards` (of `common.shards`), read by `RandomBatches`,
which can be resumed and dealt to several processes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isqrt

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.shards import TokenShards, write_shards

__all__ = [
    "RandomBatches",
    "SlidingWindowDataset",
    "TokenShards",
    "create_dataloader",
    "write_shards",
]


class SlidingWindowDataset(Dataset):
    """Windows of `context_length` tokens, one every `stride` tokens: item i is (inputs, targets).

    token_ids:      (N,) integers: a list, a NumPy array or a tensor; int64 is not copied
    inputs/targets: (T,) int64 each, views of the ids; targets[t] is the token after inputs[t]

    With stride == context_length every token is a target once, but the first and up to
    context_length - 1 at the end that fill no window. Raises ValueError for a text that is shorter
    than one window and its last target.
    """

    def __init__(self, token_ids: Sequence[int] | Tensor, context_length: int, stride: int):
        if not isinstance(token_ids, Tensor):
            token_ids = np.asarray(token_ids, np.int64)
        self.token_ids = torch.as_tensor(token_ids, dtype=torch.int64)
        self.context_length, self.stride = context_length, stride
        if context_length < 1 or stride < 1:
            raise ValueError(
                f"context_length ({context_length}) and stride ({stride}) must be at least 1"
            )
        if len(self.token_ids) <= context_length:
            raise ValueError(_too_short(len(self.token_ids), context_length))

    def __len__(self) -> int:
        return (len(self.token_ids) - 1 - self.context_length) // self.stride + 1

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = i % len(self) * self.stride
        window = self.token_ids[start : start + self.context_length + 1]  # (T + 1,)
        return window[:-1], window[1:]


def _too_short(n_tokens: int, context_length: int) -> str:
    return (
        f"the text has {n_tokens:,} tokens, but a context_length of {context_length:,} needs at "
        f"least {context_length + 1:,}; use a longer text or a shorter context"
    )


def create_dataloader(
    text: str | Sequence[int] | Tensor,
    tokenizer=None,
    *,
    batch_size: int = 4,
    context_length: int = 256,
    stride: int | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    seed: int = 123,
    num_workers: int = 0,
) -> DataLoader:
    """A DataLoader of (inputs, targets), (B, T) int64 each, over a text or over token ids.

    stride:    tokens between the starts of windows; default: context_length, so none overlap
    shuffle:   in another order every epoch; all of it follows from `seed`, not from torch's own
               generator, so that nothing else in a program changes it
    drop_last: leave out the last batch if it is not full

    Raises ValueError for a text without a tokenizer, one too short, or one too short for a batch.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError("a text needs a tokenizer; pass one, or pass token ids")
        text = tokenizer.encode(text)
    dataset = SlidingWindowDataset(text, context_length, stride or context_length)
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} windows do not fill one batch of {batch_size}: use a smaller "
            "batch_size, a shorter context_length or drop_last=False"
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(seed),
    )


# ---------------------------------------------------------------------------------- from the disk


class Shuffle:
    """A random order of the integers below n, in memory O(√n) instead of O(n).

    Lay the integers on a square. Turn every row by a random amount of its own, then every column,
    three times over: each step only moves things, so it is a permutation, and one needs to know
    the turns, not the order. This is a Feistel network (Luby and Rackoff 1988; on other sizes than
    powers of two: Black and Rogaway 2002), with tables of random numbers as its round functions.
    """

    def __init__(self, n: int, seed: Sequence[int]):
        self.n, self.rows = n, isqrt(n - 1) + 1
        self.columns = -(-n // self.rows)
        # Raw bits, since NumPy guarantees these, unlike `Generator`'s, to stay the same for ever.
        bits = np.random.PCG64(seed)
        turns = lambda size, below: (bits.random_raw(size) % np.uint64(below)).astype(np.int64)
        self.turns = [
            (turns(self.rows, self.columns), turns(self.columns, self.rows)) for _ in "123"
        ]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Which integers stand at these places of the order. (M,) -> (M,) int64"""
        found = self._turn(places)
        while (outside := found >= self.n).any():  # the square may be a little larger than n:
            found[outside] = self._turn(found[outside])  # follow the cycle until it is back inside
        return found

    def _turn(self, places: np.ndarray) -> np.ndarray:
        row, column = np.divmod(places, self.columns)
        for row_turns, column_turns in self.turns:
            column = (column + row_turns[row]) % self.columns
            row = (row + column_turns[column]) % self.rows
        return row * self.columns + column


class RandomBatches(Iterator):
    """Random batches of (inputs, targets), (B, T) int64 each, from token shards, without end.

    The shards are read as one stream, cut into windows of T = context_length tokens that share no
    target. An epoch is all windows in a random order, another one every epoch; a batch may begin in
    one epoch and end in the next, so all are full and none is lost. What is left over, fewer than T
    tokens of the whole corpus, is in another place every epoch, now at the start, now at the end.

    rank, world_size: of several processes with the same seed, each gets its own part of every
                      epoch: together they see every window once

    `state_dict` is a few numbers; whoever loads it goes on exactly where it was taken, with another
    batch size or world size too. Memory is constant. Raises ValueError for a corpus shorter than a
    window, and for a state of another corpus, seed or context length.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        batch_size: int,
        context_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if not 0 <= rank < world_size or batch_size < 1 or context_length < 1:
            raise ValueError(
                f"need 0 <= rank < world_size and batch_size, context_length of 1 or more, not "
                f"{rank=}, {world_size=}, {batch_size=}, {context_length=}"
            )
        self.n_windows, self._spare = divmod(len(shards) - 1, context_length)
        if self.n_windows < 1:
            raise ValueError(_too_short(len(shards), context_length))
        self.shards, self.batch_size, self.context_length = shards, batch_size, context_length
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.windows_seen = 0  # by all ranks, in all epochs
        self._ends = list(accumulate(len(array) for array in shards.arrays))
        self._plan: list[list[tuple[int, int]]] = []  # the next batches, last one first
        self._window = np.empty((batch_size, context_length + 1), shards.arrays[0].dtype)
        self._shuffle = (-1, 0, None)  # epoch, its first token, its order

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self._plan:
            self._plan = self._plan_ahead()
        size, arrays, batch = self.context_length + 1, self.shards.arrays, self._window
        for i, (shard, start) in enumerate(self._plan.pop()):
            piece = arrays[shard][start : start + size]
            if len(piece) < size:
                piece = self._across_shards(shard, start)
            batch[i] = piece
        self.windows_seen += self.batch_size * self.world_size
        inputs, targets = batch[:, :-1].astype(np.int64), batch[:, 1:].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _across_shards(self, shard: int, start: int) -> np.ndarray:
        pieces, missing = [], self.context_length + 1
        while missing:
            pieces.append(self.shards.arrays[shard][start : start + missing])
            missing -= len(pieces[-1])
            shard, start = shard + 1, 0
        return np.concatenate(pieces)

    def _plan_ahead(self) -> list[list[tuple[int, int]]]:
        """(shard, place in it) of the windows of this rank's next batches: at most about 4,096."""
        B = self.batch_size
        n_batches = max(1, min(4096, self.n_windows) // B)
        step = np.arange(n_batches)[:, None] * (B * self.world_size)
        places = (self.windows_seen + step + self.rank * B + np.arange(B)).ravel()
        epochs, places = np.divmod(places, self.n_windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self._starts(int(epoch), places[here])
        plan = []
        for start in starts.tolist():
            shard = bisect_right(self._ends, start)
            plan.append((shard, start - (self._ends[shard - 1] if shard else 0)))
        return [plan[i : i + B] for i in reversed(range(0, len(plan), B))]

    def _starts(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Where in the stream the windows at these places of an epoch's order begin."""
        if self._shuffle[0] != epoch:
            first = int(np.random.PCG64([self.seed, epoch, 1]).random_raw()) % (self._spare + 1)
            self._shuffle = (epoch, first, Shuffle(self.n_windows, [self.seed, epoch]))
        _, first, shuffle = self._shuffle
        return first + shuffle(places) * self.context_length

    @property
    def epoch(self) -> float:
        """How many times all ranks together have been through the corpus."""
        return self.windows_seen / self.n_windows

    def state_dict(self) -> dict:
        """What a checkpoint needs to go on from here; the same on all ranks after the same step."""
        return {
            "windows_seen": self.windows_seen,
            "seed": self.seed,
            "context_length": self.context_length,
            "corpus": self.shards.fingerprint,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where the state was taken. ValueError if that was with other data or settings."""
        mine = self.state_dict()
        for name in ("corpus", "context_length", "seed"):
            if state[name] != mine[name]:
                raise ValueError(
                    f"the state was taken with {name} {state[name]}, not {mine[name]}; "
                    "resume with the same, or start from the beginning"
                )
        self.windows_seen, self._plan = state["windows_seen"], []
