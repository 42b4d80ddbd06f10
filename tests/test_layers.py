"""The layers equal their plain formulas, PyTorch's own, and the geometry they promise."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from common.layers import (
    GELUMLP,
    LayerNorm,
    LearnedPositions,
    NoPositions,
    RMSNorm,
    RotaryPositions,
    SwiGLU,
    gelu,
    layer_norm,
    rms_norm,
    rotate,
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Weights away from 1 and biases away from 0, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) + 1


def test_layer_norm_is_its_formula(x):
    norm = randomised(LayerNorm(8, eps=0.1))
    assert_close(norm(x), layer_norm(x, norm.weight, norm.bias, eps=0.1))


def test_a_new_layer_norm_gives_mean_0_and_variance_1(x):
    y = LayerNorm(8)(x)
    assert_close(y.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    assert_close(y.var(-1, correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)


def test_rms_norm_is_its_formula(x):
    norm = randomised(RMSNorm(8, eps=0.1))
    assert_close(norm(x), rms_norm(x, norm.weight, eps=0.1))


def test_a_new_rms_norm_gives_mean_square_1_and_keeps_directions(x):
    y = RMSNorm(8)(x)
    assert_close(y.square().mean(-1), torch.ones(2, 5), atol=1e-4, rtol=0)
    assert_close(F.cosine_similarity(x, y, dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_survive_a_constant_vector_by_eps(norm):
    assert norm(4)(torch.zeros(1, 4)).isfinite().all()


def test_gelu_is_gpt2s():
    x = torch.linspace(-5, 5, 101)
    assert_close(gelu(x), F.gelu(x, approximate="tanh"))


def test_gelu_mlp_is_its_formula(x):
    mlp = randomised(GELUMLP(8, 12))
    hidden = gelu(x @ mlp.up.weight.T + mlp.up.bias)  # (2, 5, 12)
    assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


def test_swiglu_is_its_formula(x):
    mlp = randomised(SwiGLU(8, 12))
    gate, up = x @ mlp.gate.weight.T, x @ mlp.up.weight.T  # (2, 5, 12) each
    assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down.weight.T)


@pytest.mark.parametrize(("mlp", "n_biases"), [(GELUMLP, 2), (SwiGLU, 3)])
def test_mlps_have_biases_only_if_asked(mlp, n_biases):
    def biases(module):
        return [name for name, _ in module.named_parameters() if name.endswith("bias")]

    assert len(biases(mlp(4, 8, bias=True))) == n_biases
    assert not biases(mlp(4, 8, bias=False))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(-500, 500))
def test_rotary_dot_products_depend_on_the_distance_alone(m, n, shift):
    m, n = m + 500, n + 500
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()
    positions = RotaryPositions(16)

    def turned(x, position):
        return positions.rotation(torch.tensor([position]), torch.float64)(x)

    here = (turned(q, m) * turned(k, n)).sum()
    there = (turned(q, m + shift) * turned(k, n + shift)).sum()
    assert_close(here, there, atol=1e-3, rtol=0)  # the angles themselves are fp32


def test_rotary_turns_pairs_half_a_vector_apart_counterclockwise():
    x = torch.tensor([1.0, 0, 0, 1])[None, None, None]  # the pairs (1, 0) and (0, 1)
    y = RotaryPositions(4, theta=100.0).rotation(torch.tensor([1]), x.dtype)(x)
    slow = 100**-0.5  # radians a token of the second pair
    expected = [math.cos(1), -math.sin(slow), math.sin(1), math.cos(slow)]
    assert_close(y.flatten(), torch.tensor(expected))


def test_rotary_is_the_one_of_llama():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2)
    reference = LlamaRotaryEmbedding(config)
    q = torch.randn(2, 7, 2, 16, generator=torch.Generator().manual_seed(0))  # (B, T, H, D)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 300, 4000]])
    cos, sin = reference(q, positions)
    expected, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    assert_close(RotaryPositions(16).rotation(positions, q.dtype)(q), expected.transpose(1, 2))


def test_rotation_keeps_lengths_and_dtype():
    x = torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    turn = RotaryPositions(8).rotation(torch.arange(9), torch.float32)
    assert_close(turn(x).norm(dim=-1), x.norm(dim=-1))
    half = RotaryPositions(8).rotation(torch.arange(9), torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_rotating_by_nothing_changes_nothing():
    x = torch.randn(1, 3, 2, 8)
    assert_close(rotate(x, torch.ones(3, 1, 8), torch.zeros(3, 1, 8)), x)


def test_learned_positions_add_the_row_of_each_position(x):
    positions = LearnedPositions(10, 8)
    assert_close(positions.embed(x, torch.arange(5)), x + positions.weight[:5])
    rows = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])  # the second row is padded
    assert_close(positions.embed(x, rows)[1, 3], x[1, 3] + positions.weight[1])
    assert positions.rotation(rows, x.dtype)(x) is x


def test_no_positions_leaves_everything_as_it_is(x):
    assert NoPositions().embed(x, torch.arange(5)) is x
    assert not list(NoPositions().parameters()) + list(RotaryPositions(8).parameters())
