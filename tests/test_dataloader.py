"""Batches of (inputs, targets): uv run pytest tests/test_dataloader.py"""

import io
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.corpus import Document
from common.dataloader import (
    RandomBatches,
    Shuffle,
    SlidingWindowDataset,
    TokenShards,
    create_dataloader,
    write_shards,
)


class CharTokenizer:
    """Ids are code points, as far as 999; the end of text is 1000."""

    def __init__(self):
        self.vocab = dict(enumerate([*map(chr, range(1000)), "<end>"]))
        self.eot_token = 1000

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


# ---------------------------------------------------------------------------------- in memory


@given(st.integers(2, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_against_a_loop(n_tokens, context_length, stride):
    ids = list(range(100, 100 + n_tokens))
    expected = []
    for start in range(0, n_tokens, stride):
        if start + context_length + 1 <= n_tokens:
            window = ids[start : start + context_length + 1]
            expected.append((window[:-1], window[1:]))
    if not expected:
        with pytest.raises(ValueError, match=f"has {n_tokens} tokens, but a context_length of"):
            SlidingWindowDataset(ids, context_length, stride)
        return
    dataset = SlidingWindowDataset(ids, context_length, stride)
    found = [(inputs.tolist(), targets.tolist()) for inputs, targets in dataset]
    assert found == expected
    assert len(dataset) == len(expected)
    assert [t.tolist() for t in dataset[-1]] == list(expected[-1])


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda x: np.array(x, np.uint16)])
def test_any_kind_of_ids(make):
    inputs, targets = SlidingWindowDataset(make([5, 6, 7, 8]), 3, 1)[0]
    assert inputs.dtype == targets.dtype == torch.int64
    assert (inputs.tolist(), targets.tolist()) == ([5, 6, 7], [6, 7, 8])


@pytest.mark.parametrize(("context_length", "stride"), [(0, 1), (4, 0), (4, -1)])
def test_impossible_windows(context_length, stride):
    with pytest.raises(ValueError, match="must be at least 1"):
        SlidingWindowDataset(range(10), context_length, stride)


def test_dataloader_of_a_text():
    loader = create_dataloader(
        "abcdefghi", CharTokenizer(), batch_size=2, context_length=4, shuffle=False
    )
    ((inputs, targets),) = loader
    decode = lambda rows: ["".join(map(chr, row)) for row in rows.tolist()]
    assert decode(inputs) == ["abcd", "efgh"]
    assert decode(targets) == ["bcde", "fghi"]


def order(loader) -> list[int]:
    return [int(row[0]) for inputs, _ in loader for row in inputs]


def test_shuffling_depends_on_the_seed_alone():
    make = lambda seed: create_dataloader(range(101), batch_size=4, context_length=5, seed=seed)
    torch.manual_seed(1)
    first = make(7)
    epochs = [order(first), order(first)]
    torch.manual_seed(2)
    again = make(7)
    torch.rand(10)
    assert [order(again), order(again)] == epochs
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 100, 5))
    assert order(make(8)) != epochs[0]


def test_stride_and_last_batch():
    overlapping = create_dataloader(
        range(20), batch_size=3, context_length=8, stride=2, shuffle=False
    )
    assert order(overlapping) == [0, 2, 4, 6, 8, 10][:6]
    whole = create_dataloader(range(20), batch_size=4, context_length=8, stride=2, drop_last=False)
    assert [len(inputs) for inputs, _ in whole] == [4, 2]


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        create_dataloader("text")


@pytest.mark.parametrize("text", ["", "short"])
def test_text_too_short_for_the_context(text):
    with pytest.raises(ValueError, match=f"has {len(text)} tokens, .* needs at least 257; use"):
        create_dataloader(text, CharTokenizer())


def test_text_too_short_for_a_batch():
    """Otherwise the loader would be empty, and training would do nothing, without a word."""
    with pytest.raises(ValueError, match="2 windows do not fill one batch of 4"):
        create_dataloader(range(20), batch_size=4, context_length=8)
    assert len(create_dataloader(range(20), batch_size=4, context_length=8, drop_last=False)) == 1


# ------------------------------------------------------------------------------------ shuffling


@given(st.integers(1, 3000), st.integers(0, 9), st.integers(0, 9))
def test_shuffle_is_a_permutation(n, seed, epoch):
    found = Shuffle(n, [seed, epoch])(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))


