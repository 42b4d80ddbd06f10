"""Losses by small numbers and by their formulas; in chunks the same, gradients included."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_gpt import LLAMA
from torch.nn import functional as F
from torch.testing import assert_close

from common.gpt import PRESETS, GPTConfig
from common.losses import (
    IGNORED,
    cross_entropy,
    linear_cross_entropy,
    loss_bytes,
    token_logprobs,
    unlikelihood,
    weighted_sum,
    z_loss,
)

LOSSES = {
    "cross-entropy": cross_entropy,
    "smoothed": partial(cross_entropy, label_smoothing=0.2),
    "z": z_loss,
    "unlikelihood": unlikelihood,
    "sum": weighted_sum({cross_entropy: 1.0, z_loss: 0.3, unlikelihood: 0.5}),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def example(B: int = 2, T: int = 5, V: int = 7, dtype: torch.dtype = torch.float32):
    """Logits, and targets in which tokens repeat and one row begins with two that don't count."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(3, (B, T), generator=generator)
    targets[0, :2] = IGNORED
    return logits, targets


# --- Small numbers


def logits_of(*rows: list[float]) -> torch.Tensor:
    """Logits (1, T, V) that have these probabilities."""
    return torch.tensor([rows]).log()


def test_cross_entropy_by_hand():
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6])
    found = cross_entropy(logits, torch.tensor([[1, 1, IGNORED]]))
    assert_close(found, torch.tensor((math.log(4) + math.log(1 / 0.8)) / 2))


def test_label_smoothing_by_hand():
    logits = logits_of([0.5, 0.25, 0.25])
    # 0.7 of the truth and a tenth for each of the three: 0.8 for the target, 0.1 for the others.
    by_hand = 0.8 * math.log(2) + 2 * 0.1 * math.log(4)
    found = cross_entropy(logits, torch.tensor([[0]]), label_smoothing=0.3)
    assert_close(found, torch.tensor(by_hand))
    sure = cross_entropy(logits_of([0.998, 0.001, 0.001]), torch.tensor([[0]]), label_smoothing=0.3)
    assert sure > found, "certainty must cost more than the smoothed truth"


def test_z_loss_by_hand():
    logits = logits_of([0.5, 0.25, 0.25], [2.0, 1.0, 1.0], [50.0, 1.0, 1.0])
    targets = torch.tensor([[0, 0, IGNORED]])
    assert_close(z_loss(logits, targets), torch.tensor((0 + math.log(4) ** 2) / 2))
    shifted = logits + 3.0  # cross-entropy can't see it, the z-loss does
    assert_close(cross_entropy(shifted, targets), cross_entropy(logits, targets))
    assert_close(z_loss(shifted, targets), torch.tensor((3**2 + (math.log(4) + 3) ** 2) / 2))


def test_unlikelihood_by_hand():
    third = [1 / 3, 1 / 3, 1 / 3]
    # a b a a: at b, "a" is unwanted; at the second a, "b"; at the last a, "b" once, and not "a".
    logits = logits_of(third, [0.75, 0.125, 0.125], [0.25, 0.5, 0.25], [0.6, 0.1, 0.3])
    by_hand = (0 - math.log(0.25) - math.log(0.5) - math.log(0.9)) / 4
    assert_close(unlikelihood(logits, torch.tensor([[0, 1, 0, 0]])), torch.tensor(by_hand))
    # What was not predicted is nobody's candidate, and costs nothing itself.
    found = unlikelihood(logits, torch.tensor([[IGNORED, 1, 0, 0]]))
    assert_close(found, torch.tensor((0 - math.log(0.5) - math.log(0.9)) / 3))
    assert unlikelihood(logits[:, :1], torch.tensor([[0]])) == 0


