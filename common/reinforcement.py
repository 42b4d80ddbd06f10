"""Reinforcement learning of a policy that writes: REINFORCE, GRPO and PPO, and what they share.

    algorithm = GRPO(group_size=8, kl=KLWeight(0.04))
    train_policy(model, prompts, reward, algorithm, settings, eos_id=2)  # in `policy_training`

    Reinforce  advantage: reward minus the mean of the others; one step up the log-probability
    GRPO       advantage: reward against its group's mean and spread; clipped ratio; KL as a loss
    PPO        advantage: of each token, against a learned value (GAE); clipped ratio and value;
               KL as a penalty per token

All stay near a frozen reference, by as much as `KLWeight` says. Shapes: B responses, R tokens of
the longest; `mask` (B, R) is True for what the policy wrote, its end included. Whatever is outside
of it counts nowhere, be it filled by the end token or not.
"""

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from common.rollout import Rollout

# -------------------------------------------------------------------------------------- the pieces


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of what the mask lets through, all rows together. (B, R) -> ()."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shifted and scaled to mean 0 and variance 1 within the mask; 0 outside. (B, R) -> (B, R)."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * (masked_mean(centred**2, mask) + 1e-8).rsqrt()


def kl_log_ratio(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log(policy / reference) of each token: the KL divergence is its mean over what was written.

    Unbiased, but often negative by chance. "k1" of Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - reference


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """r - log r - 1 with r = reference / policy, of each token: unbiased as well, never negative.

    "k3" of Schulman 2020; GRPO's (Shao et al. 2024, arXiv:2402.03300, equation 4).
    """
    log_r = reference - logprobs
    return log_r.exp() - log_r - 1


def leave_one_out(scores: Tensor, group_size: int = 1) -> Tensor:
    """Of each reward the mean of the others in its group; with groups of 1, of all others. (B,).

    A baseline that does not depend on the answer itself leaves the gradient unbiased.
    Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    groups = scores.view(-1, group_size if group_size > 1 else len(scores))
    n = groups.shape[1]
    return ((groups.sum(1, keepdim=True) - groups) / max(n - 1, 1)).flatten()


def group_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Rewards of each group, one after the other, to mean 0 and standard deviation 1. (B,) -> (B,).

    A group whose rewards are all the same has nothing to teach: 0. Shao et al. 2024, section 4.1.2.
    """
    groups = scores.view(-1, group_size)
    spread = groups.std(1, keepdim=True, correction=0)
    return ((groups - groups.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()


def clipped_policy_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float = 0.2
) -> Tensor:
    """-min(ratio A, clipped ratio A) of each token, the ratio policy / old policy. -> (B, R).

    What has moved further than `clip` in the wanted direction gets no gradient. PPO: Schulman et
    al. 2017, arXiv:1707.06347, equation 7.
    """
    ratio = (logprobs - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def clipped_value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float = 0.2) -> Tensor:
    """Half the squared error, the larger of the value's and that of its clipped move. -> (B, R)."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """A penalty off each token, and the score on each row's last one. (B,), (B, R) -> (B, R).

    The last one is the end token, or where the answer was cut off, the last before the cut.
    Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    last = mask.long().cumsum(1) == mask.sum(1, keepdim=True)
    return scores[:, None] * (last & mask) - penalties * mask


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: advantages and returns, (B, R) each.

    δ_t = r_t + γ V_(t+1) - V_t, and A_t = δ_t + γ λ A_(t+1); after the last token all is worth 0.
    Schulman et al. 2015, arXiv:1506.02438, equation 16.
    """
    rewards, values = rewards * mask, values * mask
    later = torch.zeros_like(rewards[:, 0])
    advantages, next_value = torch.zeros_like(rewards), later
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = delta + gamma * lam * later
        advantages[:, t], next_value = later, values[:, t]
    return advantages, advantages + values


@dataclass
class KLWeight:
    """How much it costs to stray from the reference, per nat.

    With a `target` the weight follows the KL that is measured: up while it is above, down while it
    is below, by at most a fifth per `horizon` responses (Ziegler et al. 2019, section 2.2).
    """

    weight: float = 0.05
    target: float | None = None  # nats per response; None: the weight stays
    horizon: int = 1000

    def __post_init__(self):
        if not self.weight >= 0 or self.horizon < 1 or (self.target is not None
                                                       and not self.target > 0):  # fmt: skip
            raise ValueError(
                f"KL weight {self.weight} must be 0 or more, target {self.target} above 0 or None, "
                f"horizon {self.horizon} above 0"
            )

    def update(self, kl: float, n: int) -> None:
        """After `n` responses whose mean KL was `kl`, in nats per response."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.weight *= 1 + error * n / self.horizon


# ---------------------------------------------------------------------------------- the algorithms


@dataclass
class Experience:
    """What was written, what it earned, and what policy, reference and value said of it then."""

    played: Rollout
    scores: Tensor  # (B,)
    old: Tensor  # (B, R) log-probabilities by the policy before any update
    reference: Tensor  # (B, R) by the reference
    values: Tensor  # (B, R) what was expected of the rest; 0 without a value head
    advantages: Tensor | None = None  # (B, R)
    returns: Tensor | None = None  # (B, R)

    @property
    def mask(self) -> Tensor:
        return self.played.mask

    def rows(self, places: list[int]) -> "Experience":
        """Some of the rows."""
        played, *tensors = (getattr(self, field.name) for field in fields(self))
        return Experience(played.rows(places), *(x if x is None else x[places] for x in tensors))


@dataclass
class Reinforce:
    """The policy gradient itself, with a baseline: Williams 1992, "Simple statistical
    gradient-following algorithms for connectionist reinforcement learning".

    The KL divergence is taken off the reward; one update per rollout, as the gradient holds for the
    policy that wrote it alone.
    """

    group_size: int = 1  # answers per prompt
    kl: KLWeight = field(default_factory=KLWeight)
    passes, minibatches, has_value = 1, 1, False

    def prepare(self, e: Experience) -> None:
        """Advantages: the same for every token of an answer."""
        strayed = (kl_log_ratio(e.old, e.reference) * e.mask).sum(1)
        totals = e.scores - self.kl.weight * strayed
        e.advantages = (totals - leave_one_out(totals, self.group_size))[:, None] * e.mask

    def loss(self, logprobs: Tensor, values: Tensor, e: Experience) -> Tensor:
        """Its gradient is that of the expected reward, downwards. -> ()"""
        return -(e.advantages * logprobs * e.mask).sum(1).mean()


@dataclass
class GRPO:
    """Group relative policy optimisation: Shao et al. 2024, arXiv:2402.03300, equations 3 and 4.

    Every answer counts alike, however long it is.
    """

    group_size: int = 8
    kl: KLWeight = field(default_factory=lambda: KLWeight(0.04))
    clip: float = 0.2
    passes: int = 1  # over each rollout
    minibatches: int = 1  # per pass
    has_value = False

    def __post_init__(self):
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}: a group needs 2 answers or more")

    def prepare(self, e: Experience) -> None:
        """Advantages: the same for every token of an answer."""
        e.advantages = group_advantages(e.scores, self.group_size)[:, None] * e.mask

    def loss(self, logprobs: Tensor, values: Tensor, e: Experience) -> Tensor:
        """The mean over answers of the mean over their tokens. -> ()"""
        losses = clipped_policy_loss(logprobs, e.old, e.advantages, self.clip)
        losses = losses + self.kl.weight * kl_k3(logprobs, e.reference)
        return ((losses * e.mask).sum(1) / e.mask.sum(1)).mean()


@dataclass
class PPO:
    """Proximal policy optimisation as in RLHF: Schulman et al. 2017, arXiv:1707.06347; Ziegler et
    al. 2019, arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155.

    The value of each token is learned by a head on the policy's own states.
    """

    group_size: int = 1
    kl: KLWeight = field(default_factory=KLWeight)
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.5
    gamma: float = 1.0
    lam: float = 0.95
    passes: int = 4
    minibatches: int = 1
    has_value = True

    def prepare(self, e: Experience) -> None:
        """Advantages of each token, whitened, and the returns that the value should foretell."""
        penalties = self.kl.weight * kl_log_ratio(e.old, e.reference)
        rewards = token_rewards(e.scores, penalties, e.mask)
        advantages, e.returns = gae(rewards, e.values, e.mask, self.gamma, self.lam)
        e.advantages = whiten(advantages, e.mask)

    def loss(self, logprobs: Tensor, values: Tensor, e: Experience) -> Tensor:
        """The mean over all tokens, of policy and value. -> ()"""
        policy = clipped_policy_loss(logprobs, e.old, e.advantages, self.clip)
        value = clipped_value_loss(values, e.values, e.returns, self.value_clip)
        return masked_mean(policy + self.value_weight * value, e.mask)


Algorithm = Reinforce | GRPO | PPO
