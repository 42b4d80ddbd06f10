"""What a transformer is made of besides attention: normalisation, MLPs, positions.

Where PyTorch has a fused kernel, the class calls it, and the plain formula stands beside it as a
function; the tests hold the two equal. B batch, T tokens, C model width, H query heads, D head
width, F feed-forward width.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Each vector of x (..., C) shifted to mean 0 and scaled to variance 1, then weight * x + bias.

    Layer Normalization, Ba et al. 2016, arXiv:1607.06450. The variance divides by C, not C - 1.
    """
    mean = x.mean(-1, keepdim=True)  # (..., 1)
    variance = x.var(-1, keepdim=True, correction=0)  # (..., 1)
    return weight * (x - mean) / torch.sqrt(variance + eps) + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Each vector of x (..., C) divided by its root mean square, then weight * x: no mean, no bias.

    Root Mean Square Layer Normalization, Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    return weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def gelu(x: Tensor) -> Tensor:
    """GELU, in the tanh approximation of GPT-2. Hendrycks and Gimpel 2016, arXiv:1606.08415."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class LayerNorm(nn.Module):
    """`layer_norm` with a learned weight and bias. (..., C) -> (..., C)."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight. (..., C) -> (..., C)."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class GELUMLP(nn.Module):
    """GPT-2's feed-forward network: widen, bend, narrow. (..., C) -> (..., F) -> (..., C)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias)
        self.down = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Llama's feed-forward network: one projection opens or closes the gate for the other.

    (..., C) -> (..., F) -> (..., C), with silu(g) = g * sigmoid(g). GLU Variants Improve
    Transformer, Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias)
        self.up = nn.Linear(d_model, d_ff, bias)
        self.down = nn.Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary_angles(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """The angle by which each pair of numbers is turned at each position, in radians, fp32.

    positions (..., T) of integers -> (..., T, D/2). Pair i turns by theta^(-2i/D) a token: the
    first pair by a whole radian, the last so slowly that it tells far from near.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (D/2,)
    speeds = 1 / theta**exponents  # (D/2,) radians a token
    return positions[..., None].float() * speeds  # (..., T, 1) * (D/2,) -> (..., T, D/2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of a head's vector by its angle.

    x (B, T, H, D); cos, sin (..., T, 1, D) -> (B, T, H, D). For each pair (a, b), `sin` holds -sin
    at a and sin at b: the turned pair is (a cos - b sin, b cos + a sin). The dot product of two
    turned vectors depends on their positions only by the difference. RoFormer, Su et al. 2021,
    arXiv:2104.09864; the pairs lie half a vector apart, as in Llama.
    """
    other_of_pair = x.roll(x.shape[-1] // 2, dims=-1)  # (B, T, H, D), the halves swapped
    return x * cos + other_of_pair * sin


class NoPositions(nn.Module):
    """Tells the model nothing about positions: the base of the two classes that do.

    A model asks twice: `embed` adds to the embeddings, `rotation` gives the function that
    attention applies to queries and keys. positions: (T,), or (B, T) where rows are padded.
    """

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return x

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """A function (B, T, H, D) -> (B, T, H, D), with tables in `dtype`."""
        return lambda heads: heads


class LearnedPositions(NoPositions):
    """A learned vector for each position, added to the token's, as in GPT-2."""

    def __init__(self, context_length: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(context_length, d_model))

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.weight[positions]  # (B, T, C) + (T, C) or (B, T, C)


class RotaryPositions(NoPositions):
    """Queries and keys turned by their position, as in Llama. No parameters, no stored table."""

    def __init__(self, head_dim: int, theta: float = 10_000.0):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        angles = rotary_angles(positions, self.head_dim, self.theta)  # (T, D/2) or (B, T, D/2)
        angles = angles[..., None, :]  # (..., T, 1, D/2): the same for all heads
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return partial(rotate, cos=torch.cat((cos, cos), -1), sin=torch.cat((-sin, sin), -1))
