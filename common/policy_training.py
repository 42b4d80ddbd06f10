"""The loop of reinforcement learning: write, judge, learn, and look how far the policy has strayed.

    settings = TrainingSettings(60, 1e-3, schedule="constant", weight_decay=0.0)
    steps = train_policy(model, prompts, reward, GRPO(), settings, eos_id=2, max_new_tokens=32)
    policy_table(steps).plot(y=["reward", "kl"], subplots=True)

`prompts` are lists of ids, such as `ChatFormat.prompt` makes. A reward is any function of prompts
and responses in ids; `text_reward` makes one from a function of texts, and a reward model has
`rewards_of_ids`. Look at reward and KL together: a reward that rises while the KL does, too, may be
a weakness of the reward that was found out (Gao et al. 2023, arXiv:2210.10760).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common.evaluation import evaluation_mode
from common.gpt import GPT
from common.losses import token_logprobs
from common.reinforcement import Algorithm, Experience, kl_log_ratio, masked_mean
from common.rollout import Ids, Reference, RewardFunction, Rollout, rollout, written_states
from common.schedule import TrainingSettings, learning_rate_at
from common.training import clip_gradients, parameter_groups, update_weights


class PolicyStep(NamedTuple):
    """One round: what was written by the policy before its update, and what the update did."""

    step: int
    reward: float  # mean of the responses
    kl: float  # to the reference, nats per response
    length: float  # tokens per response
    ended: float  # share of responses that ended by themselves
    loss: float  # of the last minibatch
    ratio_error: float  # largest |ratio - 1| in the first minibatch: 0 but for rounding
    clipped: float  # share of tokens whose ratio had left the clip range at the last minibatch
    kl_weight: float
    gradient_norm: float


class ActorCritic(nn.Module):
    """A policy and, where it is asked for, a value head on the same states. The head begins at 0.

    The value at a token is what was expected before it was written: it reads the same state as the
    logits that the token was drawn from.
    """

    def __init__(self, gpt: GPT, has_value: bool):
        super().__init__()
        self.gpt = gpt
        self.value = nn.Linear(gpt.config.d_model, 1) if has_value else None
        if has_value:
            nn.init.zeros_(self.value.weight)
            nn.init.zeros_(self.value.bias)
            self.value.to(gpt.token_embedding.weight.device)

    def forward(self, played: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of what was written, (B, R) each; without a head, 0."""
        states, tokens = written_states(self.gpt, played)  # (N, C), (N,)
        logprobs = token_logprobs(states, self.gpt.head.weight, tokens, temperature=temperature)
        values = self.value(states)[:, 0].float() if self.value else torch.zeros_like(logprobs)
        return played.spread(logprobs), played.spread(values)


def train_policy(
    model: GPT,
    prompts: Ids,
    reward: RewardFunction,
    algorithm: Algorithm,
    settings: TrainingSettings,
    *,
    eos_id: int,
    max_new_tokens: int = 64,
    prompts_per_step: int = 8,
    temperature: float = 1.0,
    no_end_penalty: float = 0.0,
    reference: GPT | None = None,
    seed: int = 0,
    progress: bool = True,
    report: Callable[[PolicyStep], None] | None = None,
) -> list[PolicyStep]:
    """Make `model` write what earns reward, in place; returns every step. What is frozen stays.

    A step writes `prompts_per_step` times `algorithm.group_size` responses, and learns from them.
    no_end_penalty: off the reward of a response that ran into `max_new_tokens`. reference: what to
    stay close to, see `Reference`; default: the model as it comes. Dropout is off throughout, or a
    policy would differ from itself. Raises ValueError for a reward that is no finite number per
    response, and what `rollout` raises.
    """
    learner = _Learner(model, copy.deepcopy(algorithm), settings, temperature)
    generator = torch.Generator(learner.device).manual_seed(seed)
    before, steps = Reference(model, reference), []
    drawn = _in_turn(prompts, prompts_per_step, seed)
    with evaluation_mode(learner.actor):
        for step in tqdm(range(1, settings.n_steps + 1), "policy", disable=not progress):
            asked = [prompt for prompt in next(drawn) for _ in range(algorithm.group_size)]
            with learner.low_precision():
                played = rollout(
                    model, asked, max_new_tokens, eos_id,
                    temperature=temperature, generator=generator,
                )  # fmt: skip
            scores = _scores(reward, played) - no_end_penalty * ~played.ended
            experience = learner.experience(played, scores, before)
            figures = learner.learn(experience, learning_rate_at(step, settings))
            steps.append(_summary(step, experience, figures))
            learner.algorithm.kl.update(steps[-1].kl, len(played))
            if report:
                report(steps[-1])
    return steps


