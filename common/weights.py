"""Pretrained weights from GGUF, from safetensors of GPT-2 and Llama, from our own checkpoints.

    model, tokenizer = load_pretrained("smollm2-135m")  # carried by a package: no network
    model, tokenizer = load_pretrained("path/to/a/folder/or/file")
    save_checkpoint(model, "mine.safetensors")

Strict: every tensor of the file is used, every parameter of the model filled, every shape as it
should be, or the file is refused in one line. Sparing: the model is made without memory (PyTorch's
"meta" device) and handed one tensor at a time, so that nothing is initialised only to be
overwritten, and the weights never exist twice.
"""

import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from common.assets import ASSETS, fetch
from common.families import ABSURD
from common.gguf_file import WeightsFileError, refuse
from common.gpt import GPT, PRESETS, GPTConfig
from common.sources import CONFIG_KEY, Source, open_source
from common.tokenizer import BPETokenizer


def load_pretrained(
    source: str | Path, *, config: GPTConfig | None = None
) -> tuple[GPT, BPETokenizer | None]:
    """A model with trained weights, float32, on the CPU, in evaluation mode; and its tokenizer.

    source: "smollm2-135m", "gpt2-124m", "gpt2-355m", "gpt2-774m" or "gpt2-1558m"; else a file, GGUF
            or safetensors; else a folder as Hugging Face's `save_pretrained` writes it
    config: for files that do not say it themselves

    The tokenizer is None where the source has none, or none of the kind `BPETokenizer`.
    Raises AssetUnavailable for a name that is not on this machine, FileNotFoundError for a path
    that isn't, and WeightsFileError for a file that can't be used: each in one line.
    """
    path = Path(source)
    if str(source) in ASSETS and str(source) in PRESETS:
        path, config = fetch(str(source)), PRESETS[str(source)]
    elif not path.exists():
        names = ", ".join(name for name in ASSETS if name in PRESETS)
        raise FileNotFoundError(f"{path}: no such file or folder, and none of the names {names}")
    try:
        opened = open_source(path, config)
        return _fill(opened).eval(), opened.tokenizer
    except WeightsFileError:
        raise
    except (ValueError, SafetensorError) as why:
        refuse(path, str(why))


def save_checkpoint(model: GPT, path: Path | str) -> None:
    """Write a model's weights and configuration to one safetensors file, all of it or nothing.

    `load_pretrained(path)` reads it back. Raises OSError if the file can't be written; what was
    there before is then untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, part, {CONFIG_KEY: json.dumps(asdict(model.config))})
        os.replace(part, path)
    except SafetensorError as why:
        raise OSError(f"{path} can't be written: {why}") from None
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------- filling a model


def _fill(source: Source) -> GPT:
    """The model of `source.config`, with the source's weights. Names and shapes come first."""
    config, layout, shapes = source.config, source.layout, source.shapes
    sizes = (config.vocab_size, config.context_length, config.d_model, config.d_ff)
    if config.n_layers > len(shapes) or max(sizes) >= ABSURD:  # building it would take long
        raise ValueError("its configuration is absurd, or belongs to another file")
    with torch.device("meta"), _Unfilled():
        model = GPT(config)
    blank = model.state_dict()
    stored = {name: layout.stored_name(name) for name in blank}
    _check_names(stored, shapes, optional=layout.stored_name("head.weight"))
    for name, parameter in blank.items():
        expected = layout.stored_shape(name, tuple(parameter.shape))
        if shapes[stored[name]] != expected:
            found = shapes[stored[name]]
            raise ValueError(f"its tensor '{stored[name]}' is {found}, the model needs {expected}")
    if config.tie_embeddings:
        _check_tied_head(source)
    read = lru_cache(maxsize=1)(source.read)  # query, key and value may lie in one tensor
    weights = {}
    # The largest first: what is read of the file comes on top of the weights already there.
    for name in sorted(blank, key=lambda name: -blank[name].numel()):
        tensor = read(stored[name])
        weights[name] = layout.convert(name, tensor, config.head_dim, copy=source.is_view)
    model.load_state_dict(weights, assign=True)
    return model


def _check_names(stored: dict[str, str | None], shapes: dict, optional: str) -> None:
    """Every parameter is in the file, and nothing else is, but for the head that may be tied."""
    missing = [theirs or ours for ours, theirs in stored.items() if theirs not in shapes]
    unused = sorted(set(shapes) - set(stored.values()) - {optional})
    for what, names in (("lacks", missing), ("has what this model has not:", unused)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"it {what} {', '.join(names[:3])}{more}")


def _check_tied_head(source: Source) -> None:
    """Some files hold the token embedding a second time, as the head that it is tied to."""
    embedding, head = (
        source.layout.stored_name(f"{x}.weight") for x in ("token_embedding", "head")
    )
    if head in source.shapes and not torch.equal(source.read(head), source.read(embedding)):
        raise ValueError("its head is said to be tied to the token embedding, but differs from it")


class _Unfilled(TorchFunctionMode):
    """Skips filling tensors at random. On "meta" there is nothing to fill, and yet PyTorch would
    import 900 of its modules to draw the first random number there, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
