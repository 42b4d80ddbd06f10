"""What all fine-tuning shares: rows of like length together, which weights learn, the best look.

    for places in by_length([len(row) for row in rows], 16, generator):
        batch = pad_sequence([rows[i] for i in places], batch_first=True)
    train_only(classifier, ["blocks.29.*", "final_norm.*"])
    history = fit(classifier, batches, loss_fn, settings, look=look)

A batch is as long as its longest row. Drawn at random, a third to a half of it is filling, which
costs as much as text; rows of similar length together leave a few percent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common.evaluation import Evaluation, LossFunction
from common.history import History
from common.training import TrainingSettings, train

BLUR = 0.5  # of lengths that are sorted, by default


def by_length(
    lengths: Sequence[int],
    batch_size: int,
    generator: torch.Generator | None = None,
    blur: float = BLUR,
) -> list[list[int]]:
    """Places of rows, batch by batch: similar lengths together, every place once.

    With a generator the batches, and who meets in them, differ at every call: lengths are sorted
    after each is multiplied by a random factor from 1 to 1 + `blur`, and the batches shuffled.
    Without, the longest come first. The more rows there are, the less blur it takes.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be above 0")
    sizes = torch.tensor(lengths, dtype=torch.float)
    if generator:
        sizes *= 1 + blur * torch.rand(len(sizes), generator=generator)
    order = sizes.argsort(descending=True).tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if generator is None:
        return batches
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """How much of batches of places is filling, from 0 to 1."""
    batches = list(batches)
    filled = sum(len(places) * max(lengths[i] for i in places) for places in batches)
    return 1 - sum(lengths[i] for places in batches for i in places) / filled


class LengthBatches:
    """Batches of (x, lengths, targets), rows of similar length together: little filling.

    x is (B, T) of ids or (B, T, C) of states, filled up at the right. Each pass over them is one
    epoch; `generator` as in `by_length`.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        targets: Iterable[int],
        batch_size: int,
        generator: torch.Generator | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be above 0")
        self.rows, self.targets = rows, torch.tensor(list(targets), dtype=torch.long)
        self.batch_size, self.generator = batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        lengths = [len(row) for row in self.rows]
        for places in by_length(lengths, self.batch_size, self.generator):
            x = pad_sequence([self.rows[i] for i in places], batch_first=True)
            yield x, torch.tensor([lengths[i] for i in places]), self.targets[places]


# ------------------------------------------------------------------------------ which weights learn


def train_only(model: nn.Module, patterns: Iterable[str] = ()) -> nn.Module:
    """Freeze `model.gpt`, but for parameters whose names match a pattern; its head always learns.

    Patterns are those of file names: "blocks.29.*", "final_norm.*", "*.lora_?", "*".
    Raises ValueError for a pattern that no parameter matches.
    """
    names = dict(model.gpt.named_parameters())
    model.gpt.requires_grad_(False)
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"no parameter is called '{pattern}': they are like {', '.join(list(names)[:3])}"
            )
        for name in matching:
            names[name].requires_grad_(True)
    return model


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------ the best look


class KeepBest:
    """`evaluate` for `train`: remembers the trained weights of the lowest validation loss.

    look: what finds the loss of a model, such as a partial `evaluate_loss`
    """

    def __init__(self, look: Callable[[nn.Module], Evaluation]):
        self.look, self.loss, self.weights = look, float("inf"), {}

    def __call__(self, model: nn.Module) -> Evaluation:
        found = self.look(model)
        if found.loss < self.loss:
            self.loss = found.loss
            self.weights = {n: p.detach().clone() for n, p in trained_parameters(model).items()}
        return found

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put them back."""
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(self.weights[name])


def fit(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    settings: TrainingSettings,
    *,
    look: Callable[[nn.Module], Evaluation] | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> History:
    """`train`, and where there is a `look`, the weights of the best one are kept.

    That is early stopping which never stops too early. The model is in evaluation mode afterwards.
    """
    keep = KeepBest(look) if look else None
    history = train(
        model, batches, loss_fn, settings, evaluate=keep, progress=progress, report=report
    )
    if keep:
        keep.restore(model)
    model.eval()
    return history
