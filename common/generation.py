"""Text from a model, token by token: greedy or sampled, one prompt or many, whole or streaming.

    model = GPT(PRESETS["tiny"])
    generate(model, [[1, 2, 3]], max_new_tokens=20)  # (1, 23)
    for token in stream(model, [[1, 2, 3]], 20, temperature=0.8, top_p=0.9):  # (1,) each
        print(token.item())

Each token is predicted from the last `context_length` tokens of its own row, and from nothing else:
not from the padding that makes rows equally long, not from the other rows. The cache changes how
fast that goes, never what comes out. B batch, T tokens, C model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from common.gpt import GPT

Prompts = Tensor | Sequence[Sequence[int]]


def generate(
    model: GPT,
    token_ids: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Prompts and what the model writes after them, (B, T + new).

    model: a GPT, or its copy that only writes and is faster (`common.decoding`).
    token_ids: (B, T), or a list of lists; shorter ones are filled up at the left (with `eos_id`, or
    0). A row that has written `eos_id` goes on with nothing else, and when all have, generation
    ends. temperature: 0 takes the likeliest token; 1 samples as the model says; more is bolder.
    top_k, top_p: sample among the k likeliest, or among the fewest that together have probability
    top_p (Holtzman et al. 2019, arXiv:1904.09751). generator: the source of chance, on the model's
    device. use_cache=False computes everything anew for each token, to compare.
    Raises ValueError for an empty prompt and for settings out of range.
    """
    ids, _ = left_pad(token_ids, eos_id or 0, model.token_embedding.weight.device)
    tokens = stream(
        model,
        token_ids,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        generator=generator,
        use_cache=use_cache,
    )
    return torch.cat([ids, *(token[:, None] for token in tokens)], dim=1)


def stream(
    model: GPT,
    token_ids: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields the next token of every row, (B,), once it is known. Arguments as in `generate`."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it can't be negative")
    choose = sampler(temperature, top_k, top_p, generator)
    for step in decode(model, token_ids, max_new_tokens, choose, eos_id, use_cache):
        yield step.tokens


class Step(NamedTuple):
    """One token of every row, and what it was chosen from."""

    tokens: Tensor  # (B,)
    logits: Tensor  # (B, V)
    alive: Tensor  # (B,) of bool: the row had not ended before; else its token is only fill


@torch.inference_mode()
def decode(
    model: GPT,
    token_ids: Prompts,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[Step]:
    """The steps behind `stream`, for those who need to know more than the tokens."""
    ids, padding = left_pad(token_ids, eos_id or 0, model.token_embedding.weight.device)
    cache = model.new_cache(len(ids), ids.shape[1] + max_new_tokens - 1)  # the last is never read
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    written: list[Tensor] = []  # (B, 1) each, not yet part of ids
    training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if not use_cache or cache.length in (0, cache.capacity):  # nothing read yet, or full
                ids, written = torch.cat((ids, *written), dim=1), []
                unread = ids[:, -model.config.context_length :]
                cache.reset((padding - ids.shape[1] + unread.shape[1]).clamp(min=0))
            logits = model.head(model.hidden(unread, cache)[:, -1])  # (B, T, C) -> (B, V)
            token, alive = choose(logits), ~finished
            if eos_id is not None:
                token = token.masked_fill(finished, eos_id)
                finished |= token == eos_id
            yield Step(token, logits, alive)
            if eos_id is not None and finished.all():
                return
            unread = token[:, None]  # (B,) -> (B, 1)
            written.append(unread)
    finally:
        model.train(training)


def left_pad(
    prompts: Prompts, fill_id: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rows made equally long by filling at the left: ids (B, T), and how much was filled, (B,).

    At the left, so that all rows end, and go on, in the same column. Raises ValueError for an empty
    row.
    """
    rows = [torch.as_tensor(row, dtype=torch.long, device=device) for row in prompts]
    if not rows or any(row.dim() != 1 or not len(row) for row in rows):
        raise ValueError("prompts are a list of lists of token ids, each with at least one token")
    padding = torch.tensor([max(map(len, rows)) - len(row) for row in rows], device=device)
    filled = [
        F.pad(row, (int(fill), 0), value=fill_id) for row, fill in zip(rows, padding, strict=True)
    ]
    return torch.stack(filled), padding


def sampler(
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function that chooses tokens (B,) by their logits (B, V). Arguments as in `generate`."""
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be at least 0, top_k {top_k} at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must be above 0, and at most 1")
    if temperature == 0:
        return lambda logits: logits.argmax(-1)

    def choose(logits: Tensor) -> Tensor:
        logits = logits.float() / temperature
        if top_k is not None:
            logits = keep_top_k(logits, top_k)
        if top_p is not None:
            logits = keep_top_p(logits, top_p)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]  # (B, 1) -> (B,)

    return choose


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k largest logits of each row; the others become -inf. (B, V) -> (B, V)."""
    smallest_kept = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest largest logits that have probability p together; the others become -inf."""
    largest_first, order = logits.sort(descending=True)
    probabilities = largest_first.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # (B, V), of all that come before
    largest_first = largest_first.masked_fill(likelier >= p, float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, largest_first)  # back to the old order
