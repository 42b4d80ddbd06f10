"""Names and shapes of foreign models, in both directions.

uv run pytest tests/test_families.py
"""

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from common.families import GGUF_GPT2, GGUF_LLAMA, GPT2, LLAMA, OURS
from common.gpt import GPT, PRESETS, GPTConfig


@pytest.mark.parametrize(
    ("layout", "name", "theirs"),
    [
        (GPT2, "token_embedding.weight", "wte.weight"),
        (GPT2, "blocks.11.attention.key.bias", "h.11.attn.c_attn.bias"),
        (LLAMA, "blocks.0.mlp.gate.weight", "layers.0.mlp.gate_proj.weight"),
        (LLAMA, "final_norm.weight", "norm.weight"),
        (LLAMA, "position_embedding.weight", None),
        (GGUF_LLAMA, "blocks.29.attention.output.weight", "blk.29.attn_output.weight"),
        (GGUF_GPT2, "blocks.2.attention.value.bias", "blk.2.attn_qkv.bias"),
        (OURS, "blocks.3.mlp.up.weight", "blocks.3.mlp.up.weight"),
    ],
)
def test_names(layout, name, theirs):
    assert layout.stored_name(name) == theirs


def test_our_own_layout_knows_every_parameter_of_every_preset():
    for config in (*PRESETS.values(), GPTConfig(tie_embeddings=False)):
        with torch.device("meta"):
            model = GPT(GPTConfig(**vars(config) | {"n_layers": 1, "vocab_size": 10}))
        for name, parameter in model.state_dict().items():
            assert OURS.stored_name(name) == name
            assert OURS.stored_shape(name, tuple(parameter.shape)) == tuple(parameter.shape)


def test_a_square_matrix_of_gpt2_is_transposed_though_its_shape_does_not_say_so():
    stored = torch.arange(16.0).view(4, 4)
    name = "blocks.0.attention.output.weight"
    torch.testing.assert_close(GPT2.convert(name, stored, head_dim=2), stored.T)
    torch.testing.assert_close(LLAMA.convert(name, stored, head_dim=2), stored)
    torch.testing.assert_close(GPT2.convert("token_embedding.weight", stored, 2), stored)


def test_fused_query_key_value_come_apart():
    stored = torch.arange(24.0).view(2, 12)  # (C, 3 C')
    parts = [
        GPT2.convert(f"blocks.0.attention.{part}.weight", stored, head_dim=4)
        for part in ("query", "key", "value")
    ]
    torch.testing.assert_close(torch.cat(parts), stored.T)
    assert all(part.is_contiguous() for part in parts)
    assert GPT2.stored_shape("blocks.0.attention.key.weight", (4, 2)) == (2, 12)
    assert GPT2.stored_shape("blocks.0.attention.key.bias", (4,)) == (12,)


def test_rotary_rows_of_two_heads_are_put_back():
    # llama.cpp stores rows 0, D/2, 1, D/2 + 1, … of every head.
    rows = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11.0])[:, None]
    for part in ("query", "key"):
        actual = GGUF_LLAMA.convert(f"blocks.0.attention.{part}.weight", rows, head_dim=6)
        torch.testing.assert_close(actual, torch.arange(12.0)[:, None])
    same = GGUF_LLAMA.convert("blocks.0.attention.value.weight", rows, head_dim=6)
    torch.testing.assert_close(same, rows)


@pytest.mark.parametrize("layout", [OURS, GPT2, GGUF_GPT2, LLAMA, GGUF_LLAMA])
def test_the_way_out_is_the_way_in_backwards(layout):
    rotary = layout in (LLAMA, GGUF_LLAMA)
    modern = {"norm": "rms", "mlp": "swiglu", "position": "rotary", "n_kv_heads": 2}
    config = GPTConfig(30, 8, d_model=24, n_layers=2, n_heads=4, d_ff=20, tie_embeddings=False)
    model = GPT(replace(config, **modern) if rotary else config)
    g = torch.Generator().manual_seed(0)
    weights = {k: torch.randn(x.shape, generator=g) for k, x in model.state_dict().items()}
    made = layout.made_of(reversed(weights))
    assert sorted(name for names in made.values() for name in names) == sorted(weights)
    for stored_name, names in made.items():
        parts = [weights[name] for name in names]
        stored = layout.to_stored(names[0], parts, config.head_dim)
        assert stored.is_contiguous()
        for name in names:
            assert stored_name.removeprefix(layout.prefix) == layout.stored_name(name)
            assert tuple(stored.shape) == layout.stored_shape(name, tuple(weights[name].shape))
            assert torch.equal(layout.convert(name, stored, config.head_dim), weights[name])


def test_full_names_are_those_of_transformers():
    config = {"vocab_size": 9, "n_layer": 1, "n_embd": 4, "n_head": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    ours = GPT(GPTConfig(9, 8, d_model=4, n_layers=1, n_heads=2, tie_embeddings=False))
    assert set(GPT2.made_of(ours.state_dict())) == set(gpt2.state_dict())
