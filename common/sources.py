"""What a file or folder of weights holds: recognised by its content, checked, and not read yet.

    source = open_source(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    source.config, source.tokenizer, source.shapes["blk.0.attn_q.weight"]
    source.read("blk.0.attn_q.weight")

GGUF files; safetensors files and folders of GPT-2 and Llama as Hugging Face's `save_pretrained`
writes them, whole or in parts; our own checkpoints, as safetensors or in the formats of NumPy and
PyTorch. Other pickles are refused, and none is ever allowed to run code.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.configurations import gguf_config, gpt2_config, llama_config
from common.families import GGUF_GPT2, GGUF_LLAMA, GPT2, LLAMA, OURS, Layout
from common.gguf_file import GGUFFile, refuse
from common.gpt import PRESETS, GPTConfig
from common.token_formats import (
    NO_ROLES,
    TOKENIZER,
    Roles,
    read_folder,
    read_gguf,
    read_json,
    warn_unknown,
)
from common.tokenizer import BPETokenizer
from common.weight_files import CONFIG_FILE, CONFIG_KEY, DTYPES

KINDS = (".safetensors", ".gguf", ".npz", ".pt")


@dataclass
class Source:
    """An opened file, or set of files. Names are the file's, without an optional prefix."""

    layout: Layout
    config: GPTConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    tokenizer: BPETokenizer | None = None
    roles: Roles = NO_ROLES
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
    if start[:2] == b"PK":  # a zip archive: NumPy's, or PyTorch's
        with _may_be_damaged(), zipfile.ZipFile(path) as archive:
            is_numpy = any(name.endswith(".npy") for name in archive.namelist())
        return (_open_npz if is_numpy else _open_torch)(path)
    # A bare pickle begins with the version of its protocol.
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        _refuse_pickle(path)
    return _open_safetensors(path, [path], config)


def _open_folder(folder: Path, config: GPTConfig | None) -> Source:
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        table = read_json(index).get("weight_map")
        names = sorted({str(name) for name in table.values()} if isinstance(table, dict) else ())
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*", name) or not (folder / name).is_file():
                refuse(index, f"it names '{name}', which is no file in its folder")
        return _open_safetensors(folder, [folder / name for name in names], config)
    if whole.exists():
        return _open_safetensors(folder, [whole], config)
    found = [file for kind in KINDS for file in folder.glob(f"*{kind}")]
    if not found:
        refuse(folder, f"it has no {', '.join(KINDS)} file", "look for weights in such a form")
    if len(found) > 1:
        refuse(folder, f"it has {len(found)} files of weights", "give the path of the one you mean")
    return open_source(found[0], config)


# -------------------------------------------------------------------------------------------- GGUF


def _open_gguf(path: Path) -> Source:
    file = GGUFFile(path)
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    config = gguf_config(file.metadata, shapes)
    layout = GGUF_GPT2 if file.metadata["general.architecture"] == "gpt2" else GGUF_LLAMA
    tokenizer, roles = read_gguf(path, file.metadata, config.vocab_size)
    read = lambda name: torch.from_numpy(file.read(name))
    return Source(layout, config, shapes, read, tokenizer, roles)


# --------------------------------------------------------------------- our own in NumPy and PyTorch

DAMAGE = (ValueError, RuntimeError, LookupError, OSError, EOFError, zipfile.BadZipFile)


@contextmanager
def _may_be_damaged() -> Iterator[None]:
    """Whatever the readers of an archive stumble over becomes a ValueError."""
    try:
        yield
    except DAMAGE as why:
        raise ValueError(f"it is a damaged archive ({why})") from None


def _open_npz(path: Path) -> Source:
    with _may_be_damaged(), zipfile.ZipFile(path) as archive:
        text = archive.read(CONFIG_FILE).decode("utf8")
        arrays = [member for member in archive.infolist() if member.filename != CONFIG_FILE]
        headers = {m.filename.removesuffix(".npy"): _array_header(archive, m) for m in arrays}
    shapes = {name: shape for name, (shape, _) in headers.items()}
    for name, (_, dtype) in headers.items():
        if dtype not in (np.float32, np.float16):
            raise ValueError(f"its '{name}' is stored as {dtype}, not as float32 or float16")

    def read(name: str) -> Tensor:
        with _may_be_damaged(), np.load(path, allow_pickle=False) as archive:
            return torch.from_numpy(np.ascontiguousarray(archive[name]))

    return _own_source(path, _own_config(text), shapes, read)