def policy_table(steps: Sequence[PolicyStep]):
    """A pandas table with one row per step."""
    import pandas as pd  # here, because it takes half a second

    return pd.DataFrame(steps, columns=PolicyStep._fields).set_index("step")


# ------------------------------------------------------------------------------- the lines of it


class _Learner:
    """An algorithm at work on a policy."""

    def __init__(self, model: GPT, algorithm: Algorithm, settings: TrainingSettings, temperature):
        self.actor = ActorCritic(model, algorithm.has_value)
        self.algorithm, self.settings, self.temperature = algorithm, settings, temperature
        groups = parameter_groups(self.actor, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas)
        self.device = model.token_embedding.weight.device

    def low_precision(self) -> torch.autocast:
        """Products in bf16, where the settings say so: writing, reading and learning alike."""
        enabled = self.settings.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @torch.no_grad()
    def experience(self, played: Rollout, scores: Tensor, reference: Reference) -> Experience:
        """What policy, reference and value say of a rollout now, and the advantages.

        The old log-probabilities are computed in the same way as the new ones will be, and not
        taken from the rollout: so the ratio of an unchanged policy is exactly 1, in any precision.
        """
        with self.low_precision():
            old, values = self.actor(played, self.temperature)
            theirs = reference(played, self.temperature)
        experience = Experience(played, scores, old, theirs, values)
        self.algorithm.prepare(experience)
        return experience

    def learn(self, experience: Experience, rate: float) -> dict[str, float]:
        """Every pass over a rollout, minibatch by minibatch; figures of the first and the last."""
        n, algorithm = len(experience.played), self.algorithm
        size, figures = -(-n // algorithm.minibatches), {"kl_weight": algorithm.kl.weight}
        clip = getattr(algorithm, "clip", torch.inf)
        for start in [*range(0, n, size)] * algorithm.passes:
            e = experience.rows(list(range(start, min(start + size, n))))
            with self.low_precision():
                logprobs, values = self.actor(e.played, self.temperature)
            loss = algorithm.loss(logprobs, values, e)
            loss.backward()
            norm = clip_gradients(self.actor, self.settings.clip_norm)
            update_weights(self.optimizer, rate)
            off = ((logprobs.detach() - e.old).exp() - 1).abs() * e.mask
            figures.setdefault("ratio_error", off.max().item())
            figures["clipped"] = masked_mean((off > clip).float(), e.mask).item()
            figures |= {"loss": loss.item(), "gradient_norm": norm.item()}
        return figures


def _summary(step: int, e: Experience, figures: dict[str, float]) -> PolicyStep:
    strayed = (kl_log_ratio(e.old, e.reference) * e.mask).sum(1).mean()
    return PolicyStep(
        step=step,
        reward=e.scores.mean().item(),
        kl=strayed.item(),
        length=e.played.lengths.float().mean().item(),
        ended=e.played.ended.float().mean().item(),
        **figures,
    )


def _scores(reward: RewardFunction, played: Rollout) -> Tensor:
    """The reward of each response, (B,) in fp32, where the policy is."""
    found = torch.as_tensor(reward(played.prompts, played.responses), dtype=torch.float32)
    if found.shape != (len(played),) or not found.isfinite().all():
        raise ValueError(
            f"the reward must be {len(played)} finite numbers, one per response; it is of shape "
            f"{tuple(found.shape)}" + ("" if found.isfinite().all() else " and not finite")
        )
    return found.to(played.mask.device)


def _in_turn(prompts: Ids, n: int, seed: int) -> Iterator[list[list[int]]]:
    """`n` prompts at a time, all of them in a random order before any comes again."""
    if not len(prompts) or n < 1:
        raise ValueError(f"{len(prompts)} prompts, {n} per step: one at least is needed of both")
    generator, waiting = torch.Generator().manual_seed(seed), []
    while True:
        while len(waiting) < n:
            waiting += torch.randperm(len(prompts), generator=generator).tolist()
        yield [list(prompts[i]) for i in waiting[:n]]
        del waiting[:n]
