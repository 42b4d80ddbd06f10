"""Files of weights, written: safetensors, NumPy, PyTorch, GGUF.

    tensors = [Outgoing("norm.weight", (576,), torch.float32, lambda: norm), ...]
    write_safetensors(path, tensors, {"format": "pt"})

Names, shapes and places come first in these formats, the numbers after them. So each tensor is
asked for when it is its turn, and a model is never held twice. (The safetensors library would want
all tensors at once; PyTorch's format does.) The functions write to `path` itself: who calls them
puts a finished file in its place. All raise OSError where the disk is full.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.gguf_file import KINDS, NUMBERS

CONFIG_KEY = "gpt_config"  # what our own files call the configuration
CONFIG_FILE = f"{CONFIG_KEY}.json"  # inside a .npz


class Outgoing(NamedTuple):
    """A tensor on its way into a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]  # contiguous, on the CPU, of that shape and dtype

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def write(self, stream: BinaryIO) -> None:
        stream.write(self.make().view(torch.uint8).numpy().data)


# ------------------------------------------------------------------------------------- safetensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_safetensors(path: Path, tensors: Sequence[Outgoing], metadata: dict[str, str]) -> None:
    """The length of a JSON table, the table, the tensors one after another."""
    table: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.n_bytes
        place = {"shape": tensor.shape, "data_offsets": (start, end)}
        table[tensor.name] = {"dtype": _CODES[tensor.dtype], **place}
    header = json.dumps(table, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # so that tensors begin at multiples of 8
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for tensor in tensors:
            tensor.write(stream)


# -------------------------------------------------------------------------------- NumPy and PyTorch


def write_npz(path: Path, tensors: Sequence[Outgoing], config: dict) -> None:
    """As `numpy.savez` does, which would want all arrays at once; and the configuration as JSON."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(CONFIG_FILE, json.dumps(config))
        for tensor in tensors:
            with archive.open(f"{tensor.name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, tensor.make().numpy(), allow_pickle=False)


def write_torch(path: Path, tensors: Sequence[Outgoing], config: dict) -> None:
    """What `torch.load(path, weights_only=True)` reads: {"gpt_config": ..., "state_dict": ...}."""
    weights = {tensor.name: tensor.make() for tensor in tensors}
    with path.open("wb") as stream:
        torch.save({CONFIG_KEY: config, "state_dict": weights}, stream)


# --------------------------------------------------------------------------------------------- GGUF

ALIGNMENT = 32  # bytes; GGUF's default
STRING, ARRAY = 8, 9
_TYPE_IDS = {np.dtype(f"<{code}"): type_id for type_id, code in NUMBERS.items()}
_PLAIN = {bool: np.bool_, int: np.uint32, float: np.float32}  # what llama.cpp expects
_KIND_IDS = {
    getattr(torch, name): next(i for i, kind in KINDS.items() if kind.name == code)
    for name, code in (("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16"))
}


def write_gguf(path: Path, tensors: Sequence[Outgoing], metadata: Mapping[str, Any]) -> None:
    """Magic, version, counts; metadata; a directory of tensors; the tensors, each aligned.

    metadata: texts, whole numbers, floats, True or False, lists of texts, arrays of numbers
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        type_id, data = _value(value)
        head += [_string(key), struct.pack("<I", type_id), data]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]  # ggml's order
        head += [_string(tensor.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        head += [struct.pack("<IQ", _KIND_IDS[tensor.dtype], offset)]
        offset += tensor.n_bytes + -tensor.n_bytes % ALIGNMENT
    with path.open("wb") as stream:
        stream.writelines(head)
        stream.write(bytes(-stream.tell() % ALIGNMENT))
        for tensor in tensors:
            tensor.write(stream)
            stream.write(bytes(-stream.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode("utf8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> tuple[int, bytes]:
    """GGUF's number for the type, and the bytes."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list):
        texts = b"".join(map(_string, value))
        return ARRAY, struct.pack("<IQ", STRING, len(value)) + texts
    if isinstance(value, np.ndarray):
        head = struct.pack("<IQ", _TYPE_IDS[value.dtype], value.size)
        return ARRAY, head + value.tobytes()
    number = np.array(value, _PLAIN[type(value)])
    return _TYPE_IDS[number.dtype], number.tobytes()
