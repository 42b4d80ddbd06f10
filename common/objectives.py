"""What is predicted: the next token, hidden ones, what follows a prefix, spans that were cut out.

    inputs, targets, mask = span_corruption(ids, sentinel_ids=range(4000, 4096))  # from ids (B, T)
    loss = objective_loss(model, inputs, targets, mask)  # -> ()

Every objective takes token ids (B, T), its own settings by keyword, and a `generator` for its
chance (None: PyTorch's own). It returns an `Example`, which says what the model reads, what it
should say at each place (-100: nothing), and where a token may look. So one loop trains one model
on any of them; `functools.partial(masked, mask_id=3)` fixes the settings.
B batch, T tokens, C model width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.attention import causal_mask
from common.losses import IGNORED, Loss, cross_entropy, linear_cross_entropy


class Example(NamedTuple):
    """What an objective asks of a model, after S tokens."""

    inputs: Tensor  # (B, S) of token ids
    targets: Tensor  # (B, S) of token ids, -100 where nothing is predicted
    mask: Tensor | None = None  # (..., S, S) of bool, True where a token may look; None: causal


def objective_loss(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    mask: Tensor | None = None,
    *,
    loss: Loss = cross_entropy,
) -> Tensor:
    """The loss of a `GPT` on an `Example`, () in nats: `objective_loss(model, *example)`."""
    return loss(model.head(model.hidden(inputs, mask=mask)), targets)  # of (B, S, V), (B, S)


def next_token_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, mask: Tensor | None = None
) -> Tensor:
    """`objective_loss` with the cross-entropy, in chunks: it never holds all the logits.

    Equal to `F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())`, with its gradients.
    """
    hidden = model.hidden(inputs, mask=mask).flatten(0, 1)  # (B, S, C) -> (N, C)
    return linear_cross_entropy(hidden, model.head.weight, targets.flatten())


def causal(ids: Tensor, *, generator: torch.Generator | None = None) -> Example:
    """Each token from those before it. (B, T) -> S = T - 1. GPT: Radford et al. 2018."""
    return Example(ids[:, :-1], ids[:, 1:])


def masked(
    ids: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = 0.15,
    generator: torch.Generator | None = None,
) -> Example:
    """Hidden tokens from both sides. (B, T) -> S = T.

    In each row a share `rate` of the tokens is to be predicted. Of those, 80% are replaced by
    `mask_id`, 10% by a random id below `vocab_size`, and 10% are left, so that the model can't
    rely on seeing what is wanted (BERT: Devlin et al. 2019, arXiv:1810.04805, section 3.1).
    """
    T = ids.shape[1]
    order = torch.rand(ids.shape, generator=generator, device=ids.device).argsort(-1)
    chosen = order < _at_least_one(rate, T)  # (B, T), as many in every row
    fate = torch.rand(ids.shape, generator=generator, device=ids.device)
    noise = torch.randint(vocab_size, ids.shape, generator=generator, device=ids.device)
    inputs = ids.masked_fill(chosen & (fate < 0.8), mask_id)
    inputs = torch.where(chosen & (fate >= 0.9), noise, inputs)
    everywhere = torch.ones(T, T, dtype=torch.bool, device=ids.device)
    return Example(inputs, ids.masked_fill(~chosen, IGNORED), everywhere)


def prefix(
    ids: Tensor, *, length: int | None = None, generator: torch.Generator | None = None
) -> Example:
    """The rest of a text after a prefix, whose tokens all see each other. (B, T) -> S = T - 1.

    length: of the prefix, in tokens; None draws one for each row, between 1 and T - 1.
    Prefix LM: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """
    B, T = ids.shape
    if not 0 < (1 if length is None else length) < T:
        raise ValueError(f"a prefix of {length} in {T} tokens: it and the rest need one at least")
    if length is None:
        lengths = torch.randint(1, T, (B,), generator=generator, device=ids.device)
    else:
        lengths = torch.full((B,), length, device=ids.device)
    return _after_prefix(ids, lengths)


def span_corruption(
    ids: Tensor,
    *,
    sentinel_ids: Sequence[int],
    rate: float = 0.15,
    mean_length: float = 3.0,
    generator: torch.Generator | None = None,
) -> Example:
    """Spans that were cut out, one after the other. (B, T) -> S = T + 2 * spans.

    A share `rate` of the tokens is cut out, in spans of `mean_length` on average; each leaves one
    of the `sentinel_ids` in its place. Then follow the spans, each after its sentinel, and a last
    sentinel as the end. T5 (Raffel et al. 2020, arXiv:1910.10683, sections 3.1.4 and 3.3.4) has an
    encoder for the first half; here one decoder reads both, and the first half sees all of itself.
    Raises ValueError for too few sentinels, and for a text too short to cut anything out.
    """
    B, T = ids.shape
    n_cut = _at_least_one(rate, T)
    n_spans = max(1, round(n_cut / mean_length))
    if T - n_cut < n_spans - 1 or n_cut >= T:
        raise ValueError(f"{T} tokens are too few to cut out {n_cut} of them in {n_spans} spans")
    if len(sentinel_ids) <= n_spans:
        raise ValueError(f"{n_spans} spans need {n_spans + 1} sentinels, not {len(sentinel_ids)}")
    rows = [_cut_spans(row, n_cut, n_spans, list(sentinel_ids), generator) for row in ids]
    lengths = torch.full((B,), T - n_cut + n_spans, device=ids.device)
    return _after_prefix(torch.stack(rows), lengths)


def _at_least_one(rate: float, n_tokens: int) -> int:
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}: it is the share of tokens to predict, between 0 and 1")
    return max(1, round(rate * n_tokens))


def _after_prefix(ids: Tensor, lengths: Tensor) -> Example:
    """Predict ids (B, T) from place `lengths` (B,) on; what is before sees all of itself."""
    place = torch.arange(ids.shape[1] - 1, device=ids.device)
    known = place < lengths[:, None]  # (B, S)
    targets = ids[:, 1:].masked_fill(place < lengths[:, None] - 1, IGNORED)
    mask = causal_mask(len(place), device=ids.device) | known[:, None, :]  # (B, S, S)
    return Example(ids[:, :-1], targets, mask[:, None])  # (B, 1, S, S): the same for all heads


def _cut_spans(
    row: Tensor,
    n_cut: int,
    n_spans: int,
    sentinels: list[int],
    generator: torch.Generator | None,
) -> Tensor:
    """One text with sentinels for spans, then the spans: (T,) -> (T + 2 * n_spans + 1,)."""
    kept = _random_lengths(len(row) - n_cut + 2, n_spans + 1, generator, row.device)
    kept[[0, -1]] -= 1  # at the ends there may be nothing
    cut = _random_lengths(n_cut, n_spans, generator, row.device)
    sizes = [0] * (2 * n_spans + 1)
    sizes[::2], sizes[1::2] = kept.tolist(), cut.tolist()
    pieces, signs = row.split(sizes), row.new_tensor(sentinels[: n_spans + 1]).split(1)
    text = [x for pair in zip(pieces[::2], signs, strict=True) for x in pair]
    spans = [x for pair in zip(signs, pieces[1::2], strict=False) for x in pair]
    return torch.cat([*text[:-1], *spans, signs[-1]])


def _random_lengths(
    total: int, n: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """`n` lengths of 1 or more that add up to `total`, all such ways equally likely: (n,)."""
    between = torch.randperm(total - 1, generator=generator, device=device)[: n - 1] + 1
    ends = between.sort().values
    zero, end = ends.new_tensor([0]), ends.new_tensor([total])
    return torch.cat([zero, ends, end]).diff()
