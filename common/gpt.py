"""One decoder that is GPT-2 or a modern LLM, by configuration; and the accounting of what it costs.

    model = GPT(PRESETS["gpt2-124m"])
    logits = model(token_ids)  # (B, T) -> (B, T, V)

Parameters, by the names of `state_dict()` (each appears once: a tied head has none of its own):

    token_embedding.weight                  (V, C)
    position_embedding.weight               (context_length, C)   position="learned"
    blocks.N.attention_norm.weight, .bias   (C,)                  no bias with norm="rms"
    blocks.N.attention.query.weight, .bias  (C, C), (C,)          no bias with bias=False,
    blocks.N.attention.key.weight, .bias    (K D, C), (K D,)      here and in all linear layers
    blocks.N.attention.value.weight, .bias  (K D, C), (K D,)
    blocks.N.attention.output.weight, .bias (C, C), (C,)
    blocks.N.mlp_norm.weight, .bias         (C,)
    blocks.N.mlp.gate.weight, .bias         (F, C), (F,)          mlp="swiglu" only
    blocks.N.mlp.up.weight, .bias           (F, C), (F,)
    blocks.N.mlp.down.weight, .bias         (C, F), (C,)
    final_norm.weight, .bias                (C,)
    head.weight                             (V, C)                tie_embeddings=False only

B batch, T tokens, C model width, H query heads, K key/value heads, D head width, F feed-forward
width, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.attention import KVCache, LayerCache, MultiHeadAttention
from common.layers import (
    GELUMLP,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    RMSNorm,
    RotaryPositions,
    SwiGLU,
)

SIZES = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff")
NORMS = {"layer": LayerNorm, "rms": RMSNorm}
MLPS = {"gelu": GELUMLP, "swiglu": SwiGLU}
POSITIONS = {
    "learned": lambda config: LearnedPositions(config.context_length, config.d_model),
    "rotary": lambda config: RotaryPositions(config.head_dim, config.rope_theta),
    "none": lambda config: NoPositions(),
}


@dataclass(frozen=True)
class GPTConfig:
    """Every choice that makes one decoder different from another; the defaults are GPT-2's.

    `dataclasses.replace(config, norm="rms")` makes a variation; what None stood for has been filled
    in by then, and stays. Raises ValueError when the choices don't fit together.
    """

    vocab_size: int = 50_257
    context_length: int = 1024
    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int | None = None  # None: as many as n_heads
    d_ff: int | None = None  # None: 4 * d_model
    norm: str = "layer"  # "layer" or "rms"
    norm_eps: float = 1e-5
    mlp: str = "gelu"  # "gelu" or "swiglu"
    position: str = "learned"  # "learned", "rotary" or "none"
    rope_theta: float = 10_000.0  # the base of the rotary angles
    bias: bool = True  # in the linear layers of attention and MLP
    tie_embeddings: bool = True  # the head is the transposed token embedding
    causal: bool = True  # False: every token sees every token, as in BERT
    dropout: float = 0.0

    def __post_init__(self):
        # A frozen dataclass can still fill in its own blanks, before anyone has seen it.
        for blank, value in (("n_kv_heads", self.n_heads), ("d_ff", 4 * self.d_model)):
            if getattr(self, blank) is None:
                object.__setattr__(self, blank, value)
        for problem, found in self._problems():
            if found:
                raise ValueError(f"impossible GPTConfig: {problem}")

    def _problems(self):
        for name in SIZES:
            size = getattr(self, name)
            whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
            yield f"{name} is {size!r}, it must be a whole number above 0", not whole
        C, H, K = self.d_model, self.n_heads, self.n_kv_heads
        yield f"d_model {C} is not divisible by n_heads {H}", C % H
        yield f"n_heads {H} is not divisible by n_kv_heads {K}", H % K
        for name, known in (("norm", NORMS), ("mlp", MLPS), ("position", POSITIONS)):
            value = getattr(self, name)
            yield f"{name} is {value!r}, it must be one of {', '.join(known)}", value not in known
        odd = self.position == "rotary" and self.head_dim % 2
        yield f"rotary positions turn pairs, and the head width {C}/{H} is odd", odd
        yield f"dropout is {self.dropout}, it must be in [0, 1)", not 0 <= self.dropout < 1
        yield f"norm_eps is {self.norm_eps}, it must be above 0", not self.norm_eps > 0
        yield f"rope_theta is {self.rope_theta}, it must be above 0", not self.rope_theta > 0

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.d_model // self.n_heads


LLAMA_PARTS = {"norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False}
PRESETS = {
    # The course's own, for a laptop's CPU; those with Llama's parts learn much faster.
    "tiny": GPTConfig(4096, 256, d_model=128, n_layers=4, n_heads=4),  # 1.4M parameters
    "small": GPTConfig(4096, 256, d_model=256, n_layers=6, n_heads=8),  # 5.9M
    "medium": GPTConfig(4096, 256, d_model=384, n_layers=6, n_heads=6),  # 12M
    "large": GPTConfig(4096, 256, d_model=512, n_layers=10, n_heads=8),  # 34M
    "tiny-llama": GPTConfig(4096, 256, 128, 4, n_heads=4, d_ff=344, **LLAMA_PARTS),  # 1.3M
    "small-llama": GPTConfig(4096, 256, 256, 6, n_heads=8, d_ff=688, **LLAMA_PARTS),  # 5.8M
    # Language Models are Unsupervised Multitask Learners, Radford et al. 2019.
    "gpt2-124m": GPTConfig(),
    "gpt2-355m": GPTConfig(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-774m": GPTConfig(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-1558m": GPTConfig(d_model=1600, n_layers=48, n_heads=25),
    # SmolLM2, Allal et al. 2025, arXiv:2502.02737: the architecture of Llama.
    "smollm2-135m": GPTConfig(
        vocab_size=49_152, context_length=8192, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3,
        d_ff=1536, rope_theta=100_000.0, **LLAMA_PARTS,
    ),
}  # fmt: skip


class Block(nn.Module):
    """Attention, then MLP, each of a normalised copy and added back. (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.d_model
        self.attention_norm = NORMS[config.norm](C, config.norm_eps)
        self.attention = MultiHeadAttention(
            C, config.n_heads, config.n_kv_heads,
            bias=config.bias, dropout=config.dropout, causal=config.causal,
        )  # fmt: skip
        self.mlp_norm = NORMS[config.norm](C, config.norm_eps)
        self.mlp = MLPS[config.mlp](C, config.d_ff, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotate: Callable[[Tensor], Tensor],
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotate=rotate, mask=mask, cache=cache)
        x = x + self.dropout(attended)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class TiedHead(nn.Module):
    """Logits by the token embedding itself (Press and Wolf 2017, arXiv:1608.05859)."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.shared = (embedding,)  # a tuple hides it from PyTorch, or it would be listed twice

    @property
    def weight(self) -> nn.Parameter:
        return self.shared[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)  # (..., C) @ (C, V) -> (..., V)


class GPT(nn.Module):
    """A decoder-only transformer: `GPT(config)(token_ids, cache=None) -> logits`.

    token_ids (B, T) are integers below V, logits (B, T, V). With a `cache` (see `new_cache`),
    token_ids are those after what the cache has seen. Raises ValueError beyond the context.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config.d_model, config.norm_eps)
        if config.tie_embeddings:
            self.head = TiedHead(self.token_embedding)
        else:
            self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise()

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.head(self.hidden(token_ids, cache))  # (B, T, C) -> (B, T, V)

    def hidden(
        self, token_ids: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (B, T) -> (B, T, C), for those who don't need all the logits.

        `mask` (..., T, S) of bool, True where a token may look, replaces the model's own.
        """
        T = token_ids.shape[1]
        start = cache.length if cache else 0
        if start + T > self.config.context_length:
            raise ValueError(
                f"{start + T} tokens are more than this model's context of "
                f"{self.config.context_length}: pass the last ones only"
            )
        layers = cache.layers if cache else [None] * len(self.blocks)
        positions = cache.positions(T) if cache else torch.arange(T, device=token_ids.device)
        if cache and mask is None:
            mask = cache.mask(T)
        x = self.position_embedding.embed(self.token_embedding(token_ids), positions)  # (B, T, C)
        x = self.dropout(x)
        rotate = self.position_embedding.rotation(positions, x.dtype)
        for block, layer in zip(self.blocks, layers, strict=True):
            x = block(x, rotate, mask, layer)
        return self.final_norm(x)

    def new_cache(
        self, batch_size: int, capacity: int | None = None, padding: Tensor | None = None
    ) -> KVCache:
        """An empty cache for `capacity` tokens (default: the context), of the model's dtype.

        `padding` (B,): how many tokens at the left of each row are fill.
        """
        config, weight = self.config, self.token_embedding.weight
        if not config.causal:
            raise ValueError("a model whose tokens see the future has no past to cache")
        capacity = min(capacity or config.context_length, config.context_length)
        return KVCache(
            config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim,
            padding=padding, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip

    @torch.no_grad()
    def initialise(self) -> None:
        """Random weights of spread 0.02, biases 0, as in GPT-2 (Radford et al. 2019, section 2.3).

        What is added to the residual stream is scaled by 1/√(2L), as 2L additions would swell it.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif parameter.dim() == 2:  # the norms' weights stay 1
                added = name.endswith(("attention.output.weight", "mlp.down.weight"))
                scale = (2 * self.config.n_layers) ** -0.5 if added else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)


