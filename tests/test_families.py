"""Names, shapes and settings of foreign models.

uv run pytest tests/test_families.py
"""

import json

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from common.families import (
    GGUF_GPT2,
    GGUF_LLAMA,
    GPT2,
    LLAMA,
    OURS,
    gguf_config,
    gpt2_config,
    llama_config,
)
from common.gpt import GPT, PRESETS, GPTConfig

GGUF_TABLE = {
    "general.architecture": "llama",
    "llama.block_count": 30,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 100_000.0,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
}


def as_json(config) -> dict:
    return json.loads(config.to_json_string(use_diff=False))


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


def test_configurations_of_the_presets():
    assert gpt2_config(as_json(GPT2Config())) == PRESETS["gpt2-124m"]
    smollm2 = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    table = as_json(smollm2)
    assert llama_config(table) == PRESETS["smollm2-135m"]
    # Before version 5 of transformers
    table.pop("rope_parameters")
    assert llama_config(table | {"rope_theta": 100_000}) == PRESETS["smollm2-135m"]
    assert gguf_config(GGUF_TABLE, {"token_embd.weight": (49_152, 576)}) == PRESETS["smollm2-135m"]


def test_the_rarer_choices_of_llama():
    table = as_json(LlamaConfig(attention_bias=True, mlp_bias=True, num_key_value_heads=None))
    config = llama_config(table)
    assert config.bias
    assert not config.tie_embeddings
    assert config.n_kv_heads == config.n_heads == 32
    untied = gguf_config(GGUF_TABLE, {"token_embd.weight": (9, 576), "output.weight": (9, 576)})
    assert not untied.tie_embeddings


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": 7},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"model_type": "mistral"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"head_dim": 100},
        {"num_hidden_layers": 10**9},
        {"hidden_size": "4096"},
        {"hidden_size": True},
        {"vocab_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"num_key_value_heads": 5},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1},
        {"max_position_embeddings": [1]},
    ],
    ids=str,
)
def test_settings_of_llama_that_are_refused(change):
    with pytest.raises(ValueError, match=r"configuration|support|GPTConfig|rope") as caught:
        llama_config(as_json(LlamaConfig()) | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt_neo"},
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"n_embd": 10},
        {"n_layer": 0},
        {"n_positions": 2**40},
        {"layer_norm_epsilon": "small"},
    ],
    ids=str,
)
def test_settings_of_gpt2_that_are_refused(change):
    with pytest.raises(ValueError, match=r"configuration|support|GPTConfig") as caught:
        gpt2_config(as_json(GPT2Config()) | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"general.architecture": "qwen2"},
        {"general.architecture": None},
        {"llama.rope.dimension_count": 32},
        {"llama.attention.key_length": 128},
        {"llama.rope.scaling.type": "yarn"},
        {"llama.attention.head_count": np.array([9, 9])},
        {"llama.attention.head_count": "9"},
        {"llama.block_count": 2**63},
        {"llama.rope.freq_base": float("inf")},
        {"llama.embedding_length": None},
    ],
    ids=str,
)
def test_settings_of_gguf_that_are_refused(change):
    with pytest.raises(ValueError, match=r"configuration|support|GPTConfig") as caught:
        gguf_config(GGUF_TABLE | change, {"token_embd.weight": (49_152, 576)})
    assert "\n" not in str(caught.value)
