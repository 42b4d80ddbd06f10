"""Batches waste little and lose no row; the best look is kept."""

import pytest
import torch
from torch import nn

from common.evaluation import Evaluation
from common.fine_tuning import (
    LengthBatches,
    by_length,
    fit,
    padding_share,
    train_only,
    trained_parameters,
)
from common.training import TrainingSettings


def test_an_epoch_is_every_row_once_with_its_target_and_length():
    rows = [torch.full((n,), n) for n in (3, 9, 1, 4, 4, 7, 2, 8, 5, 6)]
    batches = LengthBatches(rows, range(10), 3, torch.Generator().manual_seed(0))
    assert len(batches) == 4
    epochs = [list(batches) for _ in range(4)]
    for epoch in epochs:
        assert sorted(int(t) for *_, targets in epoch for t in targets) == list(range(10))
        for x, lengths, targets in epoch:
            for row, length, target in zip(x, lengths, targets, strict=True):
                assert torch.equal(row[:length], rows[target])
                assert not row[length:].any()
    groups = {frozenset(frozenset(t.tolist()) for *_, t in epoch) for epoch in epochs}
    assert len(groups) > 1, "not always the same ones meet"


def test_rows_of_similar_length_come_together():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.ones(int(n)) for n in torch.randint(1, 60, (160,), generator=generator)]
    used = sum(len(row) for row in rows)
    size = lambda batches: sum(x.numel() for x, *_ in batches)
    assert size(LengthBatches(rows, range(160), 16, generator)) < 1.3 * used
    assert size(LengthBatches(rows, range(160), 16)) < 1.1 * used
    assert nn.utils.rnn.pad_sequence(rows[:16]).numel() > 1.5 * sum(map(len, rows[:16]))


def test_a_batch_size_of_0():
    with pytest.raises(ValueError, match="batch_size is 0"):
        LengthBatches([], [], 0)


def test_places_need_no_rows():
    lengths = [3, 9, 1, 4, 4, 7]
    assert by_length(lengths, 2) == [[1, 5], [3, 4], [0, 2]]
    generator = torch.Generator().manual_seed(0)
    found = [by_length(lengths, 4, generator) for _ in range(5)]
    assert all(sorted(i for batch in batches for i in batch) == [*range(6)] for batches in found)
    assert len({str(batches) for batches in found}) > 1
    assert by_length([], 4) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        by_length(lengths, 0)


def test_the_share_of_filling():
    assert padding_share([4, 4, 2, 2], [[0, 1], [2, 3]]) == 0
    assert padding_share([4, 4, 2, 2], [[0, 2], [1, 3]]) == pytest.approx(1 - 12 / 16)


# --- Which weights learn, and which are kept


def test_the_best_look_is_kept_by_fit():
    """The loss falls, then rises: the weights that come out are those of the lowest look."""
    torch.manual_seed(0)
    model, looks = nn.Linear(1, 1), iter([0.9, 0.2, 0.5, 0.8])
    seen = []

    def look(model):
        seen.append(model.weight.item())
        return Evaluation.of(next(looks))

    batches, loss = [(torch.ones(1, 1),)], lambda model, x: model(x).sum()
    settings = TrainingSettings(3, 0.1, evaluate_every=1)
    history = fit(model, batches, loss, settings, look=look, progress=False)
    assert model.weight.item() == seen[1] != seen[3]
    assert [e.loss for e in history.evaluations.values()] == [0.9, 0.2, 0.5, 0.8]
    assert not model.training


def test_without_a_look_the_last_weights_stay():
    model = nn.Linear(1, 1)
    before = model.weight.item()
    loss = lambda model, x: model(x).sum()
    fit(model, [(torch.ones(1, 1),)], loss, TrainingSettings(2, 0.1), progress=False)
    assert model.weight.item() < before


def test_patterns_choose_what_learns():
    model = nn.Module()
    model.gpt, model.head = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 1)
    assert set(trained_parameters(train_only(model, ["1.*"]))) == {
        "gpt.1.weight", "gpt.1.bias", "head.weight", "head.bias",
    }  # fmt: skip
    assert set(trained_parameters(train_only(model))) == {"head.weight", "head.bias"}
    with pytest.raises(ValueError, match=r"no parameter is called 'block\.\*'"):
        train_only(model, ["block.*"])
