"""Every published trap: off-by-one masks, ends without gradient, a KL of a model to itself."""

import math

import pytest
import torch
from torch.testing import assert_close

from common.reinforcement import (
    GRPO,
    PPO,
    Experience,
    KLWeight,
    Reinforce,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k3,
    kl_log_ratio,
    leave_one_out,
    masked_mean,
    token_rewards,
    whiten,
)
from common.rollout import lay_out

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False],
                     [True, True, True]])  # fmt: skip
END = 9


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experience(scores=(1.0, 0.0, 2.0, 0.5), seed: int = 0) -> Experience:
    """Four answers of 3, 1, 2 and 3 tokens; what is outside of the mask is far from 0."""
    responses = [[5] * (n - 1) + [END] for n in (3, 1, 2, 3)]
    played = lay_out([[1]] * 4, responses, END, MASK, torch.zeros(4, 3))
    old = -drawn(4, 3, seed=seed).abs()
    reference, values = old + 0.1 * drawn(4, 3, seed=seed + 1), drawn(4, 3, seed=seed + 2)
    return Experience(played, torch.tensor(scores), old, reference, values)


# --- KL


def test_the_kl_of_a_model_with_itself_is_0():
    logprobs = -drawn(4, 3).abs()
    assert kl_log_ratio(logprobs, logprobs).abs().max() == 0
    assert kl_k3(logprobs, logprobs).abs().max() == 0


def test_both_estimates_are_right_on_average_and_k3_is_never_negative():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    k1, k3 = (estimate(p.log(), q.log()) for estimate in (kl_log_ratio, kl_k3))
    assert_close((p * k1).sum(), exact)
    assert_close((p * k3).sum(), exact)
    assert (k3 >= 0).all()
    assert k1.min() < 0
    spread = lambda k: (p * (k - exact) ** 2).sum()
    near = lambda k: spread(k(p.log(), (0.95 * p + 0.05 * q).log()))
    assert near(kl_k3) < near(kl_log_ratio), "near the reference k3 is the steadier one"


def test_the_weight_moves_towards_the_target():
    kl = KLWeight(0.1, target=6.0, horizon=100)
    kl.update(12.0, 50)
    assert kl.weight == pytest.approx(0.1 * (1 + 0.2 * 50 / 100)), "at most a fifth"
    higher = kl.weight
    kl.update(0.0, 50)
    assert kl.weight < higher
    same = kl.weight
    kl.update(6.0, 50)
    assert kl.weight == same
    kl.update(6.6, 100)
    assert kl.weight == pytest.approx(same * 1.1)
    fixed = KLWeight(0.1)
    fixed.update(100.0, 50)
    assert fixed.weight == 0.1
    for wrong in ({"weight": -1}, {"target": 0}, {"horizon": 0}):
        with pytest.raises(ValueError, match="must be 0 or more"):
            KLWeight(**wrong)


# --- Advantages


def test_leave_one_out_by_hand():
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert leave_one_out(scores).tolist() == pytest.approx([11 / 3, 10 / 3, 3, 2])
    assert leave_one_out(scores, 2).tolist() == [2, 1, 6, 3]
    assert leave_one_out(torch.tensor([5.0])).tolist() == [0]


def test_group_advantages_by_hand():
    found = group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]), rtol=1e-4, atol=1e-5)
    scores = drawn(12)
    assert_close(group_advantages(scores, 4), group_advantages(10 * scores + 3, 4),
                 rtol=1e-4, atol=1e-4)  # fmt: skip


def test_gae_by_hand():
    """γ = 0.5, λ = 0.5. δ: 1 + 0.5·2 - 1 = 1; 0 + 0.5·4 - 2 = 0; 3 - 4 = -1 (nothing after it).

    A, backwards: -1; 0 + 0.25·(-1) = -0.25; 1 + 0.25·(-0.25) = 0.9375. The second row ends after
    two tokens: δ: 0 + 0.5·1 - 2 = -1.5; 1 - 1 = 0. A: 0; -1.5.
    """
    rewards = torch.tensor([[1.0, 0.0, 3.0], [0.0, 1.0, 99.0]])
    values = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert_close(advantages, torch.tensor([[0.9375, -0.25, -1.0], [-1.5, 0.0, 0.0]]))
    assert_close(returns, torch.tensor([[1.9375, 1.75, 3.0], [0.5, 1.0, 0.0]]))


def test_gae_at_its_ends():
    rewards, values, mask = drawn(4, 3), drawn(4, 3, seed=1), MASK
    monte_carlo, returns = gae(rewards, values, mask, 1.0, 1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    assert_close(returns, to_come)
    assert_close(monte_carlo, (to_come - values) * mask)
    one_step, _ = gae(rewards, values, mask, 1.0, 0.0)
    following = torch.cat([(values * mask)[:, 1:], torch.zeros(4, 1)], dim=1)
    assert_close(one_step, (rewards + following - values) * mask)


def test_the_end_gets_the_reward_and_the_filling_nothing():
    found = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.full((4, 3), 0.1), MASK)
    expected = [[-0.1, -0.1, 0.9], [1.9, 0, 0], [-0.1, 2.9, 0], [-0.1, -0.1, 3.9]]
    assert_close(found, torch.tensor(expected))


