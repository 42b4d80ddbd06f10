"""A reward model: which answer people would prefer, as one number, learned from pairs.

    model = RewardModel(gpt, tokenizer)
    train_only(model, ["blocks.29.*", "final_norm.*"])       # or add_lora(gpt), or all of it
    train_reward_model(model, read_preferences(half="a"), settings)
    print(score_pairs(model, read_preferences(half="b")))    # accuracy 78.1% (71.5 to 83.5) …

It rests on the model of Bradley and Terry 1952: that a is preferred to b has the probability
sigmoid(reward of a - reward of b). Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022,
arXiv:2203.02155. B batch, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from common.chat_format import ChatFormat, Messages, Template
from common.evaluation import evaluate_loss
from common.fine_tuning import by_length, fit
from common.gpt import GPT
from common.history import History
from common.instruction import BLUR
from common.instruction_data import Preference, conversation
from common.metrics import wilson_interval
from common.pooled import PooledGPT, lower_states
from common.tokenizer import BPETokenizer
from common.training import TrainingSettings

Report = Callable[[str], None] | None


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How surprising it is that `chosen` was preferred: the mean of -log sigmoid of the difference.

    Rewards (B,), (B,) -> (), ln 2 where they are equal. Only differences count: adding the same to
    all rewards changes nothing.
    """
    return -F.logsigmoid(chosen - rejected).mean()


@dataclass(frozen=True)
class PairScores:
    """How often the chosen answer has the higher reward, and by how much on average."""

    n: int
    accuracy: float  # equal rewards count as half
    interval: tuple[float, float]  # 95%: Wilson 1927
    margin: float  # mean reward of the chosen, minus that of the rejected

    @classmethod
    def of(cls, chosen: Tensor, rejected: Tensor) -> "PairScores":
        """From rewards (N,) and (N,). Raises ValueError where there are none."""
        n = len(chosen)
        if not n:
            raise ValueError("there are no pairs to score")
        right = ((chosen > rejected).sum() + 0.5 * (chosen == rejected).sum()).item()
        margin = (chosen - rejected).mean().item()
        return cls(n, right / n, wilson_interval(round(right), n), margin)

    def __str__(self) -> str:
        low, high = self.interval
        figures = f"accuracy {self.accuracy:.1%} ({low:.1%} to {high:.1%}) of {self.n}"
        return f"{figures}, margin {self.margin:.3f}"


class RewardModel(PooledGPT):
    """How good an answer is, as one number read from its last token. A judge, too.

    Called with ids (B, T) and lengths (B,), or with `lower_states`: -> (B, 1). The head begins at
    zero: at first all answers are worth the same.
    """

    def __init__(self, gpt: GPT, tokenizer: BPETokenizer, template: Template | str | None = None):
        super().__init__(gpt, n_outputs=1)
        self.chat = ChatFormat(tokenizer, template)

    def encode(self, messages: Messages) -> Tensor:
        """Ids (T,) of a conversation, up to the token that ends its last answer.

        Raises ValueError for what does not end with an answer, or is longer than the context.
        """
        ids, learned = self.chat.example(messages)
        ids = ids[: len(ids) - learned[::-1].index(True)]
        return self._checked(ids)

    def rewards(self, conversations: Sequence[Messages], batch_size: int = 16) -> Tensor:
        """The reward of the last answer of each conversation, (N,)."""
        return self.outputs([self.encode(talk) for talk in conversations], batch_size)[:, 0]

    def rewards_of_ids(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Tensor:
        """The same for answers as a model wrote them, in ids, with their end where they have one.

        A reward function for `common.reinforcement`.
        """
        rows = [self._checked([*p, *r]) for p, r in zip(prompts, responses, strict=True)]
        return self.outputs(rows)[:, 0]

    def prefer(self, prompt: str, a: str, b: str) -> float:
        """How likely `a` is preferred to `b`, from 0 to 1. An empty answer is never preferred."""
        if not a.strip() or not b.strip():
            return 0.5 + 0.5 * (bool(a.strip()) - bool(b.strip()))
        first, second = self.rewards([conversation(prompt, a), conversation(prompt, b)])
        return torch.sigmoid(first - second).item()

    def _checked(self, ids: Sequence[int]) -> Tensor:
        longest = self.gpt.config.context_length
        if len(ids) > longest:
            raise ValueError(f"a conversation has {len(ids):,} tokens, the context {longest:,}")
        return torch.tensor(ids)


class PairBatches:
    """Places of pairs, by the length of the longer answer, a new order in every epoch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, generator=None):
        self.lengths, self.batch_size, self.generator = lengths, batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def places(self) -> list[list[int]]:
        return by_length(self.lengths, self.batch_size, self.generator, BLUR)


class RewardBatches(PairBatches):
    """Batches of (x, lengths) of 2B rows: first the chosen ones of B pairs, then the rejected."""

    def __init__(
        self, chosen: list[Tensor], rejected: list[Tensor], batch_size: int, generator=None
    ):
        longer = [max(map(len, pair)) for pair in zip(chosen, rejected, strict=True)]
        super().__init__(longer, batch_size, generator)
        self.chosen, self.rejected = chosen, rejected

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for places in self.places():
            rows = [side[i] for side in (self.chosen, self.rejected) for i in places]
            yield pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def reward_loss(model: RewardModel, x: Tensor, lengths: Tensor) -> Tensor:
    """The loss of a batch of `RewardBatches`, () in nats per pair."""
    return bradley_terry_loss(*model(x, lengths)[:, 0].float().chunk(2))


def train_reward_model(
    model: RewardModel,
    pairs: Sequence[Preference],
    settings: TrainingSettings,
    *,
    batch_size: int = 8,
    validation: Sequence[Preference] = (),
    seed: int = 0,
    progress: bool = True,
    report: Report = None,
) -> History:
    """Teach a model which answers people prefer, in place; returns what happened on the way.

    Whatever is not frozen learns, see `train_only` and `add_lora`; what lies below it is computed
    once. With `validation` pairs the weights of the best look at them are kept.
    """

    def batches(pairs: Sequence[Preference], generator=None) -> RewardBatches:
        talks = [talk for pair in pairs for talk in pair.messages]
        rows = lower_states(model, [model.encode(talk) for talk in talks])
        return RewardBatches(rows[::2], rows[1::2], batch_size, generator)

    look = None
    if validation:
        look = partial(evaluate_loss, batches=batches(validation), loss_fn=reward_loss)
    learned = batches(pairs, torch.Generator().manual_seed(seed))
    return fit(model, learned, reward_loss, settings, look=look, progress=progress, report=report)


def score_pairs(model: RewardModel, pairs: Sequence[Preference]) -> PairScores:
    """How often a reward model agrees with the pairs."""
    chosen, rejected = ([pair.messages[side] for pair in pairs] for side in (0, 1))
    return PairScores.of(model.rewards(chosen), model.rewards(rejected))