def test_a_certain_repetition_costs_much_and_stays_finite():
    logits = torch.tensor([[[0.0, 0.0], [1e4, 0.0]]], requires_grad=True)
    loss = unlikelihood(logits, torch.tensor([[0, 1]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 5 < loss < 6
    assert gradient.isfinite().all()


# --- Formulas, gradients, and what doesn't count


def plain_unlikelihood(logits, targets):
    """The definition, place by place."""
    terms = []
    for row, wanted in zip(logits.softmax(-1), targets.tolist(), strict=True):
        for t, target in enumerate(wanted):
            before = {x for x in wanted[:t] if x != IGNORED} - {target}
            if target != IGNORED:
                terms.append(sum((-torch.log(1 - row[t, c]) for c in before), row.new_zeros(())))
    return torch.stack(terms).mean()


def test_unlikelihood_is_its_definition():
    logits, targets = example(B=3, T=12, V=9)
    mine, theirs = unlikelihood(logits, targets), plain_unlikelihood(logits, targets)
    assert_close(mine, theirs)
    assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (mine, theirs)))


@each_loss
def test_gradients(loss):
    logits, targets = example()
    (found,) = torch.autograd.grad(loss(logits, targets), logits)
    nudge, step = torch.randn_like(logits), 1e-3
    with torch.no_grad():
        up, down = (loss(logits + sign * step * nudge, targets) for sign in (1, -1))
    assert_close((up - down) / (2 * step), (found * nudge).sum(), atol=2e-3, rtol=1e-3)


@each_loss
def test_what_is_ignored_changes_nothing(loss):
    logits, targets = example()
    changed = logits.detach().clone()
    changed[targets == IGNORED] += torch.randn(7)
    assert_close(loss(changed, targets), loss(logits, targets).detach())
    (gradient,) = torch.autograd.grad(loss(logits, targets), logits)
    assert gradient[targets == IGNORED].abs().max() == 0
    assert gradient[targets != IGNORED].abs().max() > 0


@each_loss
def test_half_precision_is_computed_in_full(loss):
    logits, targets = example()
    rounded = logits.detach().bfloat16()
    assert_close(loss(rounded, targets), loss(rounded.float(), targets))


def test_a_weighted_sum_is_one():
    logits, targets = example()
    total = weighted_sum({cross_entropy: 1.0, z_loss: 1e-2})(logits, targets)
    assert_close(total, cross_entropy(logits, targets) + 1e-2 * z_loss(logits, targets))


# --- In chunks


def inputs(n: int = 20, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, 6, generator=generator, dtype=dtype) for k in (n, 11))
    targets = torch.randint(11, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def loss_and_gradients(loss_of, hidden, weight, targets):
    loss = loss_of(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


def ordinary(hidden, weight, targets, **options):
    return F.cross_entropy(hidden @ weight.T, targets, **options)


@pytest.mark.parametrize("chunk_size", [1, 7, 20, 100])
@pytest.mark.parametrize("ignored", [[], [0, 5, 19], list(range(8))])
def test_chunks_change_nothing(chunk_size, ignored):
    hidden, weight, targets = inputs()
    targets[ignored] = IGNORED
    found = loss_and_gradients(
        lambda *args: linear_cross_entropy(*args, chunk_size), hidden, weight, targets
    )
    for a, b in zip(found, loss_and_gradients(ordinary, hidden, weight, targets), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize(("smoothing", "z_weight"), [(0.2, 0.0), (0.0, 0.1), (0.2, 0.1)])
def test_smoothing_and_z_loss_in_chunks(smoothing, z_weight):
    hidden, weight, targets = inputs(dtype=torch.float64)
    targets[3:6] = IGNORED
    options = {"label_smoothing": smoothing, "z_weight": z_weight}
    chunked = partial(linear_cross_entropy, chunk_size=7, **options)

    def plain(hidden, weight, targets):
        logits = hidden @ weight.T
        z = (logits.logsumexp(-1)[targets != IGNORED] ** 2).mean()
        return ordinary(hidden, weight, targets, label_smoothing=smoothing) + z_weight * z

    found, expected = (loss_and_gradients(f, hidden, weight, targets) for f in (chunked, plain))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)


def test_large_vocabulary_agrees_to_the_sixth_digit():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).requires_grad_()
    weight = (0.2 * torch.randn(50_257, 32, generator=generator)).requires_grad_()
    targets = torch.randint(50_257, (64,), generator=generator)
    found, expected = (
        loss_and_gradients(loss, hidden, weight, targets)
        for loss in (linear_cross_entropy, ordinary)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_hopeless_predictions_cost_what_they_should():
    hidden, weight, targets = inputs()
    assert_close(
        linear_cross_entropy(1e3 * hidden, weight, targets), ordinary(1e3 * hidden, weight, targets)
    )


def test_bf16_weights_and_autocast_stay_close():
    hidden, weight, targets = inputs()
    exact = loss_and_gradients(ordinary, hidden, weight, targets)
    half = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    for a, b in zip(loss_and_gradients(linear_cross_entropy, *half, targets), exact, strict=True):
        assert_close(a.float(), b, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, b, atol=0.05, rtol=0.05)


def test_without_gradients_none_are_computed(monkeypatch):
    hidden, weight, targets = inputs()
    monkeypatch.setattr("common.losses.add_product", None)  # the gradient by the weights
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert_close(loss, ordinary(hidden, weight, targets).detach())
    # A frozen head has none either, and what is below it learns as before.
    frozen = weight.detach()
    losses = linear_cross_entropy(hidden, frozen, targets), ordinary(hidden, frozen, targets)
    assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in losses))


