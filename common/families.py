"""How the files of GPT-2 and of Llama call and shape what in our `GPT` has one name.

A `Layout` is one table, read in both directions: `convert` takes what a file stores into our model,
`to_stored` takes our parameters out again. What the families call their settings is in
`configurations`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def made_of(self, names: Iterable[str]) -> dict[str, list[str]]:
        """What a file stores, each with those of our parameters that it is made of."""
        parts: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: self._part(name) or 0):  # query, key, value
            parts.setdefault(self.full_name(name), []).append(name)
        return parts

    def full_name(self, name: str) -> str:
        """`stored_name` with the family's prefix, which the head alone does without."""
        return ("" if name.startswith("head.") else self.prefix) + self.stored_name(name)

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

    def to_stored(self, name: str, parts: list[Tensor], head_dim: int) -> Tensor:
        """The way back of `convert`: what the file stores, from `made_of`'s parts in their order.

        name: of any of the parts
        """
        if self.interleaved and re.search(r"\.(query|key)\.", name):
            halves = [x.unflatten(0, (-1, 2, head_dim // 2)) for x in parts]  # (n, 2, D/2, ...)
            parts = [x.transpose(1, 2).flatten(0, 2) for x in halves]  # -> (n D, ...)
        stored = torch.cat(parts) if len(parts) > 1 else parts[0]
        return (stored.T if self._is_transposed(name) else stored).contiguous()

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
