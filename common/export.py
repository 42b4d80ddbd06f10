"""Weights out, in five formats that other programs read; `load_pretrained` reads all of them too.

    export(open_pretrained("smollm2-135m"), Path("smollm2"), to="gguf", dtype="float16")
    export(Pretrained.of(model, tokenizer), Path("mine"), to="transformers")

    safetensors, pytorch, numpy    our names, for any `GPT`; the tokenizer in the course's format
    transformers                   a folder for `AutoModelForCausalLM` and `AutoTokenizer`
    gguf                           for llama.cpp and what is built on it

The tables of `families` and `configurations`, by which files are read, are used backwards. A format
is a folder: it appears whole under its name, or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common.configurations import FAMILIES, family_of, gguf_table
from common.families import GGUF_GPT2, GGUF_LLAMA, GPT2, LLAMA, OURS, Layout
from common.token_formats import (
    SETTINGS,
    TEMPLATE,
    TOKENIZER,
    gguf_tokenizer,
    hugging_face_files,
    own_files,
    read_folder,
)
from common.weight_files import (
    CONFIG_KEY,
    Outgoing,
    write_gguf,
    write_npz,
    write_safetensors,
    write_torch,
)
from common.weights import HISTORY, Pretrained, open_pretrained

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GGUF_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}
CARD = "README.md"

Files = dict[str, str | Callable[[Path], None]]  # a name, and its text or what writes it


class ExportError(ValueError):
    """The model can't be written like that. The message is one line: why, and what to do."""


def export(
    pretrained: Pretrained, out: Path, to: str, dtype: str = "float32", force: bool = False
) -> dict[str, int]:
    """Write a model into a new folder; returns its files with their sizes in bytes.

    to:    one of FORMATS
    dtype: "float32", "float16" or "bfloat16"; GGUF keeps vectors and positions in float32
    force: replace a folder that an earlier export has written

    Raises ExportError for what the format can't hold, before anything is written; OSError, in one
    line, if the disk is full; WeightsFileError if the source turns out to be damaged.
    """
    if to not in FORMATS or dtype not in DTYPES:
        known = f"there are {', '.join(FORMATS)}, in {', '.join(DTYPES)}"
        raise ExportError(f"to={to!r}, dtype={dtype!r}: {known}")
    config, tokenizer = pretrained.config, pretrained.tokenizer
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and the model "
            f"{config.vocab_size:,}: it belongs to another model"
        )
    try:
        files = FORMATS[to](pretrained, dtype)
    except ExportError:
        raise
    except ValueError as why:
        raise ExportError(
            f"{to} can't hold this model: {why}; the formats safetensors, pytorch and numpy can"
        ) from None
    if pretrained.history:
        files[HISTORY] = pretrained.history
    with _whole_folder(Path(out), force) as folder:
        for name, content in files.items():
            if isinstance(content, str):
                (folder / name).write_text(content, encoding="utf8", newline="\n")
            else:
                content(folder / name)
        return {name: (folder / name).stat().st_size for name in files}


def with_tokenizer_of(pretrained: Pretrained, source: str | Path) -> Pretrained:
    """The same weights with the tokenizer, roles and chat template of another source.

    source: a name or path as for `load_pretrained`, or a tokenizer.json, or a folder with one.
    Raises ExportError where there is none, and what `open_pretrained` raises.
    """
    path = Path(source)
    if path.is_dir() and (path / TOKENIZER).exists():
        tokenizer, roles = read_folder(path)
    elif path.name == TOKENIZER and path.exists():
        tokenizer, roles = read_folder(path.parent)
    else:
        opened = open_pretrained(source)
        tokenizer, roles = opened.tokenizer, opened.roles
    if tokenizer is None:
        raise ExportError(f"{source} has no tokenizer")
    return replace(pretrained, tokenizer=tokenizer, roles=roles)


# ------------------------------------------------------------------------------------- five formats


def outgoing(pretrained: Pretrained, layout: Layout, dtype: str) -> list[Outgoing]:
    """All tensors as `layout` names and shapes them, made when they are asked for."""
    tensors = []
    for name, parts in layout.made_of(pretrained.shapes).items():
        shape = layout.stored_shape(parts[0], pretrained.shapes[parts[0]])
        # llama.cpp adds these to activations, and wants them exact.
        exact = layout in (GGUF_GPT2, GGUF_LLAMA) and (len(shape) == 1 or "position" in name)
        kind = torch.float32 if exact else DTYPES[dtype]
        tensors.append(Outgoing(name, shape, kind, partial(_make, pretrained, layout, parts, kind)))
    return tensors


