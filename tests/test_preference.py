"""DPO begins at ln 2, remembers its reference, and makes the chosen answer likelier."""

import copy
import math

import pytest
import torch
from test_chat_format import CHAT
from test_instruction import CONFIGS, model
from test_rewards import HELD_OUT, PAIRS
from torch.testing import assert_close

from common.chat_format import CHATML, ChatFormat
from common.instruction import response_loss
from common.lora import adapters_off, add_lora, lora_parameters
from common.losses import IGNORED
from common.preference import (
    PreferenceBatches,
    dpo_loss,
    implicit_rewards,
    preference_loss,
    score_policy,
    sequence_logprobs,
    train_dpo,
)
from common.training import TrainingSettings

FORMAT = ChatFormat(CHAT, CHATML)
SETTINGS = TrainingSettings(30, 2e-3, weight_decay=0.0, stop_on_explosion=False)


def batches(policy=None, batch_size: int = 4, pairs=PAIRS) -> PreferenceBatches:
    found = PreferenceBatches(FORMAT, pairs, batch_size)
    return found.remember(policy) if policy else found


# --- Log-probabilities


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probabilities_of_answers_token_by_token(family):
    gpt = model(family, spread=10.0)
    inputs, targets, _ = next(iter(batches()))
    with torch.no_grad():
        found = sequence_logprobs(gpt, inputs, targets)
        for row, (ids, wanted) in enumerate(zip(inputs, targets, strict=True)):
            log_p = gpt(ids[None])[0].log_softmax(-1)
            expected = sum(log_p[t, wanted[t]] for t in range(len(ids)) if wanted[t] != IGNORED)
            assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_a_row_without_targets_has_the_log_probability_0():
    inputs, targets = torch.ones(2, 3, dtype=torch.long), torch.full((2, 3), IGNORED)
    targets[1, 2] = 5
    found = sequence_logprobs(model(), inputs, targets)
    assert found[0] == 0 > found[1]


# --- The loss


def test_the_loss_is_ln_2_where_policy_and_reference_are_the_same():
    chosen, rejected = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    for beta in (0.01, 0.1, 1.0):
        assert dpo_loss(chosen, rejected, chosen, rejected, beta).item() == pytest.approx(
            math.log(2), abs=1e-7
        )


def test_the_loss_by_hand():
    """The chosen answer has become e² times as likely, the rejected one e times: -ln σ(0.1)."""
    loss = dpo_loss(*(torch.tensor([x]) for x in (-8.0, -4.0, -10.0, -5.0)), beta=0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1)))
    assert_close(implicit_rewards(torch.tensor([-8.0]), torch.tensor([-10.0]), 0.5),
                 torch.tensor([1.0]))  # fmt: skip


def test_swapped_pairs_have_the_complementary_probability():
    values = torch.randn(4, 1, generator=torch.Generator().manual_seed(0))
    loss = dpo_loss(*values, beta=0.7)
    swapped = dpo_loss(*values[[1, 0, 3, 2]], beta=0.7)
    assert_close((-loss).exp() + (-swapped).exp(), torch.tensor(1.0))


def test_the_gradient_is_that_of_the_paper():
    """β σ(reward of rejected - reward of chosen), up for the chosen, down for the rejected."""
    values = torch.randn(4, 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dpo_loss(*values, beta=0.3).backward()
    margin = implicit_rewards(values[0], values[2], 0.3) - implicit_rewards(
        values[1], values[3], 0.3
    )
    weight = 0.3 * torch.sigmoid(-margin)
    assert_close(values.grad[0], -weight)
    assert_close(values.grad[1], weight)


# --- The reference


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_reference_is_remembered_pair_by_pair(batch_size):
    gpt = model(spread=10.0)
    remembered = batches(gpt, batch_size)
    for inputs, targets, reference in remembered:
        with torch.no_grad():
            assert_close(sequence_logprobs(gpt, inputs, targets), reference, rtol=1e-4, atol=1e-3)
    assert not remembered.reference.requires_grad
    assert remembered.reference.std() > 0.1


def test_adapters_may_be_part_of_the_reference():
    """Then the loss begins at ln 2 for a policy that has learned before."""
    policy = add_lora(model(), rank=2)
    for weight in lora_parameters(policy).values():
        weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    losses = {}
    for adapters in (True, False):
        known = PreferenceBatches(FORMAT, PAIRS, 4).remember(policy, adapters=adapters)
        losses[adapters] = preference_loss(policy, *next(iter(known))).item()
    assert losses[True] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(losses[False] - math.log(2)) > 1e-4


def test_with_adapters_the_reference_is_the_model_without_them():
    gpt = model(spread=10.0)
    expected = batches(gpt).reference
    add_lora(gpt, rank=2)
    for parameter in lora_parameters(gpt).values():
        parameter.data.normal_(0, 0.3)
    assert_close(batches(gpt).reference, expected)
    inputs, targets, _ = next(iter(batches()))
    assert (sequence_logprobs(gpt, inputs, targets).detach() - expected.T.flatten()).abs().max() > 1


def test_an_anchor_adds_the_loss_of_the_chosen_answers():
    policy = model(spread=10.0)
    inputs, targets, reference = next(iter(batches(policy)))
    n = len(inputs) // 2
    with torch.no_grad():
        plain, anchored = (
            preference_loss(policy, inputs, targets, reference, anchor=anchor)
            for anchor in (0.0, 0.5)
        )
        rows = [response_loss(policy, inputs[i : i + 1], targets[i : i + 1]) for i in range(n)]
    assert_close(anchored - plain, 0.5 * sum(rows) / n, rtol=1e-3, atol=1e-3)


# --- Training


@pytest.mark.parametrize("lora", [False, True])
def test_it_learns_and_what_it_learns_holds_for_other_prompts(lora):
    policy = model()
    reference = copy.deepcopy(policy)
    if lora:
        add_lora(policy, rank=8)
    history = train_dpo(policy, CHAT, PAIRS, SETTINGS, beta=0.3, template=CHATML, progress=False)
    assert history.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert history.losses[-1] < 0.5
    scores = score_policy(policy, batches(reference, pairs=HELD_OUT), beta=0.3)
    assert scores.accuracy == 1
    assert scores.margin > 0.1
    if lora:
        with adapters_off(policy):
            assert_close(batches(policy).reference, batches(reference).reference)


def test_before_training_the_margin_is_0():
    gpt = model(spread=10.0)
    scores = score_policy(gpt, batches(gpt))
    assert scores.margin == pytest.approx(0, abs=1e-3)
    inputs, targets, reference = next(iter(batches(gpt)))
    loss = preference_loss(gpt, inputs, targets, reference)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3)


def test_a_larger_beta_keeps_it_nearer():
    def moved(beta):
        policy = model()
        remembered = batches(policy)
        train_dpo(policy, CHAT, PAIRS, SETTINGS, beta=beta, template=CHATML, progress=False)
        inputs, targets, reference = next(iter(remembered))
        with torch.no_grad():
            return (sequence_logprobs(policy, inputs, targets) - reference).abs().mean()

    assert moved(2.0) < 0.7 * moved(0.02)


def test_validation_keeps_the_best_and_bfloat16_begins_at_ln_2_too():
    from dataclasses import replace

    policy = model()
    settings = replace(SETTINGS, n_steps=10, evaluate_every=2, dtype="bfloat16")
    history = train_dpo(
        policy, CHAT, PAIRS, settings, validation=HELD_OUT, template=CHATML, progress=False
    )
    assert history.losses[0] == pytest.approx(math.log(2), abs=0.01)
    looks = [found.loss for found in history.evaluations.values()]
    assert min(looks) < looks[0]
