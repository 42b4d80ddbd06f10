"""The encoder-decoder reads everything, writes left to right, and learns to sort in seconds."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.transformer import DecoderLayer, EncoderLayer, Transformer, sinusoidal_positions

START = 10  # digits are 0 to 9


def digits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(vocab_size=11, d_model=32, n_heads=4, n_layers=2)


def test_positions_are_sines_and_cosines_from_fast_to_slow():
    table = sinusoidal_positions(50, 6)
    for position, column in ((0, 0), (7, 0), (7, 1), (49, 4), (49, 5)):
        angle = position / 10_000 ** (column // 2 * 2 / 6)
        expected = math.cos(angle) if column % 2 else math.sin(angle)
        assert table[position, column].item() == pytest.approx(expected, abs=1e-5)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even"):
        Transformer(11, d_model=33, n_heads=3)


@pytest.mark.parametrize("decoder", [False, True])
def test_layers_equal_pytorchs(decoder):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, "bias": True}
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    if decoder:
        ours, theirs = DecoderLayer(16, 4, 32), nn.TransformerDecoderLayer(16, 4, 32, **settings)
    else:
        ours, theirs = EncoderLayer(16, 4, 32), nn.TransformerEncoderLayer(16, 4, 32, **settings)
    nn.init.normal_(theirs.norm1.weight)
    nn.init.normal_(theirs.norm2.bias)
    copy_attention(theirs.self_attn, ours.attention)
    pairs = [(theirs.linear1, ours.feed_forward[0]), (theirs.linear2, ours.feed_forward[2])]
    pairs.append((theirs.norm1, ours.attention_norm))
    if decoder:
        copy_attention(theirs.multihead_attn, ours.cross_attention)
        pairs += [(theirs.norm2, ours.cross_attention_norm), (theirs.norm3, ours.feed_forward_norm)]
    else:
        pairs.append((theirs.norm2, ours.feed_forward_norm))
    for source, target in pairs:
        target.load_state_dict(source.state_dict())
    if decoder:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        assert_close(ours(x, memory), theirs(x, memory, tgt_mask=mask, tgt_is_causal=True))
    else:
        assert_close(ours(x), theirs(x))


def copy_attention(theirs: nn.MultiheadAttention, ours: nn.Module) -> None:
    """Ours has no biases there, and theirs start at 0."""
    parts = theirs.in_proj_weight.data.chunk(3)
    for projection, weight in zip((ours.query, ours.key, ours.value), parts, strict=True):
        projection.weight.data = weight
    ours.output.weight.data = theirs.out_proj.weight.data


def test_the_decoder_sees_no_future_and_all_of_the_source(model):
    source, target = digits(1, 6), digits(1, 8, seed=1)
    before = model(source, target)
    target[0, 5] = (target[0, 5] + 1) % 10
    changed = (model(source, target) - before).abs().amax(-1)[0] > 0
    assert changed.tolist() == 5 * [False] + 3 * [True]
    source[0, 5] = (source[0, 5] + 1) % 10
    assert ((model(source, target) - before).abs().amax(-1) > 0).all()


def test_the_order_of_the_source_matters(model):
    source, target, order = digits(1, 6), digits(1, 8, seed=1), torch.tensor([5, 0, 3, 1, 4, 2])
    assert (model(source[:, order], target) - model(source, target)).abs().max() > 1e-3
    memory = model.encode(source)  # (1, 6, 32)
    assert (model.encode(source[:, order]) - memory[:, order]).abs().max() > 1e-3


def test_every_parameter_gets_a_gradient(model):
    model(digits(2, 6), digits(2, 8)).square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_translate_takes_the_likeliest_token_each_time(model):
    source = digits(3, 5)
    written = model.translate(source, 4, START)
    assert written.shape == (3, 4)
    target = torch.cat((torch.full((3, 1), START), written), dim=1)
    assert torch.equal(model(source, target)[:, :-1].argmax(-1), written)


def test_it_learns_to_sort(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        source = digits(64, 5, seed=step)
        target = source.sort(dim=1).values
        shifted = torch.cat((torch.full((64, 1), START), target[:, :-1]), dim=1)
        loss = F.cross_entropy(model(source, shifted).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = digits(200, 5, seed=1_000)
    right = model.translate(unseen, 5, START) == unseen.sort(dim=1).values
    assert right.all(dim=1).float().mean() > 0.9