def _make(pretrained: Pretrained, layout: Layout, names: list[str], dtype: torch.dtype) -> Tensor:
    parts = [pretrained.read(name) for name in names]
    stored = layout.to_stored(names[0], parts, pretrained.config.head_dim)
    rounded = stored.to(dtype)
    if dtype is torch.float16 and bool((rounded.isinf() & ~stored.isinf()).any()):
        beyond = "has weights beyond the largest number of float16, 65,504"
        raise ExportError(f"'{names[0]}' {beyond}: choose bfloat16 or float32")
    return rounded


def _own(write: Callable, name: str, pretrained: Pretrained, dtype: str) -> Files:
    """One file of ours, complete in itself, and the tokenizer beside it."""
    tokenizer, config = pretrained.tokenizer, asdict(pretrained.config)
    if write is write_npz and dtype == "bfloat16":
        raise ExportError("NumPy has no bfloat16: choose float32 or float16")
    if write is write_safetensors:
        config = {CONFIG_KEY: json.dumps(config)}
    tensors = outgoing(pretrained, OURS, dtype)
    beside = own_files(tokenizer, pretrained.roles) if tokenizer else {}
    return {name: lambda path: write(path, tensors, config), **beside}


def _transformers(pretrained: Pretrained, dtype: str) -> Files:
    config, tokenizer = pretrained.config, pretrained.tokenizer
    family = family_of(config)
    _, table, _ = FAMILIES[family]
    tensors = outgoing(pretrained, {"gpt2": GPT2, "llama": LLAMA}[family], dtype)
    roles = pretrained.roles.ids()
    said = {name: i for name, i in roles.items() if i is not None}
    beside = (
        hugging_face_files(tokenizer, pretrained.roles, config.context_length) if tokenizer else {}
    )
    return {
        "config.json": _json(table(config) | roles | {"dtype": dtype}),
        "generation_config.json": _json(said),
        "model.safetensors": lambda path: write_safetensors(path, tensors, {"format": "pt"}),
        **beside,
    }


def _gguf(pretrained: Pretrained, dtype: str) -> Files:
    config, tokenizer, roles = pretrained.config, pretrained.tokenizer, pretrained.roles
    family = family_of(config)
    vocabulary = (
        gguf_tokenizer(tokenizer, roles, config.vocab_size)
        if tokenizer
        else {"tokenizer.ggml.model": "none"}
    )
    metadata = {
        "general.architecture": family,
        "general.type": "model",
        "general.file_type": GGUF_FILE_TYPES[dtype],
        **gguf_table(config, family),
        **vocabulary,
    }
    tensors = outgoing(pretrained, {"gpt2": GGUF_GPT2, "llama": GGUF_LLAMA}[family], dtype)
    return {"model.gguf": lambda path: write_gguf(path, tensors, metadata)}


def _json(table: dict) -> str:
    return json.dumps(table, indent=2) + "\n"


FORMATS: dict[str, Callable[[Pretrained, str], Files]] = {
    "safetensors": partial(_own, write_safetensors, "model.safetensors"),
    "pytorch": partial(_own, write_torch, "model.pt"),
    "numpy": partial(_own, write_npz, "model.npz"),
    "transformers": _transformers,
    "gguf": _gguf,
}
WEIGHTS = ("model.safetensors", "model.pt", "model.npz", "model.gguf")
BESIDE = (TOKENIZER, SETTINGS, TEMPLATE, "config.json", "generation_config.json", HISTORY, CARD)


# ------------------------------------------------------------------------------ whole or not at all


@contextmanager
def _whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which takes the name `out` in one step once all went well."""
    _check_free(out, force)
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    except OSError as why:
        reason = why.strerror or str(why)
        raise OSError(f"can't write {out}: {reason}; name a folder on another disk") from None
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)


def _check_free(out: Path, force: bool) -> None:
    """Nothing that is not ours to replace may stand at `out`."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file: name a folder that is not there yet")
    names = sorted(file.name for file in out.iterdir())
    others = [name for name in names if name not in WEIGHTS + BESIDE]
    if names and not force:
        raise ExportError(f"{out} is there already: name another folder, or replace it by --force")
    if others:
        raise ExportError(f"{out} holds '{others[0]}', which no export wrote: name another folder")
