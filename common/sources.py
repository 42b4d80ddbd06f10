"""What a file or folder of weights holds: recognised by its content, checked, and not read yet.

    source = open_source(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    source.config, source.tokenizer, source.shapes["blk.0.attn_q.weight"]
    source.read("blk.0.attn_q.weight")

GGUF files; safetensors files and folders of GPT-2 and Llama as Hugging Face's `save_pretrained`
writes them, whole or in parts; our own checkpoints. Pickles are refused: loading one runs whatever
code is in it.
"""

import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.families import (
    GGUF_GPT2,
    GGUF_LLAMA,
    GPT2,
    LLAMA,
    OURS,
    Layout,
    gguf_config,
    gpt2_config,
    llama_config,
)
from common.gguf_file import GGUFFile, refuse
from common.gpt import PRESETS, GPTConfig
from common.pretokenizer import DIGITS_PATTERN, GPT2_PATTERN
from common.tokenizer import BPETokenizer
from common.tokenizer_file import from_printable, parse_merge

CONFIG_KEY = "gpt_config"  # in the metadata of our own checkpoints
JSON_LIMIT = 64 << 20  # bytes; the largest tokenizer.json in use has about 35 MB


@dataclass
class Source:
    """An opened file, or set of files. Names are the file's, without an optional prefix."""

    layout: Layout
    config: GPTConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    tokenizer: BPETokenizer | None = None
    is_view: bool = False  # what is read is the file's memory, not a copy of it


def open_source(path: Path, config: GPTConfig | None = None) -> Source:
    """Find out what `path` is. `config` is for files that don't say theirs.

    Raises WeightsFileError; or ValueError, for the caller to add the path.
    """
    if path.is_dir():
        return _open_folder(path, config)
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        return _open_gguf(path)
    # A pickle begins with its protocol, torch.save's archive of one with the letters of a zip file.
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        pickled = "it is a pickle, and loading a pickle runs whatever code is in it"
        refuse(path, pickled, "look for the .safetensors version of the same weights")
    return _open_safetensors(path, [path], config)


def _open_folder(folder: Path, config: GPTConfig | None) -> Source:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        table = _read_json(index).get("weight_map")
        names = sorted({str(name) for name in table.values()} if isinstance(table, dict) else ())
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*", name) or not (folder / name).is_file():
                refuse(index, f"it names '{name}', which is no file in its folder")
        return _open_safetensors(folder, [folder / name for name in names], config)
    if whole.exists():
        return _open_safetensors(folder, [whole], config)
    found = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    if not found:
        refuse(folder, "it has no .safetensors and no .gguf file", "look for weights in that form")
    if len(found) > 1:
        refuse(folder, f"it has {len(found)} files of weights", "give the path of the one you mean")
    return open_source(found[0], config)


def _read_json(path: Path) -> dict:
    if path.stat().st_size > JSON_LIMIT:
        refuse(path, "it is absurdly large")
    try:
        table = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, RecursionError):
        table = None
    return table if isinstance(table, dict) else refuse(path, "it is not a JSON object")


# -------------------------------------------------------------------------------------------- GGUF


def _open_gguf(path: Path) -> Source:
    file = GGUFFile(path)
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    config = gguf_config(file.metadata, shapes)
    layout = GGUF_GPT2 if file.metadata["general.architecture"] == "gpt2" else GGUF_LLAMA
    tokenizer = _gguf_tokenizer(path, file.metadata, config.vocab_size)
    return Source(layout, config, shapes, lambda name: torch.from_numpy(file.read(name)), tokenizer)


PATTERNS = {"smollm": DIGITS_PATTERN, "gpt-2": GPT2_PATTERN, "default": GPT2_PATTERN}


def _gguf_tokenizer(path: Path, metadata: Mapping, vocab_size: int) -> BPETokenizer | None:
    table = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if "tokens" not in table:
        return None
    pattern = PATTERNS.get(str(table.get("pre")))
    if str(table.get("model")) != "gpt2" or pattern is None:
        return _unknown_tokenizer(path)
    tokens, merges, kinds = (table.get(key) for key in ("tokens", "merges", "token_type"))
    types = [type(value) for value in (tokens, merges, kinds)]
    if types != [list, list, np.ndarray] or not len(tokens) == len(kinds) == vocab_size:
        raise ValueError(f"its tokenizer is incomplete, or not for the {vocab_size} tokens it has")
    kinds = kinds.tolist()
    special = {token: i for i, token in enumerate(tokens) if kinds[i] != 1}  # 1 is "normal"
    vocab = {i: from_printable(token) for i, token in enumerate(tokens) if kinds[i] == 1}
    return BPETokenizer(map(parse_merge, merges), special, vocab, pattern)


def _unknown_tokenizer(path: Path) -> None:
    warnings.warn(f"{path}: its tokenizer is not of a kind known here, so it is None", stacklevel=2)


