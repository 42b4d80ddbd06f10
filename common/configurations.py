"""What the files of GPT-2 and of Llama call the settings of our `GPT`, inwards and outwards.

    gpt2_config, llama_config, gguf_config     what a file says -> GPTConfig
    gpt2_table, llama_table, gguf_table        GPTConfig -> what a file is to say

Files come from strangers: sizes are checked, and a setting that our model does not have is refused
rather than ignored. Outwards the same holds: a family can say a configuration if what it says is
read as that configuration again, and `family_of` finds out by doing so.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from common.gpt import GPTConfig

ABSURD = 1 << 27  # no vocabulary, context or width comes near it


# ------------------------------------------------------------------------------------------ inwards


class Settings:
    """Values out of a table that came with a file, each checked. Raises ValueError."""

    def __init__(self, table: dict, prefix: str = "") -> None:
        self.table, self.prefix = table, prefix

    def get(self, key: str, default=None):
        value = self.table.get(self.prefix + key)
        if value is None and default is None:
            raise ValueError(f"its configuration lacks '{self.prefix + key}'")
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < ABSURD:
            raise ValueError(f"its configuration has {key} = {str(value)[:40]}, which is absurd")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"its configuration has {key} = {str(value)[:40]}, which is absurd")
        return _short(value)

    def only(self, **supported) -> None:
        """Refuse settings that would change the result and that our GPT does not have."""
        for key, allowed in supported.items():
            value = self.table.get(self.prefix + key, allowed[0])
            if not any(type(value) is type(a) and value == a for a in allowed):
                raise ValueError(
                    f"it has {key} = {str(value)[:40]}, which this model doesn't support"
                )


def _short(value: float) -> float:
    """GGUF's 0.0000099999997 is 1e-5 in float32."""
    return float(np.float32(value).astype(str))


LLAMA_CHOICES = {"norm": "rms", "mlp": "swiglu", "position": "rotary"}


def gpt2_config(table: dict) -> GPTConfig:
    """From the config.json of a GPT-2 in Hugging Face's format."""
    settings = Settings(table)
    settings.only(
        model_type=["gpt2"],
        activation_function=["gelu_new", "gelu_pytorch_tanh"],
        scale_attn_weights=[True],
        scale_attn_by_inverse_layer_idx=[False],
        add_cross_attention=[False],
    )
    width = settings.size("n_embd")
    return GPTConfig(
        vocab_size=settings.size("vocab_size"),
        context_length=settings.size("n_positions"),
        d_model=width,
        n_layers=settings.size("n_layer"),
        n_heads=settings.size("n_head"),
        d_ff=settings.size("n_inner", 4 * width),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        tie_embeddings=settings.get("tie_word_embeddings", True) is True,
    )


def llama_config(table: dict) -> GPTConfig:
    """From the config.json of a Llama in Hugging Face's format."""
    settings = Settings(table)
    bias = settings.get("attention_bias", False) is True
    heads, width = settings.size("num_attention_heads"), settings.size("hidden_size")
    settings.only(
        model_type=["llama"],
        hidden_act=["silu"],
        mlp_bias=[bias],
        head_dim=[width // heads, None],
        rope_scaling=[None],
    )
    # Since version 5 of transformers the rotary settings are a table of their own.
    rope = settings.get("rope_parameters", table)
    if not isinstance(rope, dict):
        raise ValueError("its rope_parameters are not a table")
    Settings(rope).only(rope_type=["default"], partial_rotary_factor=[1.0])
    return GPTConfig(
        vocab_size=settings.size("vocab_size"),
        context_length=settings.size("max_position_embeddings", 2048),
        d_model=width,
        n_layers=settings.size("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=settings.size("num_key_value_heads", heads),
        d_ff=settings.size("intermediate_size"),
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        rope_theta=Settings(rope).number("rope_theta", 10_000.0),
        bias=bias,
        tie_embeddings=settings.get("tie_word_embeddings", False) is True,
        **LLAMA_CHOICES,
    )


def gguf_config(metadata: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> GPTConfig:
    """From the metadata of a GGUF file and the shapes of its tensors; "llama" and "gpt2" only."""
    settings = Settings(metadata)
    settings.only(**{"general.architecture": ["llama", "gpt2"]})
    settings.prefix = settings.get("general.architecture") + "."
    heads, width = settings.size("attention.head_count"), settings.size("embedding_length")
    same_head_dim = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    settings.only(**{key: [width // heads] for key in same_head_dim})
    settings.only(**{"rope.scaling.type": ["none"]})
    common = {
        "vocab_size": shapes.get("token_embd.weight", (1,))[0],
        "context_length": settings.size("context_length"),
        "d_model": width,
        "n_layers": settings.size("block_count"),
        "n_heads": heads,
        "d_ff": settings.size("feed_forward_length"),
        "tie_embeddings": "output.weight" not in shapes,
    }
    if settings.prefix == "gpt2.":
        return GPTConfig(norm_eps=settings.number("attention.layer_norm_epsilon"), **common)
    return GPTConfig(
        n_kv_heads=settings.size("attention.head_count_kv", heads),
        norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
        rope_theta=settings.number("rope.freq_base", 10_000.0),
        bias="blk.0.attn_q.bias" in shapes,
        **LLAMA_CHOICES,
        **common,
    )


# ----------------------------------------------------------------------------------------- outwards


def gpt2_table(config: GPTConfig) -> dict:
    """What the config.json of a GPT-2 says, in Hugging Face's format."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def llama_table(config: GPTConfig) -> dict:
    """What the config.json of a Llama says, in Hugging Face's format."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # A table of its own since version 5 of transformers, which understands the old form too.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": config.dropout,
    }


def gguf_table(config: GPTConfig, family: str) -> dict:
    """What the metadata of a GGUF file says of the model; `family` is "gpt2" or "llama"."""
    table = {
        "context_length": config.context_length,
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.n_heads,
        "vocab_size": config.vocab_size,
    }
    if family == "gpt2":
        table["attention.layer_norm_epsilon"] = config.norm_eps
    else:
        table["attention.head_count_kv"] = config.n_kv_heads
        table["attention.layer_norm_rms_epsilon"] = config.norm_eps
        table["rope.dimension_count"] = config.head_dim
        table["rope.freq_base"] = float(config.rope_theta)
    return {f"{family}.{key}": value for key, value in table.items()}


FAMILIES = {
    "gpt2": ("GPT-2", gpt2_table, gpt2_config),
    "llama": ("Llama", llama_table, llama_config),
}


def family_of(config: GPTConfig) -> str:
    """The family whose files can say `config`, but for the dropout: "gpt2" or "llama".

    Raises ValueError for a mixture that is neither, and says what each of them would lose.
    """
    wanted = replace(
        config,
        dropout=0.0,
        norm_eps=_short(config.norm_eps),
        rope_theta=_short(config.rope_theta),
    )
    lost = []
    for family, (title, write, read) in FAMILIES.items():
        try:
            said = asdict(read(write(config)))
        except ValueError as why:
            lost.append(f"{title}: {why}")
            continue
        if config.position != "rotary":
            said["rope_theta"] = wanted.rope_theta  # which then means nothing
        other = [f"{key}={value!r}" for key, value in asdict(wanted).items() if said[key] != value]
        if not other:
            return family
        lost.append(f"{title} has no {', '.join(other)}")
    raise ValueError(f"its mixture belongs to no family that others know: {'; '.join(lost)}")
