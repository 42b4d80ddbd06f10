"""Attention, step by step: from weights without parameters to the attention of the model.

The steps of chapter 3, each a function or class that the next one uses:

    simple_self_attention        every token looks at every token, nothing is learned
    scaled_dot_product_weights   queries, keys, and the division by √D
    SelfAttention                learned query, key and value
    CausalAttention              no token sees the future
    StackedAttention             several heads, one after the other
    MultiHeadAttention           several heads at once, by a reshape; grouped queries, rotary
                                 positions, a cache: the one that `gpt` is made of

One vocabulary for the parameters everywhere: `query`, `key`, `value`, `output`. And for shapes:
B batch, T tokens (of the queries), S tokens (of the keys), C model width, H query heads, K
key/value heads, D head width, L layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def simple_self_attention(x: Tensor) -> Tensor:
    """Each token becomes an average of all, weighted by likeness. (..., T, C) -> (..., T, C)."""
    weights = (x @ x.mT).softmax(-1)  # (..., T, C) @ (..., C, T) -> (..., T, T)
    return weights @ x  # (..., T, T) @ (..., T, C) -> (..., T, C)


def causal_mask(n_queries: int, n_keys: int | None = None, device=None) -> Tensor:
    """True where a query may look: at itself and at what came before it. -> (T, S) of bool.

    The queries are the last `n_queries` of the `n_keys` tokens.
    """
    n_keys = n_queries if n_keys is None else n_keys
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return visible.tril(n_keys - n_queries)


def scaled_dot_product_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each query attends to each key; every row sums to 1.

    q (..., T, D), k (..., S, D), mask (..., T, S) of bool, True where a query may look
    -> (..., T, S).
    Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1.
    """
    scores = q @ k.mT / q.shape[-1] ** 0.5  # (..., T, D) @ (..., D, S) -> (..., T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1)


class SelfAttention(nn.Module):
    """One head with learned projections. (..., T, d_in) -> (..., T, d_out)."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False):
        super().__init__()
        self.query = nn.Linear(d_in, d_out, bias)
        self.key = nn.Linear(d_in, d_out, bias)
        self.value = nn.Linear(d_in, d_out, bias)

    def forward(self, x: Tensor) -> Tensor:
        weights = scaled_dot_product_weights(self.query(x), self.key(x))  # (..., T, T)
        return weights @ self.value(x)  # (..., T, T) @ (..., T, d_out) -> (..., T, d_out)


class CausalAttention(SelfAttention):
    """One head that sees no future; dropout on its weights. (..., T, d_in) -> (..., T, d_out)."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False, dropout: float = 0.0):
        super().__init__(d_in, d_out, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mask = causal_mask(x.shape[-2], device=x.device)  # (T, T)
        weights = scaled_dot_product_weights(self.query(x), self.key(x), mask)  # (..., T, T)
        return self.dropout(weights) @ self.value(x)  # (..., T, T) @ (..., T, d_out)


class StackedAttention(nn.Module):
    """Several causal heads, each with its own small matrices, computed one after the other.

    (..., T, C) -> (..., T, C). Slower than `MultiHeadAttention`, and equal to it with the heads'
    matrices on top of each other.
    """

    def __init__(self, d_model: int, n_heads: int, bias: bool = False, dropout: float = 0.0):
        super().__init__()
        head_dim = d_model // n_heads
        self.heads = nn.ModuleList(
            CausalAttention(d_model, head_dim, bias, dropout) for _ in range(n_heads)
        )
        self.output = nn.Linear(d_model, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        heads = [head(x) for head in self.heads]  # H x (..., T, D)
        return self.output(torch.cat(heads, dim=-1))  # (..., T, C)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    record: Callable[[Tensor], None] = lambda weights: None,
) -> Tensor:
    """`fused_attention`, written out. Hands its weights (B, H, T, S) to `record`."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)  # (B, K, S, D) -> (B, H, S, D)
    v = v.repeat_interleave(groups, dim=1)
    if causal:
        mask = causal_mask(q.shape[2], k.shape[2], q.device)  # (T, S)
    weights = scaled_dot_product_weights(q, k, mask)  # (B, H, T, S)
    record(weights)
    return F.dropout(weights, dropout) @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in one kernel that stores no (T, S) weights (Dao et al. 2022, arXiv:2205.14135).

    q (B, H, T, D); k, v (B, K, S, D), each key head serving H/K query heads (grouped queries,
    arXiv:2305.13245) -> (B, H, T, D). Either mask (..., T, S) of bool, or causal: the queries are
    the last T of the S tokens, and see no future.
    """
    (H, T), (K, S) = q.shape[1:3], k.shape[1:3]
    if causal and 1 < T < S:  # the kernel would take the queries for the first T tokens
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and T == S, dropout_p=dropout, enable_gqa=H != K
    )