def test_a_second_backward_pass_is_refused_in_one_line():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


# --- Memory

MEASURE = """
import re, sys, torch
from torch.nn import functional as F
from common.losses import linear_cross_entropy
torch.set_num_threads(1)
N, C, V = 768, 128, 50_000
hidden = torch.randn(N, C)
weight = torch.randn(V, C)
targets = torch.randint(V, (N,))
def run(n, v, kind):
    x, W = hidden[:n].requires_grad_(), weight[:v].requires_grad_()
    y = targets[:n]
    loss = linear_cross_entropy(x, W, y % v, kind) if kind else F.cross_entropy(x @ W.T, y % v)
    loss.backward()
def peak():  # getrusage would tell that of the process which started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
run(8, 8, 0); run(8, 8, 1)
before = peak()
run(N, V, int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in Linux's units")
@pytest.mark.parametrize("chunk_size", [None, 256, 64])
def test_the_accounting_of_memory_is_what_is_used(chunk_size):
    command = [sys.executable, "-c", MEASURE, str(chunk_size or 0)]
    used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    config = GPTConfig(50_000, d_model=128, n_layers=1, n_heads=1)
    expected = loss_bytes(config, 2, 384, chunk_size)
    assert abs(used / expected - 1) < 0.15, f"{used:,} bytes used, {expected:,} expected"


def test_gpt2_needs_less_than_a_third_in_chunks():
    config = PRESETS["gpt2-124m"]
    assert loss_bytes(config, 8, 256, chunk_size=256) < loss_bytes(config, 8, 256) / 3
    assert loss_bytes(LLAMA, 2, 16, chunk_size=999) == loss_bytes(LLAMA, 2, 16, chunk_size=32)


# --- Every token by itself


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_tokens_and_their_gradients(chunk_size, temperature):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, weight = draw(7, 5).requires_grad_(), draw(11, 5).requires_grad_()
    targets = torch.randint(11, (7,), generator=generator)
    found = token_logprobs(hidden, weight, targets, chunk_size, temperature)
    plain = (hidden @ weight.T / temperature).log_softmax(-1)[torch.arange(7), targets]
    assert_close(found, plain)
    weights = draw(7)
    gradients = [torch.autograd.grad((x * weights).sum(), (hidden, weight)) for x in (found, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def test_log_probabilities_are_exact_in_low_precision_products():
    hidden, weight = torch.randn(4, 8), torch.randn(50, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert found.dtype == torch.float32
    exact = token_logprobs(hidden, weight, torch.tensor([1, 2, 3, 4]))
    assert_close(found, exact, rtol=0.02, atol=0.05)


def test_log_probabilities_hold_one_chunk_at_a_time():
    """Of logits, that is: what autograd keeps has no V in it."""
    kept = []
    hidden = torch.randn(64, 8, requires_grad=True)
    weight, targets = torch.randn(1000, 8), torch.zeros(64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs(hidden, weight, targets, chunk_size=16)
    assert max(x.numel() for x in kept if x is not weight) <= hidden.numel()
