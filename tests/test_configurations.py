"""What foreign models call their settings, in both directions.

uv run pytest tests/test_configurations.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig

from common.configurations import (
    FAMILIES,
    family_of,
    gguf_config,
    gguf_table,
    gpt2_config,
    llama_config,
)
from common.gpt import PRESETS, GPTConfig

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


# ----------------------------------------------------------------------------------------- outwards

LLAMA = {"norm": "rms", "mlp": "swiglu", "position": "rotary", "bias": False}
TINY = GPTConfig(40, 16, d_model=24, n_layers=2, n_heads=4)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        *(
            (preset, "llama" if preset.position == "rotary" else "gpt2")
            for preset in PRESETS.values()
        ),
        (replace(TINY, d_ff=10, norm_eps=1e-3, tie_embeddings=False), "gpt2"),
        (replace(TINY, **LLAMA, n_kv_heads=2, rope_theta=500.0, norm_eps=1e-6), "llama"),
        (replace(TINY, **LLAMA | {"bias": True}, tie_embeddings=False), "llama"),
        (replace(TINY, rope_theta=77.0), "gpt2"),  # which nothing uses without rotary positions
        (replace(TINY, dropout=0.1), "gpt2"),
        (replace(TINY, norm_eps=0.1 + 0.2), "gpt2"),  # 0.30000000000000004, in float32 0.3
    ],
)
def test_a_family_says_a_configuration_so_that_it_is_read_again(config, family):
    assert family_of(config) == family
    _, write, read = FAMILIES[family]
    plain = replace(config, dropout=0.0)
    if config.position != "rotary":
        plain = replace(plain, rope_theta=10_000.0)
    shapes = {"token_embd.weight": (config.vocab_size, config.d_model)}
    shapes |= {} if config.tie_embeddings else {"output.weight": ()}
    shapes |= {"blk.0.attn_q.bias": ()} if config.bias else {}
    metadata = gguf_table(config, family) | {"general.architecture": family}
    for again in (read(json.loads(json.dumps(write(config)))), gguf_config(metadata, shapes)):
        assert again.norm_eps == pytest.approx(plain.norm_eps, rel=1e-7)
        assert replace(again, norm_eps=plain.norm_eps) == plain


def test_transformers_reads_what_we_say():
    smollm2 = LlamaConfig(**FAMILIES["llama"][1](PRESETS["smollm2-135m"]))
    assert smollm2.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert (smollm2.head_dim, smollm2.num_key_value_heads, smollm2.rms_norm_eps) == (64, 3, 1e-5)
    gpt2 = GPT2Config(**FAMILIES["gpt2"][1](replace(TINY, dropout=0.1)))
    assert (gpt2.n_inner, gpt2.resid_pdrop, gpt2.attn_pdrop, gpt2.embd_pdrop) == (96, 0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"position": "rotary"}, "GPT-2 has no position='rotary'"),
        ({"bias": False}, "GPT-2 has no bias=False"),
        ({"n_kv_heads": 2}, "GPT-2 has no n_kv_heads=2"),
        (LLAMA | {"norm": "layer"}, "Llama has no norm='layer'"),
        ({"causal": False}, "GPT-2 has no causal=False"),
        ({"position": "none"}, "Llama has no norm='layer', mlp='gelu', position='none'"),
        ({"d_model": 36, "bias": False}, "Llama: impossible GPTConfig: rotary positions"),
    ],
    ids=str,
)
def test_mixtures_that_no_family_can_say(change, reason):
    with pytest.raises(ValueError, match="belongs to no family that others know") as caught:
        family_of(replace(TINY, **{"d_ff": 96} | change))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
