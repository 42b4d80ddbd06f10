"""The loss in chunks is the ordinary cross-entropy, gradients included."""

import pytest
import torch
from test_gpt import LLAMA, TINY, make, tokens
from torch.nn import functional as F
from torch.testing import assert_close

from common.objectives import IGNORED, linear_cross_entropy, next_token_loss


def inputs(n: int = 20, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(k, 6, generator=generator, dtype=dtype) for k in (n, 11))
    targets = torch.randint(11, (n,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def loss_and_gradients(loss_of, hidden, weight, targets):
    loss = loss_of(hidden, weight, targets)
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden, weight))


def ordinary(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets)


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


def test_without_gradients_none_are_computed():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert_close(loss, ordinary(hidden, weight, targets).detach())


@pytest.mark.parametrize("config", [TINY, LLAMA])
def test_next_token_loss_trains_like_the_ordinary_one(config):
    ids, gradients = tokens(3, 17), []
    for loss_of in (
        lambda model: next_token_loss(model, ids[:, :-1], ids[:, 1:]),
        lambda model: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
    ):
        model = make(config)
        loss_of(model).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, atol=1e-4, rtol=1e-4)