def _array_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple, np.dtype]:
    """Shape and dtype of an array that is as large as they say; it is not read."""
    with archive.open(member) as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        rest = member.file_size - stream.tell()
    if member.compress_type != zipfile.ZIP_STORED or rest != dtype.itemsize * prod(shape):
        raise ValueError(f"'{member.filename}' is not an array as numpy.savez writes it")
    return shape, dtype


def _open_torch(path: Path) -> Source:
    """`weights_only` builds tensors and plain values, and calls nothing that a file names."""
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config, weights = table[CONFIG_KEY], table["state_dict"]
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    except (pickle.UnpicklingError, SafetensorError, LookupError, TypeError, AttributeError):
        _refuse_pickle(path)
    except Exception as why:  # a damaged pickle can make its reader fail in any way
        raise ValueError(f"it is a damaged archive ({why})") from None
    for name, tensor in weights.items():
        if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
            raise ValueError(f"its '{name}' is stored as {tensor.dtype}, not as a plain float")
    read = lambda name: weights[name].detach()
    return _own_source(path, _make_config(config), shapes, read, is_view=True)


def _own_source(path: Path, config: GPTConfig, shapes: Mapping, read: Callable, **more) -> Source:
    return Source(OURS, config, shapes, read, *_find_tokenizer(path.parent, OURS, config), **more)


def _refuse_pickle(path: Path) -> NoReturn:
    pickled = "it is a pickle, and loading a pickle runs whatever code is in it"
    refuse(path, pickled, "look for the .safetensors version of the same weights")


# ------------------------------------------------------------------------------------- safetensors


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
        config = _own_config(metadata[CONFIG_KEY])
    else:
        config = config or _find_config(path, folder, layout, shapes)
    found = _find_tokenizer(folder, layout, config)
    return Source(layout, config, shapes, read, *found, is_view=True)


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
        table = json.loads(text)
    except (ValueError, RecursionError) as why:
        raise ValueError(f"its configuration can't be understood ({why})") from None
    return _make_config(table)


def _make_config(table: dict) -> GPTConfig:
    try:
        return GPTConfig(**table)
    except (ValueError, TypeError) as why:
        raise ValueError(f"its configuration can't be understood ({why})") from None


def _find_config(path: Path, folder: Path, layout: Layout, shapes: Mapping) -> GPTConfig:
    """From config.json beside the weights; else, a GPT-2 of OpenAI's is known by its size."""
    beside = folder / "config.json"
    if beside.exists():
        return (gpt2_config if layout is GPT2 else llama_config)(read_json(beside))
    n_layers = sum(name.endswith("ln_1.weight") for name in shapes)
    for known in PRESETS.values():  # the number of heads can't be seen from shapes
        if (known.vocab_size, known.d_model) == shapes.get("wte.weight") and (
            known.n_layers == n_layers
        ):
            return known
    how = "put its config.json beside it, or say load_pretrained(path, config=GPTConfig(...))"
    refuse(path, "it does not say how the model is configured", how)


def _find_tokenizer(folder: Path, layout: Layout, config: GPTConfig) -> tuple:
    """The tokenizer beside the weights, and its roles; GPT-2's own where a GPT-2 comes without."""
    tokenizer, roles = read_folder(folder)
    is_gpt2 = layout is GPT2 and config.vocab_size == PRESETS["gpt2-124m"].vocab_size
    if is_gpt2 and not (folder / TOKENIZER).exists():
        tokenizer = BPETokenizer.gpt2()
        roles = Roles.usual(tokenizer)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        why = f"has {tokenizer.vocab_size:,} tokens, and the model {config.vocab_size:,}"
        warn_unknown(folder, why)
        return None, NO_ROLES
    return tokenizer, roles
