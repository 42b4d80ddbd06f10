"""The loop takes the steps that PyTorch would take by hand, and says what happened on the way."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.checkpoint import Checkpoints
from common.evaluation import Evaluation, evaluate_loss
from common.training import (
    TrainingDiverged,
    TrainingSettings,
    learning_rate_at,
    parameter_groups,
    train,
    without_end,
)


def loss_fn(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


def make(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 4)
    )


class Batches:
    """Random (inputs, targets) that can be resumed: number n is always the same."""

    def __init__(self, size: int = 8):
        self.size, self.number = size, 0

    def __iter__(self):
        return self

    def __next__(self):
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        inputs = torch.randn(self.size, 6, generator=generator)
        return inputs, (inputs[:, :4] * 2).argmax(-1)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def settings(n_steps: int = 12, **others) -> TrainingSettings:
    return TrainingSettings(
        **{"learning_rate": 1e-2, "warmup_steps": 3, **others, "n_steps": n_steps}
    )


def run(model, settings, batches=None, **others):
    batches = Batches() if batches is None else batches
    return train(model, batches, loss_fn, settings, progress=False, **others)


def by_hand(model, settings, batches):
    """The same, as anyone would write it."""
    model.train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=settings.betas, weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
    rows = []
    for step in range(1, settings.n_steps + 1):
        total = 0.0
        for _ in range(settings.accumulation_steps):
            loss = loss_fn(model, *next(batches)) / settings.accumulation_steps
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        rows.append((step, total, learning_rate_at(step, settings), norm.item()))
    return rows


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("clip_norm", [0.1, None])
def test_every_step_is_the_one_taken_by_hand(accumulation_steps, clip_norm):
    chosen = settings(accumulation_steps=accumulation_steps, clip_norm=clip_norm)
    ours, theirs = make(), make()
    history, expected = run(ours, chosen), by_hand(theirs, chosen, Batches())
    for step, row in zip(history.steps, expected, strict=True):
        assert step[:4] == pytest.approx(row, rel=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b)


def test_accumulated_small_batches_are_one_large_batch():
    large, small = make(), make()
    eight = [next(Batches(8))]
    fours = list(zip(*(tensor.split(4) for tensor in eight[0]), strict=True))
    run(large, settings(5), eight)
    run(small, settings(5, accumulation_steps=2), fours)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert_close(a, b)


def test_it_learns_and_leaves_the_model_as_it_was_otherwise():
    model = make().eval()
    history = run(model, settings(150))
    assert sum(history.losses[-10:]) < 0.5 * sum(history.losses[:10])
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(step.tokens_per_second > 0 for step in history.steps)


def test_decay_is_for_matrices_and_frozen_parameters_are_left_out():
    model = make()
    model[0].weight.requires_grad_(False)
    decayed, others = parameter_groups(model, 0.3)
    assert [p.shape for p in decayed["params"]] == [(4, 16)]
    assert [p.dim() for p in others["params"]] == [1] * 4
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    before = model[0].weight.clone()
    run(model, settings(3))
    assert torch.equal(model[0].weight, before)
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_bfloat16_is_for_products_and_weights_stay():
    seen = []

    def loss(model, inputs, targets):
        logits = model(inputs)
        seen.append(logits.dtype)
        return F.cross_entropy(logits.float(), targets)

    model = make()
    history = train(model, Batches(), loss, settings(4, dtype="bfloat16"), progress=False)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_close(history.losses, run(make(), settings(4)).losses, atol=0.05, rtol=0.05)


def test_looking_happens_when_due_and_changes_nothing():
    said, modes = [], []

    def evaluate(model):
        modes.append(model.training)
        torch.rand(7)
        return evaluate_loss(model, [next(Batches())], loss_fn, 2.0)

    def sample(model):
        modes.append(model.training)
        return f"drawn: {torch.rand(()).item() < 2}"

    looked_at, alone = make(dropout=0.5), make(dropout=0.5)
    chosen = settings(10, evaluate_every=4, sample_every=7)
    torch.manual_seed(3)
    history = run(looked_at, chosen, evaluate=evaluate, sample=sample, report=said.append)
    torch.manual_seed(3)
    assert run(alone, chosen).losses == history.losses
    assert list(history.evaluations) == [0, 4, 8, 10]
    assert history.samples == dict.fromkeys((0, 7, 10), "drawn: True")
    assert not any(modes)
    assert len(said) == 7
    assert said[0].startswith("step 0: validation loss ")
    assert "training loss" in said[2]


def test_without_being_told_it_looks_before_and_after():
    history = run(make(), settings(3), evaluate=lambda model: Evaluation.of(1.0))
    assert list(history.evaluations) == [0, 3]


def test_progress_is_shown_on_stderr(capsys):
    train(make(), Batches(), loss_fn, settings(3), sample=lambda model: "SAMPLE")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
    assert shown.err.count("SAMPLE") == 2
    run(make(), settings(3), sample=lambda model: "SAMPLE")
    assert capsys.readouterr().err == ""


def test_batches_that_end_are_begun_again():
    few = [next(batches) for batches in [Batches()] for _ in range(2)]
    stream = without_end(few)
    assert [next(stream) is few[n % 2] for n in range(5)] == [True] * 5
    with pytest.raises(ValueError, match="the batches have run out"):
        run(make(), settings(3), iter(few))
    with pytest.raises(ValueError, match="the batches have run out"):
        run(make(), settings(3), [])


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_loss_that_is_nan_stops_before_the_weights_are_spoiled(accumulation_steps, tmp_path):
    def poisoned(model, inputs, targets):
        return loss_fn(model, inputs, targets) * (math.nan if len(calls) == 11 else 1)

    calls, model, batches = [], make(), Batches()
    counted = lambda *args: (calls.append(1), poisoned(*args))[1]
    checkpoints = Checkpoints(tmp_path)
    chosen = settings(20, checkpoint_every=2, accumulation_steps=accumulation_steps)
    with pytest.raises(TrainingDiverged) as stop:
        train(model, batches, counted, chosen, checkpoints=checkpoints, progress=False)
    error, step = stop.value, 11 // accumulation_steps + (accumulation_steps > 1)
    assert error.step == step
    assert error.position == {"number": (step - 1) * accumulation_steps}
    assert (
        error.checkpoint
        == checkpoints.latest
        == tmp_path / f"step_{(step - 1) // 2 * 2:08}.safetensors"
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert "\n" not in str(error)


@pytest.mark.parametrize("stop", [True, False])
def test_a_loss_that_explodes_stops_and_nothing_is_saved_meanwhile(stop, tmp_path):
    calls, checkpoints = [], Checkpoints(tmp_path, keep=100)

    def exploding(model, inputs, targets):
        calls.append(1)
        return loss_fn(model, inputs, targets) + 50 * (len(calls) > 40)

    chosen = settings(80, checkpoint_every=1, stop_on_explosion=stop)
    arguments = (make(), Batches(), exploding, chosen)
    if not stop:
        assert len(train(*arguments, checkpoints=checkpoints, progress=False).steps) == 80
        return
    with pytest.raises(TrainingDiverged, match="the loss has exploded") as error:
        train(*arguments, checkpoints=checkpoints, progress=False)
    assert 40 < error.value.step <= 60
    assert error.value.checkpoint.stem == "step_00000040"


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    chosen = settings(1, learning_rate=1e38, weight_decay=10.0, warmup_steps=0, schedule="constant")
    with pytest.raises(TrainingDiverged, match="the weights are no longer finite"):
        run(make(), chosen, checkpoints=Checkpoints(tmp_path))
    assert not list(tmp_path.iterdir())


def test_nothing_can_be_resumed_from_nowhere():
    with pytest.raises(ValueError, match="nothing to resume from: pass checkpoints"):
        run(make(), settings(3), resume=True)


def test_dropout_is_on_while_training():
    with_dropout, without = make(0.5), make(0.0)
    without.load_state_dict(copy.deepcopy(with_dropout.state_dict()))
    assert run(with_dropout, settings(3)).losses != run(without, settings(3)).losses
