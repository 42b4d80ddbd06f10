"""A loss over many batches is the loss over all their targets, and looking changes nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.evaluation import (
    Evaluation,
    evaluate_loss,
    evaluation_mode,
    power_law,
    unchanged_chance,
)


def loss_fn(model, inputs, targets):
    return F.cross_entropy(model(inputs), targets)


def example():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(10, 4, generator=generator)
    targets = torch.randint(5, (10,), generator=generator)
    torch.manual_seed(0)
    return nn.Linear(4, 5), inputs, targets


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1, 8, 1]])
def test_batches_of_any_size_give_the_mean_over_targets(sizes):
    model, inputs, targets = example()
    batches = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    found = evaluate_loss(model, batches, loss_fn)
    assert found.loss == pytest.approx(loss_fn(model, inputs, targets).item(), rel=1e-6)


def test_targets_that_are_none_do_not_count():
    model, inputs, targets = example()
    expected = loss_fn(model, inputs[:4], targets[:4]).item()
    targets[4:] = -100
    batches = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]  # the second one has none
    assert evaluate_loss(model, batches, loss_fn).loss == pytest.approx(expected, rel=1e-6)


def test_figures_by_hand():
    found = Evaluation.of(math.log(16), bytes_per_token=2.0, characters_per_token=1.0)
    assert found.perplexity == pytest.approx(16)
    assert found.bits_per_byte == pytest.approx(2)
    assert found.bits_per_character == pytest.approx(4)
    assert str(found) == (
        "loss 2.7726, perplexity 16.00, 2.0000 bits per byte, 4.0000 bits per character"
    )
    assert str(Evaluation.of(0.0)) == "loss 0.0000, perplexity 1.00"


def test_nothing_to_evaluate_is_refused():
    model, inputs, targets = example()
    for batches in ([], [(inputs, torch.full_like(targets, -100))]):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate_loss(model, batches, loss_fn)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_drops_nothing_out_and_leaves_the_mode(training):
    model = nn.Sequential(nn.Dropout(0.9), nn.Flatten())
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.train(training)
    seen = []

    def loss(model, inputs, targets):
        seen.append((model.training, torch.is_grad_enabled()))
        return model(inputs).sum()

    evaluate_loss(model, [(torch.ones(2, 3), torch.zeros(2))], loss)
    assert seen == [(False, False)]
    assert model.training == training
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert model.training == training


def test_what_is_drawn_while_looking_is_not_missed():
    model = nn.Linear(2, 2)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with unchanged_chance(model):
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)


def test_a_power_law_is_found_again_and_the_closest_one_otherwise():
    found = power_law({n: 7 * n**-0.3 for n in (10, 100, 5_000)})
    assert found == pytest.approx((7, 0.3))
    # One of three is off by a factor of 2: the line goes through at a third of its logarithm.
    assert power_law({1: 4.0, 10: 2.0, 100: 4.0}) == pytest.approx((2 ** (5 / 3), 0))


@pytest.mark.parametrize("points", [{}, {10: 1.0}, {10: 1.0, 20: 0.0}, {0: 1.0, 20: 1.0}])
def test_what_has_no_power_law_is_refused(points):
    with pytest.raises(ValueError, match="two points or more, all above 0"):
        power_law(points)
