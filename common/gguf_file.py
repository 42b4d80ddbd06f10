"""GGUF, the file format of llama.cpp: one file with metadata, tokenizer and quantised tensors.

    from common.gguf_file import GGUFFile
    file = GGUFFile(fetch("smollm2-135m"))
    file.metadata["llama.block_count"]        # 30
    file.read("blk.0.attn_q.weight")          # float32, (576, 576)

The layout, in order: magic, version, counts; key-value pairs; one entry for each tensor (name,
shape, kind, offset); then the tensors' bytes. Specification: docs/gguf.md in ggml's repository.

A model file comes from strangers. Every length is checked against the file before it is used, so a
damaged or hostile file costs one `WeightsFileError`, never a crash or the machine's memory.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

HEADER_LIMIT = 64 << 20  # bytes; the largest vocabularies in use take about 20 MB
CHUNK = 1 << 16  # bytes dequantised at a time: the intermediate results stay in the CPU's cache


class WeightsFileError(ValueError):
    """A file of weights can't be used. The message is one line: which file, why, what to do."""


def refuse(path: Path | str, why: str, instead: str = "download or export it again") -> NoReturn:
    """Raise WeightsFileError in one line, however long the text that came out of the file."""
    why = " ".join(why.split())
    raise WeightsFileError(f"{path}: {why if len(why) < 300 else why[:300] + '…'}; {instead}")


# ------------------------------------------------------------------------------------ quantisation
#
# A quantised tensor is a row of small blocks: a few shared numbers (a scale, an offset) and, for
# each weight, a few bits. The functions take blocks as (N, bytes) uint8 and give (N, weights).


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 that stands at byte `at` of each block: (N, bytes) -> (N, 1) float32."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Two weights a byte; all low halves come before all high ones: (..., n) -> (..., 2 n)."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _bits(packed: np.ndarray) -> np.ndarray:
    """One bit a weight: (N, n) uint8 -> (N, 8 n) of 0 and 1."""
    return np.unpackbits(packed, axis=-1, bitorder="little")


def _fifth_bit(blocks: np.ndarray, at: int) -> np.ndarray:
    """Q5_0 and Q5_1: 32 high bits in 4 bytes, then 32 low nibbles in 16. -> (N, 32) int8"""
    high, low = blocks[:, at : at + 4], blocks[:, at + 4 :]
    return (_nibbles(low) | _bits(high) << 4).view(np.int8)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    """256 weights in 8 groups, each with a scale and an offset of 6 bits; for Q5_K a fifth bit."""
    N = len(blocks)
    a, b, c = np.split(blocks[:, 4:16], 3, axis=1)  # 16 numbers of 6 bits in 12 bytes
    scales = np.concatenate((a & 63, c & 15 | (a & 192) >> 2), axis=1)  # (N, 8)
    offsets = np.concatenate((b & 63, c >> 4 | (b & 192) >> 2), axis=1)
    q = _nibbles(blocks[:, -128:].reshape(N, 4, 32)).reshape(N, 8, 32)
    if blocks.shape[1] == 176:  # Q5_K: the bits of all groups stand side by side in 32 bytes
        q = q | _bits(blocks[:, 16:48]).reshape(N, 32, 8).swapaxes(1, 2) << 4
    scaled = (_half(blocks, 0) * scales)[..., None] * q  # (N, 8, 32)
    return (scaled - (_half(blocks, 2) * offsets)[..., None]).reshape(N, 256)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """256 weights of 6 bits: 4 low ones, 2 high ones; 16 groups with a scale of 8 bits."""
    N = len(blocks)
    low = _nibbles(blocks[:, :128].reshape(N, 2, 64)).reshape(N, 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]  # (4, 1)
    high = blocks[:, 128:192].reshape(N, 2, 1, 32) >> shifts & 3
    q = (low | high << 4).view(np.int8) - np.int8(32)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)  # (N, 16)
    return (scales[..., None] * q.reshape(N, 16, 16)).reshape(N, 256)


class Kind(NamedTuple):
    """How a tensor is stored."""

    name: str
    weights: int  # in a block
    bytes: int  # of a block
    decode: Callable[[np.ndarray], np.ndarray]  # (N, bytes) uint8 -> (N, weights)


KINDS = {
    0: Kind("F32", 1, 4, lambda b: b.view("<f4")),
    1: Kind("F16", 1, 2, lambda b: b.view("<f2")),
    2: Kind("Q4_0", 32, 18, lambda b: _half(b, 0) * (_nibbles(b[:, 2:]) - np.float32(8))),
    3: Kind("Q4_1", 32, 20, lambda b: _half(b, 0) * _nibbles(b[:, 4:]) + _half(b, 2)),
    6: Kind("Q5_0", 32, 22, lambda b: _half(b, 0) * (_fifth_bit(b, 2) - np.int8(16))),
    7: Kind("Q5_1", 32, 24, lambda b: _half(b, 0) * _fifth_bit(b, 4) + _half(b, 2)),
    8: Kind("Q8_0", 32, 34, lambda b: _half(b, 0) * b[:, 2:].view(np.int8)),
    12: Kind("Q4_K", 256, 144, _q4_k),
    13: Kind("Q5_K", 256, 176, _q4_k),
    14: Kind("Q6_K", 256, 210, _q6_k),
    30: Kind("BF16", 1, 2, lambda b: (b.view("<u2").astype("<u4") << 16).view("<f4")),
}


# --------------------------------------------------------------------------------------- the file