def count_parameters(config: GPTConfig) -> dict[str, int]:
    """How many parameters each part of `GPT(config)` has; their sum is the size of the model."""
    C, F, L, V = config.d_model, config.d_ff, config.n_layers, config.vocab_size
    KD = config.n_kv_heads * config.head_dim
    gates = config.mlp == "swiglu"
    norm = C * (2 if config.norm == "layer" else 1)
    return {
        "token_embedding": V * C,
        "position_embedding": config.context_length * C * (config.position == "learned"),
        "attention": L * (2 * C * C + 2 * C * KD + config.bias * (2 * C + 2 * KD)),
        "mlp": L * ((2 + gates) * C * F + config.bias * ((1 + gates) * F + C)),
        "norms": (2 * L + 1) * norm,
        "head": V * C * (not config.tie_embeddings),
    }


def flops_per_token(config: GPTConfig, n_tokens: int, training: bool = False) -> int:
    """Floating-point operations of the matrix products, per token of a text of `n_tokens`.

    2 for each weight a token is multiplied with; in each layer, 4 n_tokens C for the scores and the
    averages, as if the kernel didn't skip the future. Training costs three forward passes.
    """
    matrices = count_parameters(replace(config, bias=False, tie_embeddings=False))
    weights = matrices["attention"] + matrices["mlp"] + matrices["head"]
    forward = 2 * weights + 4 * config.n_layers * n_tokens * config.d_model
    return forward * (3 if training else 1)


def activation_bytes(config: GPTConfig, batch_size: int, n_tokens: int, itemsize: int = 4) -> int:
    """What a forward pass in training keeps for the backward pass, cross-entropy included.

    Without dropout. The V log-probabilities of each token outweigh everything in a small model.
    """
    C, F, L, V = config.d_model, config.d_ff, config.n_layers, config.vocab_size
    KD = config.n_kv_heads * config.head_dim
    norm = C + 2 if config.norm == "layer" else 2 * C + 1  # input, (input scaled,) statistics
    attention = 3 * C + 2 * KD + config.n_heads  # input, q, result; k, v; the softmax's sums
    mlp = C + (2 if config.mlp == "gelu" else 4) * F  # input; what is made on the way down
    per_token = (2 * L + 1) * norm + L * (attention + mlp) + C + V
    return batch_size * n_tokens * per_token * itemsize


def cache_bytes(config: GPTConfig, batch_size: int, n_tokens: int, itemsize: int = 4) -> int:
    """What the keys and values of `n_tokens` take: the reason for grouped queries."""
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return batch_size * n_tokens * per_token * itemsize
