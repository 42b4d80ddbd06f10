"""How the files of GPT-2 and of Llama call, shape and configure what in our `GPT` has one name.

A `Layout` translates names and shapes of parameters; `gpt2_config`, `llama_config` and
`gguf_config` translate settings. Files come from strangers: sizes are checked, and a setting that
our model does not have is refused rather than ignored.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.gpt import GPTConfig

ABSURD = 1 << 27  # no vocabulary, context or width comes near it
CONTIGUOUS = torch.contiguous_format
QKV = ("query", "key", "value")


# ------------------------------------------------------------------------------ names and layouts


@dataclass(frozen=True)
class Layout:
    """What a family of files calls our modules, and how it stores their weights."""

    names: dict[str, str]  # our name -> theirs; N stands for the number of the block
    prefix: str = ""  # that some files put before every name
    ignored: str = "(?!)"  # pattern of names that hold no weights; the default matches nothing
    transposed: bool = False  # the blocks' matrices are (in, out), not (out, in)
    interleaved: bool = False  # rotary pairs side by side, not half a head apart

    def stored_name(self, name: str) -> str | None:
        """blocks.3.mlp.up.weight -> what the file calls it; None if the family has none."""
        module, _, parameter = name.rpartition(".")
        number = re.search(r"\d+", module)
        theirs = self.names.get(module.replace(number[0], "N") if number else module)
        return theirs and f"{theirs.replace('N', number[0] if number else '')}.{parameter}"

    def stored_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter that is `shape` in our model."""
        if self._part(name) is not None:
            shape = (3 * shape[0], *shape[1:])
        return shape[::-1] if self._is_transposed(name) else shape

    def convert(self, name: str, stored: Tensor, head_dim: int, copy: bool = False) -> Tensor:
        """From what the file stores to our parameter, contiguous float32.

        copy: even where nothing needs to change, so that the result has memory of its own.
        """
        part = self._part(name)
        if self._is_transposed(name):
            stored = stored.T
        if part is not None:
            stored = stored.chunk(3)[part]  # (3 C, ...) -> (C, ...)
        if self.interleaved and re.search(r"\.(query|key)\.", name):
            pairs = stored.unflatten(0, (-1, head_dim // 2, 2))  # (n D, ...) -> (n, D/2, 2, ...)
            stored = pairs.transpose(1, 2).flatten(0, 2)  # -> (n, 2, D/2, ...) -> (n D, ...)
        copy = copy or part is not None  # three views of one memory could not be saved apart
        return stored.to(torch.float32, copy=copy, memory_format=CONTIGUOUS).contiguous()

    def _is_transposed(self, name: str) -> bool:
        return self.transposed and re.search(r"(attention|mlp)\.\w+\.weight$", name) is not None

    def _part(self, name: str) -> int | None:
        """Which third of a fused query, key and value; None where they aren't fused."""
        module = name.split(".")[-2]
        fused = module in QKV and len({self.names[f"blocks.N.attention.{x}"] for x in QKV}) == 1
        return QKV.index(module) if fused else None


def _names(table: str) -> dict[str, str]:
    """Lines of "ours theirs" -> a dictionary."""
    return dict(line.split() for line in table.strip().splitlines())


GPT2 = Layout(
    _names("""
        token_embedding            wte
        position_embedding         wpe
        blocks.N.attention_norm    h.N.ln_1
        blocks.N.attention.query   h.N.attn.c_attn
        blocks.N.attention.key     h.N.attn.c_attn
        blocks.N.attention.value   h.N.attn.c_attn
        blocks.N.attention.output  h.N.attn.c_proj
        blocks.N.mlp_norm          h.N.ln_2
        blocks.N.mlp.up            h.N.mlp.c_fc
        blocks.N.mlp.down          h.N.mlp.c_proj
        final_norm                 ln_f
        head                       lm_head
    """),
    prefix="transformer.",
    ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, stored as if it were learned
    transposed=True,  # OpenAI wrote linear layers as convolutions of width 1
)
LLAMA = Layout(
    _names("""
        token_embedding            embed_tokens
        blocks.N.attention_norm    layers.N.input_layernorm
        blocks.N.attention.query   layers.N.self_attn.q_proj
        blocks.N.attention.key     layers.N.self_attn.k_proj
        blocks.N.attention.value   layers.N.self_attn.v_proj
        blocks.N.attention.output  layers.N.self_attn.o_proj
        blocks.N.mlp_norm          layers.N.post_attention_layernorm
        blocks.N.mlp.gate          layers.N.mlp.gate_proj
        blocks.N.mlp.up            layers.N.mlp.up_proj
        blocks.N.mlp.down          layers.N.mlp.down_proj
        final_norm                 norm
        head                       lm_head
    """),
    prefix="model.",
    ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # follows from the configuration
)
_GGUF = _names("""
    token_embedding            token_embd
    position_embedding         position_embd
    blocks.N.attention_norm    blk.N.attn_norm
    blocks.N.attention.query   blk.N.attn_q
    blocks.N.attention.key     blk.N.attn_k
    blocks.N.attention.value   blk.N.attn_v
    blocks.N.attention.output  blk.N.attn_output
    blocks.N.mlp_norm          blk.N.ffn_norm
    blocks.N.mlp.gate          blk.N.ffn_gate
    blocks.N.mlp.up            blk.N.ffn_up
    blocks.N.mlp.down          blk.N.ffn_down
    final_norm                 output_norm
    head                       output
""")
GGUF_LLAMA = Layout(_GGUF, interleaved=True)  # llama.cpp turns neighbouring pairs
OURS = Layout({name: name for name in _GGUF})
GGUF_GPT2 = Layout(_GGUF | {f"blocks.N.attention.{part}": "blk.N.attn_qkv" for part in QKV})


# ---------------------------------------------------------------------------------- configurations


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
        return float(np.float32(value).astype(str))  # GGUF's 0.0000099999997 is 1e-5 in float32

    def only(self, **supported) -> None:
        """Refuse settings that would change the result and that our GPT does not have."""
        for key, allowed in supported.items():
            value = self.table.get(self.prefix + key, allowed[0])
            if not any(type(value) is type(a) and value == a for a in allowed):
                raise ValueError(
                    f"it has {key} = {str(value)[:40]}, which this model doesn't support"
                )


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