class _Cursor:
    """Reads values one after another; nothing beyond `end`."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer, self.at, self.end = buffer, 0, min(len(buffer), HEADER_LIMIT)

    def take(self, n_bytes: int) -> int:
        """Step over `n_bytes` and return where they start."""
        start = self.at
        if n_bytes > self.end - start:
            raise _Damaged("it ends in the middle of its header, or the header claims absurd sizes")
        self.at = start + n_bytes
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.buffer, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        start = self.take(self.number("Q"))
        return self.buffer[start : self.at].decode("utf8")

    def value(self, type_id: int, in_array: bool = False) -> Any:
        """A number, a string, a list of strings or an array of numbers."""
        if type_id in NUMBERS:
            return self.number(NUMBERS[type_id])
        if type_id == 8:
            return self.string()
        if type_id != 9 or in_array:  # lists of lists are allowed, but no model has them
            raise _Damaged(f"its metadata has a value of unknown type {type_id}")
        element, length = self.number("I"), self.number("Q")
        if element in NUMBERS:
            dtype = np.dtype(f"<{NUMBERS[element]}")
            start = self.take(length * dtype.itemsize)
            return np.frombuffer(self.buffer[start : self.at], dtype)
        return [self.value(element, in_array=True) for _ in range(length)]


class _Damaged(Exception):
    """What is wrong, without the file's name."""


# Numbers in metadata: GGUF's id of their type -> the code of `struct` and NumPy.
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in the file. `shape` is PyTorch's: the last dimension is contiguous."""

    shape: tuple[int, ...]
    kind: Kind
    offset: int  # from the start of the file

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) // self.kind.weights * self.kind.bytes


class GGUFFile:
    """The metadata and the directory of tensors, checked; weights are read when asked for.

    Raises WeightsFileError, in one line, for whatever is not a sound little-endian GGUF file of
    version 2 or 3 with tensors of the KINDS above.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Entry] = {}
        with self.path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                refuse(self.path, "it is not a GGUF file", "check the address it came from")
            try:
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                    self._parse(_Cursor(buffer), len(buffer))
            except UnicodeDecodeError:
                refuse(self.path, "it is damaged: text in its header is not UTF-8")
            except _Damaged as what:
                refuse(self.path, str(what))

    def read(self, name: str) -> np.ndarray:
        """The tensor's weights as float32, in memory of their own."""
        entry = self.tensors[name]
        # One map for each tensor: when it goes, so do the file's pages. A map of the whole file
        # would by and by hold all of it in memory, beside the weights made from it.
        raw = np.memmap(self.path, np.uint8, "r", entry.offset, shape=entry.n_bytes)
        blocks = raw.view(np.ndarray).reshape(-1, entry.kind.bytes)
        weights = np.empty((len(blocks), entry.kind.weights), np.float32)
        step = CHUNK // entry.kind.bytes
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
            for i in range(0, len(blocks), step):
                weights[i : i + step] = entry.kind.decode(blocks[i : i + step])
        return weights.reshape(entry.shape)

    def _parse(self, cursor: _Cursor, size: int) -> None:
        cursor.take(4)  # the magic
        version = cursor.number("I")
        if version not in (2, 3):
            raise _Damaged(f"its version of GGUF, {version}, is none of 2 and 3 (little-endian)")
        n_tensors, n_pairs = cursor.number("Q"), cursor.number("Q")
        for _ in range(n_pairs):
            key = cursor.string()
            if key in self.metadata:
                raise _Damaged(f"its metadata has '{key}' twice")
            self.metadata[key] = cursor.value(cursor.number("I"))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 16:
            raise _Damaged("its alignment is absurd")
        for _ in range(n_tensors):
            name = cursor.string()
            if name in self.tensors:
                raise _Damaged(f"it has two tensors called '{name}'")
            self.tensors[name] = self._entry(cursor, name, alignment)
        start = -cursor.at % alignment + cursor.at  # of the tensors' bytes: the next multiple
        self.tensors = {
            name: Entry(e.shape, e.kind, start + e.offset) for name, e in self.tensors.items()
        }
        self._check_places(size)

    @staticmethod
    def _entry(cursor: _Cursor, name: str, alignment: int) -> Entry:
        n_dims = cursor.number("I")
        if not 1 <= n_dims <= 4:
            raise _Damaged(f"its tensor '{name}' has {n_dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]  # ggml's order is reversed
        kind_id, offset = cursor.number("I"), cursor.number("Q")
        if kind_id not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise _Damaged(f"its tensor '{name}' is stored as ggml type {kind_id}, not as {known}")
        kind = KINDS[kind_id]
        if not prod(shape) or shape[-1] % kind.weights:
            raise _Damaged(f"its tensor '{name}' of shape {shape} can't be stored as {kind.name}")
        if offset % alignment:
            raise _Damaged(f"its tensor '{name}' is not aligned to {alignment} bytes")
        return Entry(shape, kind, offset)

    def _check_places(self, size: int) -> None:
        """Every tensor inside the file, no two on the same bytes."""
        places = sorted((e.offset, e.offset + e.n_bytes, name) for name, e in self.tensors.items())
        for (_, end, name), (start, _, next_name) in pairwise(places):
            if end > start:
                raise _Damaged(f"its tensors '{name}' and '{next_name}' overlap")
        _, end, name = places[-1] if places else (0, 0, "")
        if end > size:
            raise _Damaged(f"it is cut off: tensor '{name}' ends at byte {end:,} of {size:,}")
