"""The transformer of 2017: an encoder that reads, a decoder that writes and looks back at it.

Attention Is All You Need, Vaswani et al. 2017, arXiv:1706.03762. Chapter 4 starts here, and drops
the encoder, the cross-attention and the fixed positions on its way to `gpt`.

    model = Transformer(vocab_size=12, d_model=64, n_heads=4, n_layers=2)
    logits = model(source, target)  # (B, S), (B, T) -> (B, T, V)
    model.translate(source, max_new_tokens=10, start_id=10)  # (B, 10), greedy

B batch, S source tokens, T target tokens, C model width, F feed-forward width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from common.attention import MultiHeadAttention


def sinusoidal_positions(n_tokens: int, d_model: int, device=None) -> Tensor:
    """A fixed vector for each position: sines and cosines from fast to slow. -> (T, C).

    Section 3.5 of the paper; sines in the even columns, cosines in the odd ones. C must be even.
    """
    positions = torch.arange(n_tokens, device=device)[:, None]  # (T, 1)
    exponents = torch.arange(0, d_model, 2, device=device) / d_model  # (C/2,)
    angles = positions * 10_000.0**-exponents  # (T, 1) * (C/2,) -> (T, C/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (T, C/2, 2) -> (T, C)


class FeedForward(nn.Sequential):
    """Widen, cut off below zero, narrow. (..., C) -> (..., F) -> (..., C)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


class EncoderLayer(nn.Module):
    """Self-attention to all tokens, then feed-forward; each added, then normalised. (B, S, C)."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.attention = MultiHeadAttention(d_model, n_heads, dropout=dropout, causal=False)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class DecoderLayer(EncoderLayer):
    """An encoder layer whose attention is causal, and which looks at the encoder's output between.

    x (B, T, C), memory (B, S, C) -> (B, T, C).
    """

    def __init__(self, d_model: int, n_heads: int, d_ff: int, dropout: float = 0.0):
        super().__init__(d_model, n_heads, d_ff, dropout)
        self.attention.causal = True
        self.cross_attention = MultiHeadAttention(d_model, n_heads, dropout=dropout, causal=False)
        self.cross_attention_norm = nn.LayerNorm(d_model)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x)))
        looked_up = self.cross_attention(
            x, memory=memory
        )  # queries of x, keys and values of memory
        x = self.cross_attention_norm(x + self.dropout(looked_up))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Transformer(nn.Module):
    """Encoder and decoder over one vocabulary. source (B, S), target (B, T) -> logits (B, T, V).

    Embeddings are shared between encoder, decoder and head, and scaled by √C (section 3.4). All
    sources of a batch are equally long. Raises ValueError for an odd width.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 2,
        d_ff: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if d_model % 2:
            raise ValueError(
                f"d_model is {d_model}: sines and cosines come in pairs, it must be even"
            )
        settings = d_model, n_heads, d_ff or 4 * d_model, dropout
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*settings) for _ in range(n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(*settings) for _ in range(n_layers))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decode(target, self.encode(source))

    def encode(self, source: Tensor) -> Tensor:
        """What the encoder makes of the source: (B, S) -> (B, S, C)."""
        x = self.embed(source)
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(self, target: Tensor, memory: Tensor) -> Tensor:
        """Logits of what follows each target token: (B, T), (B, S, C) -> (B, T, V)."""
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return x @ self.embedding.weight.T  # (B, T, C) @ (C, V) -> (B, T, V)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        T, C = token_ids.shape[1], self.embedding.embedding_dim
        positions = sinusoidal_positions(T, C, token_ids.device)  # (T, C)
        return self.dropout(self.embedding(token_ids) * C**0.5 + positions)

    @torch.no_grad()
    def translate(self, source: Tensor, max_new_tokens: int, start_id: int) -> Tensor:
        """The likeliest target, token by token: (B, S) -> (B, max_new_tokens).

        The source is read once, the target anew for each token: `generation` does better.
        """
        memory = self.encode(source)
        target = torch.full_like(source[:, :1], start_id)  # (B, 1)
        for _ in range(max_new_tokens):
            token = self.decode(target, memory)[:, -1].argmax(-1, keepdim=True)  # (B, 1)
            target = torch.cat((target, token), dim=1)
        return target[:, 1:]