def test_whitening_is_within_the_mask():
    x = drawn(4, 3) * 5 + 3
    found = whiten(torch.where(MASK, x, 1000.0), MASK)
    assert_close(found[MASK].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(found[MASK].std(correction=0), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    assert not found[~MASK].any()
    assert masked_mean(torch.where(MASK, 2.0, 1e9), MASK) == 2.0


# --- Losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # far enough: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # the wrong way: not clipped
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_the_clipped_ratio(ratio, advantage, loss, gradient):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    found = clipped_policy_loss(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2)
    assert found.item() == pytest.approx(loss)
    found.backward()
    assert logprobs.grad.item() == pytest.approx(gradient)


def test_the_clipped_value():
    of = lambda value: clipped_value_loss(*(torch.tensor([x]) for x in (value, 0.0, 1.0)), 0.2)
    assert of(0.1).item() == pytest.approx(0.5 * 0.9**2)
    assert of(0.9).item() == pytest.approx(0.5 * 0.8**2), "the move counts as 0.2 only"
    assert of(-0.5).item() == pytest.approx(0.5 * 1.5**2)


ALGORITHMS = {
    "reinforce": lambda: Reinforce(kl=KLWeight(0.1)),
    "grpo": lambda: GRPO(group_size=2, kl=KLWeight(0.1)),
    "ppo": lambda: PPO(kl=KLWeight(0.1)),
}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@each_algorithm
def test_the_end_has_a_gradient_and_the_filling_none(name):
    algorithm, e = ALGORITHMS[name](), experience()
    algorithm.prepare(e)
    new, values = (x.clone().requires_grad_() for x in (e.old, e.values))
    algorithm.loss(new, values, e).backward()
    assert (new.grad[MASK] != 0).all()
    assert not new.grad[~MASK].any()
    if algorithm.has_value:
        assert (values.grad[MASK] != 0).any()
        assert not values.grad[~MASK].any()


@each_algorithm
def test_what_is_outside_of_the_mask_changes_nothing(name):
    losses = []
    for junk in (0.0, 20.0):
        algorithm, e = ALGORITHMS[name](), experience()
        e.old, e.reference, e.values = (
            torch.where(MASK, x, junk * (i + 1))
            for i, x in enumerate((e.old, e.reference, e.values))
        )
        algorithm.prepare(e)
        new = torch.where(MASK, e.old + 0.05, junk / 5).requires_grad_()
        loss = algorithm.loss(new, e.values, e)
        loss.backward()
        losses.append((loss.detach(), new.grad))
    assert_close(*losses)


@each_algorithm
def test_better_answers_become_likelier(name):
    algorithm, e = ALGORITHMS[name](), experience(scores=(3.0, -3.0, 3.0, -3.0))
    algorithm.kl.weight, e.values = 0.0, torch.zeros(4, 3)
    algorithm.prepare(e)
    new = e.old.clone().requires_grad_()
    algorithm.loss(new, e.values, e).backward()
    for row, better in enumerate((True, False, True, False)):
        assert ((new.grad[row][MASK[row]] < 0) == better).all()


@each_algorithm
def test_straying_costs(name):
    """With equal rewards all that is left is the leash: a token that strayed up is pulled back."""
    algorithm, e = ALGORITHMS[name](), experience(scores=(1.0, 1.0, 1.0, 1.0))
    e.reference = e.old.clone()
    e.reference[0, 0] -= 2.0  # far likelier under the policy than under the reference
    e.values = torch.zeros(4, 3)
    algorithm.kl.weight = 1.0
    algorithm.prepare(e)
    new = e.old.clone().requires_grad_()
    algorithm.loss(new, e.values, e).backward()
    assert new.grad[0, 0] > 0


def test_the_gradient_of_reinforce_by_hand():
    e = experience(scores=(3.0, 0.0, 0.0, 0.0))
    e.reference = e.old
    algorithm = Reinforce()
    algorithm.prepare(e)
    new = e.old.clone().requires_grad_()
    algorithm.loss(new, e.values, e).backward()
    assert_close(new.grad[0], torch.full((3,), -3.0 / 4))
    assert_close(new.grad[1], torch.tensor([1.0 / 4, 0.0, 0.0]))


def test_in_grpo_every_answer_counts_alike():
    e = experience(scores=(1.0, 0.0, 1.0, 0.0))
    e.reference = e.old
    algorithm = GRPO(group_size=2)
    algorithm.prepare(e)
    new = e.old.clone().requires_grad_()
    algorithm.loss(new, e.values, e).backward()
    assert_close(new.grad.sum(1).abs(), torch.full((4,), 1 / 4), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="a group needs 2 answers or more"):
        GRPO(group_size=1)


def test_in_ppo_the_penalty_falls_on_the_token_that_strayed():
    e = experience(scores=(0.0, 0.0, 0.0, 0.0))
    e.values = torch.zeros(4, 3)
    e.reference = e.old.clone()
    e.reference[0, 1] -= 1.0
    algorithm = PPO(kl=KLWeight(0.5), lam=0.0)
    algorithm.prepare(e)
    assert e.returns[0].tolist() == pytest.approx([0.0, -0.5, 0.0])
    assert e.advantages[0].argmin() == 1
    some = e.rows([2, 0])
    assert_close(some.advantages, e.advantages[[2, 0]])
    assert some.played.responses == [e.played.responses[2], e.played.responses[0]]
