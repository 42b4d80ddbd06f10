"""Learning from preferences without a reward model of one's own: DPO.

    add_lora(policy, rank=8)
    train_dpo(policy, tokenizer, read_preferences(half="a"), settings, beta=0.1)

A policy that is best under a reward, and kept close to a reference, gives the reward away: it is
what the two models differ by. So the loss of a reward model becomes one of the policy itself.
Direct Preference Optimization, Rafailov et al. 2023, arXiv:2305.18290. The reward model, which
rests on the same pairs and the same loss, is in `common.rewards`. B pairs, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.chat_format import ChatFormat, Template
from common.evaluation import evaluate_loss, evaluation_mode
from common.fine_tuning import by_length, fit
from common.gpt import GPT
from common.history import History
from common.instruction import learnable
from common.instruction_data import Preference
from common.lora import adapters_off, has_lora
from common.losses import IGNORED, token_logprobs
from common.rewards import (
    PairBatches,
    PairScores,
    Report,
    RewardModel,
    bradley_terry_loss,
    score_pairs,
    train_reward_model,
)
from common.tokenizer import BPETokenizer
from common.training import TrainingSettings

__all__ = [
    "PairScores",
    "PreferenceBatches",
    "RewardModel",
    "bradley_terry_loss",
    "dpo_loss",
    "implicit_rewards",
    "preference_loss",
    "score_pairs",
    "score_policy",
    "sequence_logprobs",
    "train_dpo",
    "train_reward_model",
]


def sequence_logprobs(model: GPT, inputs: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each row's targets together: (B, T), (B, T) -> (B,) in nats.

    Targets of -100 don't count. Logits are computed only where there is a target, in chunks.
    """
    learned = targets != IGNORED
    hidden = model.hidden(inputs)[learned]  # (B, T, C) -> (N, C)
    found = token_logprobs(hidden, model.head.weight, targets[learned])  # (N,)
    return found.new_zeros(len(inputs)).index_add(0, learned.nonzero()[:, 0], found)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation: `bradley_terry_loss` of `implicit_rewards`. -> ()

    Log-probabilities (B,) of whole answers by the policy and by the reference; ln 2 where both are
    the same model. Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """
    return bradley_terry_loss(
        implicit_rewards(policy_chosen, reference_chosen, beta),
        implicit_rewards(policy_rejected, reference_rejected, beta),
    )


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """The reward under which the policy is the best, close to the reference as it stays.

    beta * (log-probability by the policy - by the reference), (B,) -> (B,), up to a constant for
    each prompt. The larger beta, the tighter the leash.
    """
    return beta * (policy - reference)


class PreferenceBatches(PairBatches):
    """Batches of (inputs, targets, reference) of 2B rows: first B chosen answers, then B rejected.

    inputs, targets (2B, T) as in `InstructionBatches`; reference (2B,) is what `remember` found.
    """

    def __init__(self, chat: ChatFormat, pairs: Sequence[Preference], batch_size: int,
                 generator=None):  # fmt: skip
        talks = [pair.messages for pair in pairs]
        self.rows = [[learnable(chat.example(talk)) for talk in pair] for pair in talks]
        self.reference = torch.zeros(len(pairs), 2)
        longer = [max(len(inputs) for inputs, _ in pair) for pair in self.rows]
        super().__init__(longer, batch_size, generator)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for places in self.places():
            yield self.batch(places)

    def batch(self, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs at these places."""
        rows = [self.rows[i][side] for side in (0, 1) for i in places]
        inputs, targets = zip(*rows, strict=True)
        return (
            pad_sequence(inputs, batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            self.reference[places].T.flatten(),
        )

    @torch.no_grad()
    def remember(
        self, model: GPT, low_precision: bool = False, adapters: bool = False
    ) -> "PreferenceBatches":
        """Computes the reference's log-probabilities, once: those of `model`, adapters off.

        adapters: leave them on, where they are part of the reference and learn on from there.
        """
        device = model.token_embedding.weight.device
        low = torch.autocast(device.type, torch.bfloat16, enabled=low_precision)
        off = has_lora(model) and not adapters
        before = adapters_off(model) if off else nullcontext()
        with evaluation_mode(model), before, low:
            for places in by_length(self.lengths, self.batch_size):
                inputs, targets, _ = (tensor.to(device) for tensor in self.batch(places))
                found = sequence_logprobs(model, inputs, targets).float().cpu()  # (2B,)
                self.reference[places] = found.view(2, -1).T
        return self


def preference_loss(
    model: GPT,
    inputs: Tensor,
    targets: Tensor,
    reference: Tensor,
    *,
    beta: float = 0.1,
    anchor: float = 0.0,
) -> Tensor:
    """`dpo_loss` of a batch of `PreferenceBatches`, () in nats per pair.

    DPO asks for a difference, and may find it by making both answers unlikely. anchor: how much
    the loss of the chosen answers counts beside it, in nats per token, so that they stay likely
    (Pang et al. 2024, "Iterative reasoning preference optimization", arXiv:2404.19733).
    """
    policy = sequence_logprobs(model, inputs, targets)  # (2B,)
    loss = dpo_loss(*policy.chunk(2), *reference.chunk(2), beta)
    if anchor:
        chosen, lengths = policy.chunk(2)[0], (targets != IGNORED).sum(1).chunk(2)[0]  # (B,)
        loss = loss - anchor * (chosen / lengths).mean()
    return loss


def train_dpo(
    model: GPT,
    tokenizer: BPETokenizer,
    pairs: Sequence[Preference],
    settings: TrainingSettings,
    *,
    beta: float = 0.1,
    batch_size: int = 4,
    validation: Sequence[Preference] = (),
    template: Template | str | None = None,
    seed: int = 0,
    progress: bool = True,
    report: Report = None,
) -> History:
    """Make preferred answers likelier than rejected ones, in place; returns what happened.

    The reference is the model as it comes, and where it has adapters, the model without them; its
    log-probabilities are computed once, so that no second copy is needed. Whatever is not frozen
    learns. With `validation` pairs the weights of the best look at them are kept.
    """
    chat, generator = ChatFormat(tokenizer, template), torch.Generator().manual_seed(seed)
    low = settings.dtype == "bfloat16"
    batches = PreferenceBatches(chat, pairs, batch_size, generator).remember(model, low)
    loss, look = partial(preference_loss, beta=beta), None
    if validation:
        held_out = PreferenceBatches(chat, validation, batch_size).remember(model, low)
        look = partial(evaluate_loss, batches=held_out, loss_fn=loss)
    return fit(model, batches, loss, settings, look=look, progress=progress, report=report)


@torch.no_grad()
def score_policy(model: nn.Module, batches: PreferenceBatches, beta: float = 0.1) -> PairScores:
    """How often the `implicit_rewards` of a policy agree with pairs whose reference is known."""
    device, found = next(model.parameters()).device, []
    with evaluation_mode(model):
        for batch in batches:
            inputs, targets, reference = (tensor.to(device) for tensor in batch)
            policy = sequence_logprobs(model, inputs, targets)
            found.append(implicit_rewards(policy, reference, beta).view(2, -1).cpu())
    return PairScores.of(*torch.cat(found, dim=1))
