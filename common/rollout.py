"""Rollouts: a policy writes answers, and keeps the log-probability of every token it drew.

    played = rollout(model, prompts, max_new_tokens=64, eos_id=2, generator=generator)
    played.responses      # lists of ids, each with its end where it has one
    played.mask           # (B, R), True for what the policy wrote, its end included
    policy_logprobs(model, played)  # (B, R), with gradients; equal to played.logprobs

Which tokens count is known from when a row ended, and never looked up in the ids afterwards: many
models fill with the very token that ends an answer, and then the one would be taken for the other.
Rows are written with the filling at the left, and read again with the filling at the right, where
every position is what it was. B rows, R tokens of the longest answer, T of prompt and answer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.evaluation import evaluation_mode
from common.generation import decode, sampler
from common.gpt import GPT
from common.instruction import characters
from common.lora import adapters_off, has_lora
from common.losses import IGNORED, token_logprobs
from common.tokenizer import BPETokenizer

Ids = Sequence[Sequence[int]]
RewardFunction = Callable[[Ids, Ids], Sequence[float] | Tensor]  # prompts, responses -> (B,)


@dataclass(frozen=True)
class Rollout:
    """Prompts, what a policy wrote after them, and how likely it was."""

    prompts: list[list[int]]
    responses: list[list[int]]  # with the end token, where the policy wrote one
    ended: Tensor  # (B,) of bool: it did
    mask: Tensor  # (B, R) of bool: a token that the policy wrote, its end included
    logprobs: Tensor  # (B, R) in nats, as it was drawn; 0 outside of the mask
    inputs: Tensor  # (B, T) of ids, filled up at the right
    targets: Tensor  # (B, T) of ids: what the policy wrote next, -100 elsewhere

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, (B,)."""
        return self.mask.sum(1)

    def spread(self, values: Tensor) -> Tensor:
        """Values of all that was written, (N,) row by row, to where they belong: (B, R), else 0."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)

    def rows(self, places: Sequence[int]) -> "Rollout":
        """Some of the rows, as wide as before, so that they are computed in the same way."""
        pick = lambda x: x[places] if isinstance(x, Tensor) else [x[i] for i in places]
        return Rollout(*(pick(getattr(self, field.name)) for field in fields(self)))


def rollout(
    model: GPT,
    prompts: Ids,
    max_new_tokens: int,
    eos_id: int | None,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Rollout:
    """Let `model` answer `prompts` (lists of ids), each on its own, by chance.

    Drawn from softmax(logits / temperature) and nothing narrower: from top-k or top-p the
    log-probabilities would be those of another policy. eos_id: the token that ends an answer; None:
    none does. use_cache=False reads everything anew for each token, to compare.
    Raises ValueError where prompt and answer may not fit the context, and for a temperature of 0,
    which leaves nothing to chance.
    """
    longest, context = max(map(len, prompts), default=0), model.config.context_length
    if not 0 < max_new_tokens <= context - longest:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}: with a prompt of {longest} tokens it must be "
            f"from 1 to {context - longest}, or they do not fit the context of {context}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it must be above 0, to explore")
    choose = sampler(temperature, generator=generator)
    found = []
    for tokens, logits, alive in decode(model, prompts, max_new_tokens, choose, eos_id, use_cache):
        chosen = (logits.float() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        found.append((tokens, chosen.masked_fill(~alive, 0.0), alive))
    tokens, logprobs, mask = (torch.stack(column, dim=1) for column in zip(*found, strict=True))
    responses = [row[:n] for row, n in zip(tokens.tolist(), mask.sum(1).tolist(), strict=True)]
    return lay_out([list(p) for p in prompts], responses, eos_id, mask, logprobs)


def lay_out(
    prompts: list[list[int]], responses: list[list[int]], eos_id: int | None, mask: Tensor,
    logprobs: Tensor,
) -> Rollout:  # fmt: skip
    """Prompts and responses as rows to be read in one pass, each from its own first position."""
    device, rows = mask.device, []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor(prompt + response, device=device)
        targets = ids[1:].clone()
        targets[: len(prompt) - 1] = IGNORED  # the prompt's last token predicts the first answer's
        rows.append((ids[:-1], targets))
    inputs, targets = zip(*rows, strict=True)
    return Rollout(
        prompts,
        responses,
        torch.tensor([response[-1] == eos_id for response in responses], device=device),
        mask,
        logprobs,
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED),
    )


def written_states(model: GPT, played: Rollout) -> tuple[Tensor, Tensor]:
    """What the head read before each token that was written, (N, C), and these tokens, (N,)."""
    written = played.targets != IGNORED
    return model.hidden(played.inputs)[written], played.targets[written]


def policy_logprobs(model: GPT, played: Rollout, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of what was written, (B, R) in nats, computed anew in one pass."""
    states, tokens = written_states(model, played)
    found = token_logprobs(states, model.head.weight, tokens, temperature=temperature)
    return played.spread(found)


class Reference:
    """The model that the policy must not stray from, frozen as it is now.

    Of a policy with adapters it is the policy without them; else a copy, or the `frozen` model that
    is passed in. Called with a rollout: log-probabilities (B, R) without gradients.
    """

    def __init__(self, policy: GPT, frozen: GPT | None = None):
        self.policy = policy
        self.shares = frozen is None and has_lora(policy)
        self.copy = frozen
        if frozen is None and not self.shares:
            self.copy = copy.deepcopy(policy).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, played: Rollout, temperature: float = 1.0) -> Tensor:
        with self.model() as model, evaluation_mode(model):
            return policy_logprobs(model, played, temperature)

    @contextmanager
    def model(self) -> Iterator[nn.Module]:
        """The reference itself, to look at or to sample from."""
        if not self.shares:
            yield self.copy
            return
        with adapters_off(self.policy) as model:
            yield model


def text_reward(score: Callable[[str, str], float], tokenizer: BPETokenizer) -> RewardFunction:
    """A reward of ids from one of texts, `score(prompt, response)`; control tokens are no text."""
    text = lambda ids: "".join(characters(tokenizer, ids))
    special = set(tokenizer.special_tokens.values())
    asked = lambda ids: tokenizer.decode([i for i in ids if i not in special])
    return lambda prompts, responses: [
        float(score(asked(p), text(r))) for p, r in zip(prompts, responses, strict=True)
    ]
