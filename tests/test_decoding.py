"""The copy that only writes computes what the model does, for every kind of model and of text.

uv run pytest tests/test_decoding.py
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import CONTEXT, GPT2, LLAMA_LIKE, prompts, written_out
from test_gpt import LLAMA, TINY, VARIANTS, make, tokens
from torch.testing import assert_close

from common.decoding import FusedGPT, Product
from common.generation import generate
from common.lora import add_lora, merge_lora
from common.weights import load_pretrained

MODELS = {
    name: make(replace(config, dropout=0.0))
    for name, config in {
        **VARIANTS,
        "layer norm, no bias": replace(LLAMA, norm="layer"),
        "large eps": replace(LLAMA, norm_eps=0.5),
        "gelu, rotary, bias": replace(LLAMA, mlp="gelu", bias=True),
        "one head": replace(LLAMA, n_heads=1, n_kv_heads=1),
        "every head its own": replace(LLAMA, n_kv_heads=6),
    }.items()
}
WRITERS = {name: FusedGPT(model) for name, model in MODELS.items()}


def logits_by_pieces(writer: FusedGPT, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """(B, T, V), with the cache at every boundary of the pieces."""
    cache = writer.new_cache(len(ids))
    with torch.inference_mode():
        pieces = [writer.head(writer.hidden(piece, cache)) for piece in ids.split(lengths, dim=1)]
    return torch.cat(pieces, dim=1).clone()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("lengths", [[7], [1] * 7, [3, 1, 2, 1]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_model(name, lengths, batch):
    ids = tokens(batch, 7)
    with torch.no_grad():
        expected = MODELS[name](ids)
    assert expected.std() > 0.05  # or the tolerance would say little
    found = logits_by_pieces(WRITERS[name], ids, lengths)
    assert_close(found, expected, atol=1e-4, rtol=0)


@given(
    st.sampled_from([GPT2, LLAMA_LIKE]),
    st.lists(st.integers(1, CONTEXT + 4), min_size=1, max_size=4),
    st.integers(0, 12),
)
@settings(max_examples=25, deadline=None)
def test_ragged_prompts_come_out_as_if_alone(model, lengths, n):
    rows = prompts(*lengths)
    together = generate(FusedGPT(model), rows, n)
    for row, out in zip(rows, together.tolist(), strict=True):
        assert out[-(len(row) + n) :] == written_out(model, row, n)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_one_row_can_be_padded_too(name):
    writer, ids = WRITERS[name], tokens(1, 4)
    alone = logits_by_pieces(writer, ids, [3, 1])
    cache = writer.new_cache(1, padding=torch.tensor([2]))
    filled = torch.cat((torch.tensor([[96, 95]]), ids), dim=1)
    with torch.inference_mode():
        pieces = [writer.head(writer.hidden(p, cache)) for p in filled.split([5, 1], dim=1)]
    assert_close(torch.cat(pieces, dim=1)[:, 2:].clone(), alone, atol=1e-5, rtol=0)


def test_all_that_generate_can_do():
    writer, rows = FusedGPT(LLAMA_LIKE), prompts(4, 6)
    for options in ({"use_cache": False}, {"eos_id": 5}, {"temperature": 1.0, "top_k": 9}):
        mine, theirs = (
            generate(each, rows, 8, generator=torch.Generator().manual_seed(3), **options)
            for each in (writer, LLAMA_LIKE)
        )
        assert torch.equal(mine, theirs)
    assert not writer.training


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_product_of_one_is_that_of_many(shape, bias):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    product = Product(weight, torch.arange(shape[0]).float() if bias else None)
    x, residual = torch.randn(shape[1]), torch.randn(shape[0])
    expected = weight @ x + (torch.arange(shape[0]) if bias else 0)
    assert_close(product(x[None])[0], expected)
    assert_close(product.of_one(x), expected)
    assert_close(product.of_one(x, residual), expected + residual)
    longer = product.weight.stride().index(max(product.weight.stride()))
    assert product.weight.shape[longer] == min(shape), "read along the longer side"


def test_it_is_a_copy_that_shares_the_embeddings():
    model = make(LLAMA)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    writer, ids = FusedGPT(model), tokens(1, 5)
    expected = logits_by_pieces(writer, ids, [4, 1])
    assert_close(dict(model.state_dict()), before, atol=0, rtol=0)
    assert writer.token_embedding is model.token_embedding
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embedding" not in name:
                p.zero_()
    assert torch.equal(logits_by_pieces(writer, ids, [4, 1]), expected)


def test_adapters_are_merged_first():
    model = add_lora(make(LLAMA), rank=2, alpha=8)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(p)
    ids = tokens(1, 5)
    with torch.no_grad():
        expected = model(ids)
    with pytest.raises(ValueError, match=r"has adapters: .*merge_lora"):
        FusedGPT(model)
    found = logits_by_pieces(FusedGPT(merge_lora(model)), ids, [5])
    assert_close(found, expected, atol=1e-3, rtol=0)


def test_what_it_cannot_be_made_from():
    with pytest.raises(ValueError, match=r"from float32, and the model is torch\.bfloat16"):
        FusedGPT(make(TINY).bfloat16())
    with pytest.raises(ValueError, match="see the future"):
        FusedGPT(make(replace(TINY, causal=False)))


def test_a_full_cache_is_an_error_and_nothing_is_written():
    writer = WRITERS["llama"]
    cache = writer.new_cache(1, capacity=3)
    with torch.inference_mode():
        writer.hidden(tokens(1, 2), cache)
        with pytest.raises(ValueError, match="room for 3 tokens, and these would be 4"):
            writer.hidden(tokens(1, 2), cache)
    assert cache.length == 2
    assert cache.layers[-1].length == 2


def test_a_real_model_writes_the_same():
    model, tokenizer = load_pretrained("smollm2-135m")
    writer = FusedGPT(model)
    for text in ("Once upon a time", "The capital of France is", "def add(a, b):"):
        prompt = [tokenizer.encode(text)]
        written = generate(model, prompt, 64)
        assert torch.equal(generate(writer, prompt, 64), written)
    with torch.inference_mode():
        expected = model(written)
        lengths = [written.shape[1] - 8] + 8 * [1]
        found = logits_by_pieces(writer, written, lengths)
    assert_close(found, expected, atol=1e-3, rtol=0)