class MultiHeadAttention(nn.Module):
    """All heads in one matrix product each for queries, keys and values, told apart by a reshape.

    (B, T, C) -> (B, T, C). With `n_kv_heads` < `n_heads`, groups of query heads share keys and
    values, which shrinks the cache. Raises ValueError if the heads don't divide evenly.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int | None = None, *,
        bias: bool = False, dropout: float = 0.0, causal: bool = True,
    ):  # fmt: skip
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads ({n_heads}) must divide d_model ({d_model}), "
                f"and n_kv_heads ({n_kv_heads}) must divide n_heads"
            )
        self.head_dim = d_model // n_heads
        self.causal = causal
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model, bias)
        self.key = nn.Linear(d_model, n_kv_heads * self.head_dim, bias)
        self.value = nn.Linear(d_model, n_kv_heads * self.head_dim, bias)
        self.output = nn.Linear(d_model, d_model, bias)
        self.attend = fused_attention

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        rotate: Callable[[Tensor], Tensor] = lambda heads: heads,
        mask: Tensor | None = None,
        cache: "LayerCache | None" = None,
    ) -> Tensor:
        """Attends from x (B, T, C) to itself, or to `memory` (B, S, C) if given.

        `rotate` gives queries and keys their positions, `mask` (..., T, S) replaces the causal
        mask, `cache` puts the keys and values of earlier tokens before those of x.
        """
        source = x if memory is None else memory
        split = (-1, self.head_dim)
        q = rotate(self.query(x).unflatten(-1, split)).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = rotate(self.key(source).unflatten(-1, split)).transpose(1, 2)  # (B, K, S, D)
        v = self.value(source).unflatten(-1, split).transpose(1, 2)  # (B, K, S, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, T, D) -> (B, K, S, D)
        causal, dropout = self.causal and mask is None, self.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, causal, dropout)
        return self.output(y.transpose(1, 2).flatten(2))  # (B, H, T, D) -> (B, T, C)


@contextmanager
def recorded_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the weights of every `MultiHeadAttention` in `model`, in the order they run.

    with recorded_attention(model) as maps:
        model(token_ids)
    maps[layer]  # (B, H, T, S)
    """
    maps: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, MultiHeadAttention)]
    before = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = partial(plain_attention, record=lambda w: maps.append(w.detach()))
    try:
        yield maps
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend


class LayerCache:
    """Keys and values of one layer, (B, K, capacity, D) each, filled up to `length`."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, K, T, D) behind the rest; returns all, (B, K, S, D), without a copy."""
        end, capacity = self.length + k.shape[2], self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens, and these would be {end}")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """What a decoder remembers of the tokens it has read: keys and values of every layer.

    Allocated once for `capacity` tokens; growing is writing into it. `padding` (B,) says how many
    tokens at the left of each row are fill, which no real token may look at. The caller makes it,
    passes it along with each call, and calls `reset()` to start anew.
    """

    def __init__(
        self, n_layers: int, batch_size: int, n_kv_heads: int, capacity: int, head_dim: int, *,
        padding: Tensor | None = None, device=None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        shape = (n_layers, 2, batch_size, n_kv_heads, capacity, head_dim)
        self.storage = torch.empty(shape, device=device, dtype=dtype)
        self.layers = [LayerCache(k.detach(), v.detach()) for k, v in self.storage]  # for autograd
        self.capacity = capacity
        self.reset(padding)

    @property
    def length(self) -> int:
        """Tokens remembered, padding included."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.storage.nbytes

    def reset(self, padding: Tensor | None = None) -> None:
        """Forgets everything and keeps the memory."""
        self.padding = padding if padding is not None and padding.any() else None
        for layer in self.layers:
            layer.length = 0

    def extend(self, n_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Room for `n_tokens` more, which the caller fills. ValueError when that is too many.

        Yields for each layer where new keys and values go, (2, B, K, T, D), and all keys and all
        values, (B, K, S, D), the new ones included.
        """
        start, end, capacity = self.length, self.length + n_tokens, self.capacity
        if end > capacity:
            raise ValueError(f"the cache has room for {capacity} tokens, and these would be {end}")
        for layer in self.layers:
            layer.length = end
        new, known = self.storage[..., start:end, :], self.storage[..., :end, :]
        return zip(new.unbind(), known[:, 0].unbind(), known[:, 1].unbind(), strict=True)

    def positions(self, n_tokens: int) -> Tensor:
        """Where the next `n_tokens` stand in their text: (T,), or (B, T) if rows are padded."""
        device = self.layers[0].keys.device
        positions = torch.arange(self.length, self.length + n_tokens, device=device)  # (T,)
        if self.padding is None:
            return positions
        return (positions - self.padding[:, None]).clamp(min=0)  # (T,) - (B, 1) -> (B, T)

    def mask(self, n_tokens: int) -> Tensor | None:
        """What the next `n_tokens` may look at, (B, 1, T, S), or None if no row is padded."""
        if self.padding is None:
            return None
        keys = torch.arange(self.length + n_tokens, device=self.padding.device)  # (S,)
        visible = causal_mask(n_tokens, len(keys), self.padding.device)  # (T, S)
        real = (keys >= self.padding[:, None])[:, None, None]  # (B, 1, 1, S)
        # A fill token sees itself: a softmax over nothing would be nan, and nan times 0 is nan.
        itself = keys == keys[self.length :, None]  # (T, S)
        return visible & (real | itself)  # (B, 1, T, S)
