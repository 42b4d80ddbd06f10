"""Each step of the staircase equals the one before it, and the last equals PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from common.attention import (
    CausalAttention,
    KVCache,
    MultiHeadAttention,
    SelfAttention,
    StackedAttention,
    causal_mask,
    fused_attention,
    plain_attention,
    recorded_attention,
    scaled_dot_product_weights,
    simple_self_attention,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_simple_self_attention_is_two_loops_and_a_softmax():
    x = randn(4, 3)
    for i, context in enumerate(simple_self_attention(x)):
        scores = torch.stack([x[i] @ x[j] for j in range(4)])
        assert_close(context, sum(w * x[j] for j, w in enumerate(scores.softmax(0))))


def test_weights_are_the_softmax_of_scaled_scores():
    q, k = randn(2, 3, 16, seed=1), randn(2, 5, 16, seed=2)
    weights = scaled_dot_product_weights(q, k)
    assert_close(weights[1, 2], torch.stack([q[1, 2] @ k[1, j] / 4 for j in range(5)]).softmax(0))
    assert_close(weights.sum(-1), torch.ones(2, 3))


def test_masked_weights_are_zero_and_the_rest_still_sums_to_1():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    weights = scaled_dot_product_weights(randn(2, 4), randn(3, 4, seed=1), mask)
    assert (weights[~mask] == 0).all()
    assert_close(weights.sum(-1), torch.ones(2))


def test_causal_mask_is_a_lower_triangle_that_ends_in_the_last_corner():
    assert causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_self_attention_is_its_formula():
    layer, x = SelfAttention(6, 4, bias=True), randn(5, 6)
    q, k, v = (x @ m.weight.T + m.bias for m in (layer.query, layer.key, layer.value))
    assert_close(layer(x), (q @ k.T / 2).softmax(-1) @ v)


def test_self_attention_doesnt_know_the_order():
    layer, x, order = SelfAttention(6, 4), randn(5, 6), torch.tensor([3, 1, 4, 0, 2])
    assert_close(layer(x[order]), layer(x)[order])


CAUSAL = {
    "one head": lambda: CausalAttention(8, 8),
    "stacked heads": lambda: StackedAttention(8, 2),
    "all heads": lambda: MultiHeadAttention(8, 2),
    "grouped": lambda: MultiHeadAttention(8, 4, 2),
}


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL.keys())
@given(change=st.integers(0, 6))
def test_no_token_sees_the_future(make, change):
    layer, x = make(), randn(1, 7, 8)
    before = layer(x)
    x[0, change] += 1
    changed = (layer(x) - before).abs().amax((0, 2)) > 1e-6  # (T,)
    assert changed.tolist() == [position >= change for position in range(7)]


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL.keys())
def test_every_parameter_gets_a_gradient(make):
    layer = make()
    layer(randn(2, 5, 8)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_heads_at_once_equal_heads_one_after_the_other():
    stacked, reshaped, x = (
        StackedAttention(12, 3, bias=True),
        MultiHeadAttention(12, 3, bias=True),
        randn(2, 5, 12),
    )
    for name in ("query", "key", "value"):
        heads = [getattr(head, name) for head in stacked.heads]
        getattr(reshaped, name).weight.data = torch.cat([head.weight for head in heads])
        getattr(reshaped, name).bias.data = torch.cat([head.bias for head in heads])
    reshaped.output.load_state_dict(stacked.output.state_dict())
    assert_close(reshaped(x), stacked(x))


def test_grouped_queries_equal_full_heads_with_shared_keys_and_values():
    grouped, full, x = MultiHeadAttention(16, 4, 2), MultiHeadAttention(16, 4), randn(2, 5, 16)
    full.query, full.output = grouped.query, grouped.output
    for name in ("key", "value"):
        by_head = getattr(grouped, name).weight.data.view(2, 4, 16)  # (K, D, C)
        getattr(full, name).weight.data = by_head.repeat_interleave(2, 0).flatten(0, 1)
    assert_close(grouped(x), full(x))


@pytest.mark.parametrize("causal", [True, False])
def test_multi_head_attention_equals_pytorchs(causal):
    ours = MultiHeadAttention(12, 3, bias=True, causal=causal)
    theirs, x = nn.MultiheadAttention(12, 3, batch_first=True), randn(2, 5, 12)
    projections = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([p.weight for p in projections])
    theirs.in_proj_bias.data = torch.cat([p.bias for p in projections])
    theirs.out_proj.load_state_dict(ours.output.state_dict())
    forbidden = ~causal_mask(5) if causal else None  # their masks say what is hidden
    assert_close(ours(x), theirs(x, x, x, attn_mask=forbidden)[0])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masking", ["none", "causal", "mask"])
def test_fused_attention_equals_the_formula_in_values_and_gradients(heads, masking):
    (H, K), T = heads, 6
    mask = (randn(2, 1, T, T) > 0) | torch.eye(T, dtype=torch.bool) if masking == "mask" else None
    results = []
    for attend in (fused_attention, plain_attention):
        q, k, v = (randn(2, n, T, 8, seed=n + i).requires_grad_() for i, n in enumerate((H, K, K)))
        y = attend(q, k, v, mask, masking == "causal")
        y.square().sum().backward()
        results.append((y, q.grad, k.grad, v.grad))
    for fused, plain in zip(*results, strict=True):
        assert_close(fused, plain)


def test_cross_attention_takes_keys_and_values_from_memory():
    layer, x, memory = (
        MultiHeadAttention(8, 2, causal=False),
        randn(1, 3, 8),
        randn(1, 6, 8, seed=1),
    )
    before = layer(x, memory=memory)
    assert before.shape == (1, 3, 8)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert_close(layer(x, memory=memory[:, order]), before)  # a set, not a sequence
    assert not torch.allclose(layer(x, memory=memory + 1), before)


def test_rotation_turns_queries_and_keys_and_leaves_values_alone():
    layer, x = MultiHeadAttention(8, 2), randn(1, 5, 8)
    assert_close(layer(x, rotate=lambda heads: -heads), layer(x))  # the two signs cancel
    uniform = layer(x, rotate=lambda heads: 0 * heads)  # all scores are 0
    averages = layer.value(x).cumsum(1) / torch.arange(1, 6)[:, None]  # (1, 5, 8)
    assert_close(uniform, layer.output(averages))


def test_dropout_acts_in_training_only():
    layer, x = MultiHeadAttention(8, 2, dropout=0.5), randn(1, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    head = CausalAttention(8, 8, dropout=0.5)
    assert not torch.equal(head(x), head(x))
    assert torch.equal(head.eval()(x), head(x))


def test_recorded_attention_shows_the_weights_that_were_used():
    layer, x = MultiHeadAttention(8, 4, 2), randn(2, 5, 8)
    with recorded_attention(layer) as maps:
        recorded = layer(x)
    assert_close(recorded, layer(x))
    assert len(maps) == 1  # the second call, outside, is not recorded
    assert maps[0].shape == (2, 4, 5, 5)
    assert_close(maps[0].sum(-1), torch.ones(2, 4, 5))
    assert (maps[0].triu(1) == 0).all()
    assert not maps[0].requires_grad


def test_recorded_attention_ends_even_after_an_error():
    layer = MultiHeadAttention(8, 2)
    with pytest.raises(RuntimeError), recorded_attention(layer):
        layer(randn(1, 3, 7))
    assert layer.attend is fused_attention


@pytest.mark.parametrize("heads", [(3, None), (4, 3)])
def test_heads_that_dont_divide_are_refused(heads):
    with pytest.raises(ValueError, match="must divide"):
        MultiHeadAttention(8, *heads)


def test_the_cache_grows_without_moving():
    cache = KVCache(n_layers=1, batch_size=2, n_kv_heads=3, capacity=8, head_dim=4)
    layer, k, v = cache.layers[0], randn(2, 3, 8, 4), randn(2, 3, 8, 4, seed=1)
    addresses = set()
    for start, end in ((0, 3), (3, 4), (4, 8)):
        keys, values = layer.append(k[:, :, start:end], v[:, :, start:end])
        addresses.add((keys.data_ptr(), values.data_ptr()))
        assert cache.length == end
        assert_close(keys, k[:, :, :end])
        assert_close(values, v[:, :, :end])
    assert len(addresses) == 1
    assert cache.nbytes == 2 * (2 * 3 * 8 * 4) * 4


def test_a_full_cache_says_so():
    cache = KVCache(1, 1, 1, capacity=4, head_dim=2)
    cache.layers[0].append(randn(1, 1, 3, 2), randn(1, 1, 3, 2))
    with pytest.raises(ValueError, match="room for 4 tokens"):
        cache.layers[0].append(randn(1, 1, 2, 2), randn(1, 1, 2, 2))
    assert cache.length == 3


def test_reset_forgets():
    cache = KVCache(1, 1, 1, capacity=4, head_dim=2, padding=torch.tensor([1]))
    cache.layers[0].append(randn(1, 1, 4, 2), randn(1, 1, 4, 2))
    cache.reset()
    assert cache.length == 0
    assert cache.padding is None


def test_cache_positions_and_masks_leave_the_padding_out():
    cache = KVCache(1, 2, 1, capacity=4, head_dim=2, padding=torch.tensor([0, 2]))
    assert cache.positions(4).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    full, padded = cache.mask(4)[:, 0].int().tolist()
    assert full == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    cache.layers[0].append(randn(2, 1, 3, 2), randn(2, 1, 3, 2))
    assert cache.positions(1).tolist() == [[3], [1]]
    assert cache.mask(1)[:, 0].int().tolist() == [[[1, 1, 1, 1]], [[0, 0, 1, 1]]]


def test_without_padding_no_mask_is_needed():
    cache = KVCache(1, 1, 1, capacity=8, head_dim=2, padding=torch.tensor([0]))
    assert cache.mask(4) is None
    cache.layers[0].append(randn(1, 1, 3, 2), randn(1, 1, 3, 2))
    assert cache.mask(2) is None


def test_attention_in_stretches_equals_attention_at_once():
    layer, x = MultiHeadAttention(8, 4, 2).eval(), randn(2, 7, 8)
    cache = KVCache(1, 2, 2, capacity=7, head_dim=2)
    pieces = [layer(piece, cache=cache.layers[0]) for piece in x.split([3, 1, 2, 1], dim=1)]
    assert_close(torch.cat(pieces, 1), layer(x))