def test_shuffle_does_not_depend_on_how_it_is_asked():
    shuffle = Shuffle(1000, [0, 0])
    whole = shuffle(np.arange(1000))
    assert np.array_equal(whole[337:412], shuffle(np.arange(337, 412)))
    first = [216, 199, 327, 347, 862, 728, 877, 683]
    assert whole[:8].tolist() == first  # on every machine, with every version of NumPy


def test_every_place_is_as_likely_as_any():
    """Where 0 to 6 go, over 7,000 orders: chi-squared of 7 × 7 counts, 36 degrees of freedom."""
    counts = np.zeros((7, 7))
    for epoch in range(7000):
        counts[np.arange(7), Shuffle(7, [0, epoch])(np.arange(7))] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 80  # p = 3e-5 for fair orders


def test_shuffle_tears_neighbours_apart():
    found = Shuffle(100_000, [3, 0])(np.arange(100_000))
    steps = np.abs(np.diff(found))
    assert (steps == 1).sum() < 15  # 2 are expected
    assert abs(steps.mean() - 100_000 / 3) < 500  # of a random order: n / 3
    assert abs(np.corrcoef(found, np.arange(100_000))[0, 1]) < 0.02


def test_shuffle_of_a_billion_fits_in_two_megabytes():
    tracemalloc.start()
    found = Shuffle(10**9, [0, 0])(np.arange(1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 1000
    assert peak < 2_500_000


# -------------------------------------------------------------------------------- from the disk


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Shards of the ids 1000, 0, 1, 2, …; 1000 also stands at the end of every document."""

    def make(n_tokens: int, shard_tokens: int = 10**6, n_documents: int = 1) -> TokenShards:
        folder = tmp_path_factory.mktemp("shards")
        cuts = np.linspace(0, n_tokens, n_documents + 1).astype(int)
        documents = [
            Document("", "".join(chr(i % 1000) for i in range(a, b))) for a, b in pairwise(cuts)
        ]
        return write_shards(documents, CharTokenizer(), folder, shard_tokens=shard_tokens)

    return make


def take(batches: RandomBatches, n: int) -> list[list[int]]:
    return [row.tolist() for _ in range(n) for row in next(batches)[0]]


def test_batches_are_windows_and_the_next_tokens(corpus):
    shards = corpus(900)
    whole = np.concatenate(shards.arrays)
    batches = iter(RandomBatches(shards, batch_size=3, context_length=7))
    for _ in range(100):
        inputs, targets = next(batches)
        assert inputs.shape == targets.shape == (3, 7)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        for x, y in zip(inputs, targets, strict=True):
            start = 0 if x[0] == 1000 else int(x[0]) + 1
            assert whole[start : start + 8].tolist() == [int(x[0]), *y.tolist()]
            assert torch.equal(x[1:], y[:-1])


def test_batches_belong_to_whoever_got_them(corpus):
    batches = RandomBatches(corpus(100), batch_size=2, context_length=4)
    first, _ = next(batches)
    copy = first.clone()
    next(batches)
    assert torch.equal(first, copy)


@settings(deadline=None, max_examples=30)
@given(
    n_tokens=st.integers(20, 200),
    batch_size=st.integers(1, 9),
    context_length=st.integers(1, 19),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_every_window_once_an_epoch(corpus, n_tokens, batch_size, context_length, world_size, seed):
    """Two epochs, dealt to all ranks: every target once in each, but for less than a window."""
    shards = corpus(n_tokens)
    ranks = [
        RandomBatches(
            shards,
            batch_size=batch_size,
            context_length=context_length,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    n_windows = ranks[0].n_windows
    seen = []
    while len(seen) < 2 * n_windows:
        for batches in ranks:
            seen += next(batches)[1].tolist()
    for epoch in (seen[:n_windows], seen[n_windows : 2 * n_windows]):
        targets = Counter(target for window in epoch for target in window)
        assert set(targets.values()) == {1}
        left_over = set(np.concatenate(shards.arrays)[1:].tolist()) - set(targets)
        assert len(left_over) == (n_tokens + 1) % context_length


def test_nothing_is_left_over_for_ever(corpus):
    """37 + 1 targets in windows of 10: eight are left over, but not always the same."""
    batches = RandomBatches(corpus(37), batch_size=3, context_length=10)
    targets = {int(t) for _ in range(60) for row in next(batches)[1] for t in row}
    assert len(targets) == 38


def test_epochs_differ_and_seeds_do(corpus):
    shards = corpus(1000)
    batches = RandomBatches(shards, batch_size=5, context_length=10)
    first, second = take(batches, 20), take(batches, 20)
    assert batches.epoch == 2.0
    assert first != second
    assert take(RandomBatches(shards, batch_size=5, context_length=10), 20) == first
    assert take(RandomBatches(shards, batch_size=5, context_length=10, seed=1), 20) != first


def test_where_shards_are_cut_changes_nothing(corpus):
    """Windows run across the ends of shards, even across several shards."""
    whole = corpus(400, n_documents=100)
    pieces = corpus(400, n_documents=100, shard_tokens=1)
    assert len(pieces.arrays) == 100
    settings = {"batch_size": 4, "context_length": 33}
    assert take(RandomBatches(whole, **settings), 40) == take(RandomBatches(pieces, **settings), 40)


@pytest.mark.parametrize("n_before", [0, 1, 49, 50, 51, 123])  # 50 batches are planned at once
def test_resume_goes_on_exactly(corpus, n_before):
    shards = corpus(2000)
    make = lambda: RandomBatches(shards, batch_size=8, context_length=5, seed=3)
    interrupted, straight = make(), make()
    take(straight, n_before)
    take(interrupted, n_before)
    torch.save(interrupted.state_dict(), checkpoint := io.BytesIO())
    take(interrupted, 3)  # what happens after the checkpoint is forgotten
    resumed = make()
    take(resumed, 5)  # and so is what happened before loading it
    checkpoint.seek(0)
    resumed.load_state_dict(torch.load(checkpoint, weights_only=True))
    assert take(resumed, 120) == take(straight, 120)


def test_resume_with_other_batches_and_ranks(corpus):
    """An epoch begun by 2 ranks with batches of 3 is ended by 1 with batches of 7: once each."""
    shards = corpus(559)  # 112 windows of 5
    two = [
        RandomBatches(shards, batch_size=3, context_length=5, rank=r, world_size=2) for r in (0, 1)
    ]
    seen = [window for batches in two for window in take(batches, 7)]
    assert two[0].state_dict() == two[1].state_dict()
    one = RandomBatches(shards, batch_size=7, context_length=5)
    one.load_state_dict(two[0].state_dict())
    seen += take(one, 10)
    assert len(seen) == 112
    assert len({tuple(window) for window in seen}) == 112


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "taken with seed 0, not 1"),
        ({"context_length": 6}, "taken with context_length 5, not 6"),
        ({"shards": 300}, "taken with corpus "),
    ],
)
def test_state_of_something_else(corpus, change, message):
    settings = {"shards": 200, "batch_size": 2, "context_length": 5, "seed": 0}
    make = lambda shards, **rest: RandomBatches(corpus(shards), **rest)
    state = make(**settings).state_dict()
    with pytest.raises(ValueError, match=message):
        make(**settings | change).load_state_dict(state)


def test_corpus_shorter_than_a_window(corpus):
    with pytest.raises(
        ValueError, match="has 12 tokens, but a context_length of 12 needs at least 13"
    ):
        RandomBatches(corpus(10), batch_size=1, context_length=12)
    assert RandomBatches(corpus(10), batch_size=1, context_length=11).n_windows == 1


@pytest.mark.parametrize(
    "bad", [{"rank": 2}, {"rank": -1}, {"batch_size": 0}, {"context_length": 0}]
)
def test_impossible_settings(corpus, bad):
    settings = {"batch_size": 1, "context_length": 4, "world_size": 2} | bad
    with pytest.raises(ValueError, match=f"{next(iter(bad))}={next(iter(bad.values()))}"):
        RandomBatches(corpus(10), **settings)


def test_reading_takes_constant_memory(corpus):
    """After the first plan, thousands of batches leave nothing behind."""
    batches = RandomBatches(corpus(200_000), batch_size=8, context_length=64)
    take(batches, 1)
    tracemalloc.start()
    for _ in range(600):
        next(batches)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_500_000  # the plan: 4,096 windows
    assert peak < 3_000_000
