"""How well a model predicts text it has not seen: loss, perplexity, bits per byte and character.

    evaluate_loss(model, batches, loss_fn, bytes_per_token=3.4)

A loss per token says little without the tokenizer: longer tokens are harder to predict, and fewer.
Bits per byte of the text can be compared between any two models.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, inf, log

import numpy as np
import torch
from torch import Tensor, nn

from common import distributed

IGNORED = -100  # a target that isn't one, as in `torch.nn.functional.cross_entropy`
LossFunction = Callable[..., Tensor]  # (model, *batch) -> ()


def power_law(points: dict[int, float]) -> tuple[float, float]:
    """A and α of L = A · N^(−α), through points {N: L}: a straight line on logarithmic axes.

    By least squares on the logarithms, as in Kaplan et al. 2020, "Scaling laws for neural language
    models". Raises ValueError for fewer than two points, and for what has no logarithm.
    """
    if len(points) < 2 or min(*points, *points.values()) <= 0:
        raise ValueError(f"a power law needs two points or more, all above 0, not {points}")
    slope, start = np.polyfit(np.log([*points]), np.log([*points.values()]), deg=1)
    return exp(start), -slope


@dataclass(frozen=True)
class Evaluation:
    """How well text is predicted that the model was not trained on."""

    loss: float  # nats per token
    perplexity: float  # of how many equally likely tokens it would be as unsure
    bits_per_byte: float | None = None  # comparable between tokenizers, unlike the two above
    bits_per_character: float | None = None

    @classmethod
    def of(
        cls,
        loss: float,
        bytes_per_token: float | None = None,
        characters_per_token: float | None = None,
    ) -> "Evaluation":
        """All figures from a loss in nats per token, and from how long a token is on average."""
        per_token = loss / log(2)
        return cls(
            loss,
            exp(loss) if loss < 700 else inf,
            bytes_per_token and per_token / bytes_per_token,
            characters_per_token and per_token / characters_per_token,
        )

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f}, perplexity {self.perplexity:.2f}"
        for name in ("bits_per_byte", "bits_per_character"):
            if (value := getattr(self, name)) is not None:
                text += f", {value:.4f} {name.replace('_', ' ')}"
        return text


def evaluate_loss(
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    bytes_per_token: float | None = None,
    characters_per_token: float | None = None,
) -> Evaluation:
    """The mean loss over all targets of `batches`, which must end; targets of -100 don't count.

    The last tensor of a batch are its targets. With the mean length of a token, also in bits per
    byte and per character. Ranks may each bring a part of the batches, but equally many.
    Raises ValueError where there is nothing to predict.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64)  # nats, targets
    with torch.no_grad(), evaluation_mode(model):
        for batch in batches:
            batch = [tensor.to(device) for tensor in batch]
            loss, count = loss_fn(model, *batch), (batch[-1] != IGNORED).sum()
            if count:
                sums += torch.stack([loss * count, count]).cpu().double()
    nats, count = distributed.total(sums).tolist()
    if not count:
        raise ValueError("nothing to evaluate: the batches hold no target")
    return Evaluation.of(nats / count, bytes_per_token, characters_per_token)


@contextmanager
def unchanged_chance(model: nn.Module) -> Iterator[None]:
    """Whatever is drawn inside, the training goes on as if it had not been."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def evaluation_mode(model: nn.Module, on: bool = True) -> Iterator[None]:
    """The model without dropout (or with it), and as it was again afterwards."""
    before = model.training
    model.train(not on)
    try:
        yield
    finally:
        model.train(before)