# ------------------------------------------------------------------------------------- safetensors


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Place(NamedTuple):
    """Where a tensor stands in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    n_bytes: int

    def read(self) -> Tensor:
        """A view of the file: one map for each tensor, so that its pages go when it does."""
        raw = np.memmap(self.file, np.uint8, "c", self.start, shape=(self.n_bytes,))
        aligned = raw if self.start % 8 == 0 else raw.copy()
        return torch.from_numpy(aligned).view(DTYPES[self.dtype]).view(self.shape)


def _directory(file: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """The metadata and the tensors of one file, once the safetensors library has checked it."""
    try:
        with safe_open(file, "numpy") as checked:
            metadata = checked.metadata() or {}
    except SafetensorError as why:
        raise ValueError(f"it is no sound safetensors file ({why})") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    table.pop("__metadata__", None)
    places = {}
    for name, entry in table.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        places[name] = Place(file, entry["dtype"], shape, 8 + length + start, end - start)
    return metadata, places


def _open_safetensors(path: Path, files: list[Path], config: GPTConfig | None) -> Source:
    """`path` is what the user asked for: the file, or the folder of the files."""
    directories = [_directory(file) for file in files]
    metadata = next((metadata for metadata, _ in directories), {})
    layout = _recognise(path, {name for _, places in directories for name in places}, metadata)
    stored = {}
    for name, place in chain.from_iterable(places.items() for _, places in directories):
        short = name.removeprefix(layout.prefix)
        if re.fullmatch(layout.ignored, short):
            continue
        if short in stored:
            raise ValueError(f"it has '{short}' twice")
        if place.dtype not in DTYPES:
            raise ValueError(f"its '{name}' is stored as {place.dtype}, not as a float")
        stored[short] = place
    shapes = {short: place.shape for short, place in stored.items()}
    read = lambda short: stored[short].read()
    folder = path if path.is_dir() else path.parent
    if layout is OURS:
        return Source(layout, _own_config(metadata[CONFIG_KEY]), shapes, read, is_view=True)
    config = config or _find_config(path, folder, layout, shapes)
    tokenizer = _find_tokenizer(folder, layout, config.vocab_size)
    return Source(layout, config, shapes, read, tokenizer, is_view=True)


def _recognise(path: Path, names: set[str], metadata: Mapping) -> Layout:
    if CONFIG_KEY in metadata:
        return OURS
    for layout in (GPT2, LLAMA):
        embedding = layout.names["token_embedding"] + ".weight"
        if {embedding, layout.prefix + embedding} & names:
            return layout
    refuse(path, "its tensors are neither GPT-2's nor Llama's", "only these two can be loaded")


def _own_config(text: str) -> GPTConfig:
    try:
        return GPTConfig(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as why:
        raise ValueError(f"its configuration can't be understood ({why})") from None


def _find_config(path: Path, folder: Path, layout: Layout, shapes: Mapping) -> GPTConfig:
    """From config.json beside the weights; else, a GPT-2 of OpenAI's is known by its size."""
    beside = folder / "config.json"
    if beside.exists():
        return (gpt2_config if layout is GPT2 else llama_config)(_read_json(beside))
    n_layers = sum(name.endswith("ln_1.weight") for name in shapes)
    for known in PRESETS.values():  # the number of heads can't be seen from shapes
        if (known.vocab_size, known.d_model) == shapes.get("wte.weight") and (
            known.n_layers == n_layers
        ):
            return known
    how = "put its config.json beside it, or say load_pretrained(path, config=GPTConfig(...))"
    refuse(path, "it does not say how the model is configured", how)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def _find_tokenizer(folder: Path, layout: Layout, vocab_size: int) -> BPETokenizer | None:
    """From tokenizer.json in Hugging Face's format; GPT-2's own where a GPT-2 comes without."""
    path = folder / "tokenizer.json"
    if not path.exists():
        is_gpt2 = layout is GPT2 and vocab_size == PRESETS["gpt2-124m"].vocab_size
        return BPETokenizer.gpt2() if is_gpt2 else None
    table = _read_json(path)
    try:
        return _parse_tokenizer(path, **table)
    except (ValueError, TypeError, LookupError, AttributeError) as why:
        refuse(path, f"it is damaged ({why})")


def _parse_tokenizer(
    path: Path, model, pre_tokenizer=None, added_tokens=(), normalizer=None, **_
) -> BPETokenizer | None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    steps = [{key: step[key] for key in step if key != "trim_offsets"} for step in steps if step]
    if steps not in ([BYTE_LEVEL], [DIGITS, BYTE_LEVEL]) or model["type"] != "BPE" or normalizer:
        return _unknown_tokenizer(path)
    special = {token["content"]: token["id"] for token in added_tokens}
    vocab = {i: from_printable(t) for t, i in model["vocab"].items() if t not in special}
    merges = [parse_merge(m if isinstance(m, str) else " ".join(m)) for m in model["merges"]]
    return BPETokenizer(merges, special, vocab, DIGITS_PATTERN if DIGITS in steps else GPT2_PATTERN)
