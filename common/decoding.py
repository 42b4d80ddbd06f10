"""A copy of a model that only writes: the same function, in fewer and larger operations.

    writer = FusedGPT(model)
    generate(writer, prompt, 100)

For every new token each matrix is read once, to be multiplied by one vector, and reading is what
takes time. While a matrix streams by, the processor forgets the rest, even the code of the small
operations between two products, so each of those takes several times as long as in a loop of its
own. There should be few, and what can be computed before the text is known is computed here, once:

    queries, keys and values   one product instead of three; gate and up one instead of two
    the weight of a norm       goes into the matrix behind it
    the eps of an RMSNorm      is one more entry of the vector, so that its length contains it
    rotated pairs              become neighbours: complex numbers, turned by one multiplication
    residual connections       are what the product behind them starts to add to

B batch, T tokens, S tokens with those of the cache, N = B T, C model width, E = C + 1 with RMSNorm
and else C, H query heads, K key/value heads, D head width, F feed-forward width.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import KVCache, fused_attention
from common.gpt import GPT, Block
from common.layers import rotary_angles


class Product:
    """x (..., n) -> weight x + bias (..., m), for weight (m, n) and bias (m,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        # For a single vector, MKL reads a matrix at least as fast along its longer side.
        wide = weight.shape[0] > weight.shape[1]
        self.weight = weight.mT.contiguous().mT if wide else weight.contiguous()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def of_one(
        self, x: Tensor, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A single vector, (n,) -> (m,), added to `residual` (m,) if there is one."""
        start = self.bias
        if residual is not None:
            start = residual if start is None else residual + start
        if start is None:
            return torch.mv(self.weight, x, out=out)
        return torch.addmv(start, self.weight, x, out=out)


class FusedBlock(NamedTuple):
    """The four products of a block; `FusedGPT` has what lies between them."""

    query_key_value: Product  # E -> (H + 2 K) D
    output: Product  # C -> E
    up: Product  # E -> F, or 2 F with the gate first
    down: Product  # F -> E


class FusedGPT(nn.Module):
    """Writes what `model` would write, for `generate` and `stream`. float32; on CPUs it pays most.

    A copy: what the model learns later, it doesn't know, and it stays on the device on which it was
    made. Only the embeddings are shared, so once the model is let go there is one set of weights.
    Not for training: its results have no gradient. Raises ValueError for another dtype than
    float32, for a model with adapters, and for one that isn't causal.
    """

    new_cache = GPT.new_cache

    @torch.no_grad()
    def __init__(self, model: GPT):
        super().__init__()
        config, weight = model.config, model.token_embedding.weight
        if weight.dtype != torch.float32:
            raise ValueError(f"a FusedGPT is made from float32, and the model is {weight.dtype}")
        if any(type(m) is not nn.Linear for m in model.modules() if isinstance(m, nn.Linear)):
            raise ValueError("the model has adapters: put them into its weights first (merge_lora)")
        if not config.causal:
            raise ValueError("a model whose tokens see the future can't write one after the other")
        self.config = config
        self.gated, self.rotary = config.mlp == "swiglu", config.position == "rotary"
        self.rms, self.root = config.norm == "rms", config.d_model**0.5
        self.token_embedding = model.token_embedding
        self.position_embedding = model.position_embedding
        self.blocks = [self._fused(block) for block in model.blocks]
        final = model.final_norm
        self.final_weight = final.weight * self.root if self.rms else final.weight.clone()
        self.final_bias = None if self.rms else final.bias.clone()
        self.head = Product(model.head.weight.detach())
        # √(C eps): with it as one more entry, the length of x is √C times what RMSNorm divides by.
        self.eps_entry = weight.new_full((1, int(self.rms)), self.root * config.norm_eps**0.5)
        positions = torch.arange(config.context_length, device=weight.device)
        angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        self.turns = torch.polar(torch.ones_like(angles), angles)  # (context_length, D/2)
        self.eval()

    def _fused(self, block: Block) -> FusedBlock:
        attention, mlp = block.attention, block.mlp
        qk, v = [self._neighbours(p) for p in (attention.query, attention.key)], attention.value
        ups = (mlp.gate, mlp.up) if self.gated else (mlp.up,)
        return FusedBlock(
            self._behind_norm(block.attention_norm, [*qk, (v.weight, v.bias)]),
            self._to_residual(attention.output),
            self._behind_norm(block.mlp_norm, [(up.weight, up.bias) for up in ups]),
            self._to_residual(mlp.down),
        )

    def _neighbours(self, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; the rows of two numbers that are rotated together become neighbours."""
        if not self.rotary:
            return layer.weight, layer.bias

        def reorder(rows: Tensor) -> Tensor:
            halves = rows.unflatten(0, (-1, 2, self.config.head_dim // 2))  # (H, 2, D/2, ...)
            return halves.transpose(1, 2).reshape(rows.shape)

        return reorder(layer.weight), None if layer.bias is None else reorder(layer.bias)

    def _behind_norm(self, norm: nn.Module, layers: list[tuple]) -> Product:
        """All layers, (weight, bias) each, as one product of what the norm gives without weight."""
        weights, biases = zip(*layers, strict=True)
        weight = torch.cat(weights)  # (m, C)
        bias = None if biases[0] is None else torch.cat(biases)
        if self.rms:
            return Product(F.pad(weight * norm.weight * self.root, (0, 1)), bias)
        moved = weight @ norm.bias
        return Product(weight * norm.weight, moved if bias is None else moved + bias)

    def _to_residual(self, layer: nn.Linear) -> Product:
        """Its product; what it adds to the entry for eps is 0."""
        extra, bias = int(self.rms), layer.bias
        weight = F.pad(layer.weight, (0, 0, 0, extra)).clone()
        return Product(weight, None if bias is None else F.pad(bias, (0, extra)).clone())

    @torch.no_grad()
    def hidden(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """What the head reads, (B, T) -> (B, T, C). ValueError when the cache is full."""
        B, T = token_ids.shape
        positions, mask = cache.positions(T), cache.mask(T)
        x = self.token_embedding(token_ids)  # (B, T, C)
        x = self.position_embedding.embed(x, positions).flatten(0, 1)  # (N, C)
        x = torch.cat((x, self.eps_entry.expand(len(x), -1)), dim=1)  # (N, E)
        turn = self.turns[positions] if self.rotary else None  # (T, D/2) or (B, T, D/2)
        layers = zip(self.blocks, cache.extend(T), strict=True)
        if len(x) == 1 and mask is None:
            return self._one(x[0], turn, layers)[None, None]
        H, K, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        for block, (new, keys, values) in layers:
            heads = block.query_key_value(self._norm(x)).view(B, T, H + 2 * K, D)
            if turn is not None:
                pairs = heads[:, :, : H + K].unflatten(-1, (-1, 2))  # (B, T, H + K, D/2, 2)
                torch.view_as_complex(pairs).mul_(turn[..., None, :])
            q, kv = heads[:, :, :H].transpose(1, 2), heads[:, :, H:].unflatten(2, (2, K))
            new.copy_(kv.permute(2, 0, 3, 1, 4))  # (B, T, 2, K, D) -> (2, B, K, T, D)
            y = fused_attention(q, keys, values, mask, causal=mask is None)  # (B, H, T, D)
            x = block.output(y.transpose(1, 2).reshape(B * T, H * D)).add_(x)  # (N, E)
            x = block.down(self._bend(block.up(self._norm(x)))).add_(x)
        return self._last(x).view(B, T, -1)

    def _one(self, x: Tensor, turn: Tensor | None, layers: Iterable) -> Tensor:
        """One token of one text: each product is of one vector, nothing is hidden. (E,) -> (C,).

        The same steps as in `hidden`. All layers use the same memory for their results, and it is
        cut up once, before the loop; the query heads of a group are as if tokens of one head.
        """
        H, K, D = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        heads = x.new_empty((H + 2 * K) * D)
        qk, q, kv = heads[: (H + K) * D], heads[: H * D], heads[H * D :]
        pairs = torch.view_as_complex(qk.view(H + K, D // 2, 2)) if self.rotary else None
        q, kv = q.view(1, K, H // K, D), kv.view(2, 1, K, 1, D)
        width = self.config.d_ff
        wide = x.new_empty(width * (1 + self.gated))
        gate, up = wide[:width], wide[-width:]
        length = torch.linalg.vector_norm  # below, not `_norm`: a call and its arguments cost 1%
        for block, (new, keys, values) in layers:
            normal = x / length(x) if self.rms else self._norm(x)
            block.query_key_value.of_one(normal, out=heads)
            if pairs is not None:
                pairs.mul_(turn)
            new.copy_(kv)
            y = F.scaled_dot_product_attention(q, keys, values)  # (1, K, H/K, D)
            x = block.output.of_one(y.view(H * D), x)  # (E,)
            normal = x / length(x) if self.rms else self._norm(x)
            block.up.of_one(normal, out=wide)
            bent = F.silu(gate).mul_(up) if self.gated else self._bend(wide)  # (F,)
            x = block.down.of_one(bent, x)
        return self._last(x)

    def _norm(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E); its weight, and RMSNorm's √C, are in the matrix behind it."""
        if self.rms:
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return F.layer_norm(x, x.shape[-1:], eps=self.config.norm_eps)

    def _bend(self, x: Tensor) -> Tensor:
        """(..., F) -> (..., F), or (..., 2 F) -> (..., F)."""
        if not self.gated:
            return F.gelu(x, approximate="tanh")
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def _last(self, x: Tensor) -> Tensor:
        """The final norm with its weight, (..., E) -> (..., C)."""
        x = self._norm(x)[..., : self.config.d_model] * self.final_weight
        return x if self.rms else x + self.final_bias
