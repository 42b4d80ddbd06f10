"""Teaching a classifier: which weights are trained, for how long, from which messages.

    classifier = Classifier(*load_pretrained("smollm2-135m"), labels=("ham", "spam"))
    fine_tune(classifier, split.train, RECIPES["lora"], seed=0)
    print(score(classifier, split.test))

A recipe says how many of the last blocks learn. What lies below them is computed once per message,
not once per message and pass; a linear head on a frozen model learns in a second so. Whoever trains
several times on the same frozen blocks keeps their states: `fine_tune(…, memory=memory)`.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.classifier import Classifier
from common.evaluation import evaluate_loss
from common.fine_tuning import KeepBest, LengthBatches, fit, train_only
from common.history import History
from common.lora import add_lora
from common.messages import Message, check_labels
from common.metrics import Scores
from common.pooled import lower_states
from common.training import TrainingSettings

__all__ = [
    "RECIPES",
    "KeepBest",
    "Memory",
    "Recipe",
    "fine_tune",
    "frozen_states",
    "loss_of",
    "prepare",
    "score",
]

Memory = MutableMapping[str, Tensor]  # a text, and what the frozen blocks make of it


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. The head always is; `RECIPES` has one of each kind.

    n_blocks: how many of the last blocks are trained, with the final norm; None: everything.
              A model that has fewer trains all of them
    rank:     of adapters, which are trained in place of those blocks' weights; 0: none
    """

    n_blocks: int | None
    rank: int = 0
    alpha: float = 16.0
    learning_rate: float = 1e-3
    n_messages: int = 2048  # to look at in all, each several times over
    batch_size: int = 16
    weight_decay: float = 0.01
    dtype: str = "float32"  # of the matrix products: "bfloat16" is faster where the CPU has it

    def settings(self, n_labelled: int) -> TrainingSettings:
        """A tenth of the steps up, then down to a tenth: at least 2 passes, at most 20."""
        passes = min(max(self.n_messages / n_labelled, 2), 20)
        n_steps = max(round(passes * n_labelled / self.batch_size), 1)
        return TrainingSettings(
            n_steps=n_steps,
            learning_rate=self.learning_rate,
            warmup_steps=n_steps // 10,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.99),
            dtype=self.dtype,
            evaluate_every=-(-n_labelled // self.batch_size),
            stop_on_explosion=False,  # the loss of a batch of 16 may well triple
        )


RECIPES = {
    "head": Recipe(n_blocks=0, learning_rate=3e-3, n_messages=20_000),
    "last-block": Recipe(n_blocks=1, learning_rate=3e-4, n_messages=4096),
    "lora": Recipe(n_blocks=15, rank=8, n_messages=1536),
    "all": Recipe(n_blocks=None, learning_rate=5e-5, n_messages=1024),
}


def prepare(classifier: Classifier, recipe: Recipe, seed: int = 0) -> Classifier:
    """Freeze what the recipe leaves as it is, and add its adapters; returns the classifier."""
    gpt = classifier.gpt
    if recipe.n_blocks is None:
        return train_only(classifier, ["*"])
    first = max(len(gpt.blocks) - recipe.n_blocks, 0)
    if recipe.rank:
        train_only(classifier)
        generator = torch.Generator().manual_seed(seed)
        add_lora(gpt.blocks[first:], recipe.rank, recipe.alpha, generator=generator)
        return classifier
    blocks = [f"blocks.{i}.*" for i in range(first, len(gpt.blocks))]
    return train_only(classifier, [*blocks, "final_norm.*"] if blocks else [])


def fine_tune(
    classifier: Classifier,
    messages: Sequence[Message],
    recipe: Recipe = RECIPES["lora"],
    *,
    validation: Sequence[Message] = (),
    seed: int = 0,
    memory: Memory | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> History:
    """Train the classifier in place on labelled messages; returns what happened on the way.

    The frozen blocks are computed once, and their states used in every pass. With `validation`
    messages, a look at them after every pass, and the weights of the best look are kept: early
    stopping that never stops too early. memory: see `frozen_states`; progress and report: as in
    `train`. Raises ValueError for a label without messages, and for a label the classifier doesn't
    know.
    """
    check_labels(messages, classifier.labels)
    prepare(classifier, recipe, seed)
    generator = torch.Generator().manual_seed(seed)
    batches = _batches(classifier, messages, recipe.batch_size, generator, memory)
    look = None
    if validation:
        held_out = _batches(classifier, validation, recipe.batch_size, memory=memory)
        look = lambda classifier: evaluate_loss(classifier, held_out, loss_of)
    settings = recipe.settings(len(messages))
    return fit(classifier, batches, loss_of, settings, look=look, progress=progress, report=report)


def loss_of(classifier: Classifier, x: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of a batch of `LengthBatches`, () in nats."""
    return F.cross_entropy(classifier(x, lengths).float(), targets)


def score(
    classifier: Classifier, messages: Sequence[Message], memory: Memory | None = None
) -> Scores:
    """How good the classifier is on messages it has not seen. memory: see `frozen_states`."""
    check_labels(messages, classifier.labels)
    texts = [message.text for message in messages]
    rows = classifier.encode(texts) if memory is None else frozen_states(classifier, texts, memory)
    probabilities = classifier.probabilities(rows)
    return Scores.of([m.label for m in messages], probabilities.numpy(), classifier.labels)


def frozen_states(
    classifier: Classifier, texts: Sequence[str], memory: Memory | None = None
) -> list[Tensor]:
    """`lower_states` of texts. What `memory` holds isn't computed; what is computed goes there.

    A memory is for the same frozen blocks and the same pool: give it to no other classifier.
    """
    if memory is None:
        return lower_states(classifier, classifier.encode(texts))
    new = [text for text in dict.fromkeys(texts) if text not in memory]
    memory.update(zip(new, lower_states(classifier, classifier.encode(new)), strict=True))
    return [memory[text] for text in texts]


def _batches(
    classifier: Classifier,
    messages: Sequence[Message],
    batch_size: int,
    generator: torch.Generator | None = None,
    memory: Memory | None = None,
) -> LengthBatches:
    rows = frozen_states(classifier, [message.text for message in messages], memory)
    targets = [classifier.labels.index(message.label) for message in messages]
    return LengthBatches(rows, targets, batch_size, generator)
