"""GGUF files: every kind of tensor against the `gguf` package, and files that must be refused.

uv run pytest tests/test_gguf_file.py
"""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.assets import fetch
from common.gguf_file import KINDS, GGUFFile, WeightsFileError

U32, STRING, ARRAY = 4, 8, 9  # GGUF's numbers for types of values


def string(text: bytes | str) -> bytes:
    data = text.encode("utf8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key, type_id: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + value


def entry(name: str, shape=(4, 8), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def build(pairs=(), entries=(), data=b"\0" * 128, version=3, n_pairs=None, n_tensors=None) -> bytes:
    """A GGUF file from its parts, which may lie."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(entries) if n_tensors is None else n_tensors,
        len(pairs) if n_pairs is None else n_pairs,
    )
    head += b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % 32) + data


def opened(folder, content: bytes) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


@pytest.mark.parametrize("kind_id", KINDS)
def test_every_kind_is_decoded_like_the_reference(kind_id, tmp_path):
    kind = KINDS[kind_id]
    raw = np.random.default_rng(kind_id).integers(0, 256, (6, 3 * kind.bytes), dtype=np.uint8)
    raw[3:] &= 0x3B  # the first rows have infinite and missing scales, the last are ordinary
    file = opened(tmp_path, build([], [entry("w", (6, 3 * kind.weights), kind_id)], raw.tobytes()))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind_id))
    actual = file.read("w")
    assert actual.dtype == np.float32
    assert np.isfinite(actual[3:]).all()
    np.testing.assert_array_equal(actual, expected.reshape(actual.shape))


def test_reads_what_the_reference_writes(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -300)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_uint64("u64", 2**63)
    writer.add_array("words", ["Ġa", "", "日本"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_custom_alignment(64)
    tensors = {
        f"t{i}": np.random.default_rng(i).standard_normal((2, i, 3), dtype=np.float32)
        for i in range(1, 4)
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    numbers = file.metadata.pop("numbers")
    assert numbers.tolist() == [1, -2, 3]
    assert file.metadata == {
        "general.architecture": "llama",
        "general.alignment": 64,
        "u8": 200,
        "i16": -300,
        "f32": 0.5,
        "f64": 1 / 3,
        "yes": True,
        "u64": 2**63,
        "words": ["Ġa", "", "日本"],
    }
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)


def test_reads_smollm2_like_the_reference():
    path = fetch("smollm2-135m")
    file, reference = GGUFFile(path), gguf.GGUFReader(path)
    assert len(file.tensors) == len(reference.tensors) == 272
    for tensor in reference.tensors[1:4] + reference.tensors[-12:]:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), expected)


REFUSED = [
    ("not a GGUF file", b"PK\3\4 something else"),
    ("not a GGUF file", b""),
    ("version", build(version=1)),
    ("none of 2 and 3", build(version=3 << 24)),  # big-endian
    ("middle of its header", build([pair("a", U32, b"\1\0\0\0")])[:30]),
    ("absurd sizes", build(n_pairs=2**64 - 1, data=b"")),
    ("absurd sizes", build(n_tensors=2**62, data=b"")),
    ("absurd sizes", build([pair("a", STRING, struct.pack("<Q", 2**63) + b"text")])),
    ("absurd sizes", build([pair("a", ARRAY, struct.pack("<IQ", U32, 2**61))])),
    ("header claims absurd", build([pair("a", ARRAY, struct.pack("<IQ", STRING, 2**64 - 1))])),
    ("unknown type 99", build([pair("a", 99, b"")])),
    ("unknown type 9", build([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1))])),
    ("'a' twice", build([pair("a", U32, b"\0" * 4)] * 2)),
    ("not UTF-8", build([pair(b"\xff\xfe", U32, b"\0" * 4)])),
    ("alignment", build([pair("general.alignment", U32, b"\0" * 4)])),
    ("two tensors called 'w'", build([], [entry("w")] * 2)),
    ("has 0 dimensions", build([], [entry("w", ())])),
    ("has 9 dimensions", build([], [entry("w", (1,) * 9)])),
    ("can't be stored as F32", build([], [entry("w", (0, 4))])),
    ("can't be stored as Q8_0", build([], [entry("w", (4, 33), 8)])),
    ("ggml type 77", build([], [entry("w", kind=77)])),
    ("not aligned to 32", build([], [entry("w", offset=31)])),
    ("overlap", build([], [entry("v"), entry("w", offset=96)], b"\0" * 500)),
    ("cut off", build([], [entry("w", (2**32, 2**31))])),
    ("ends at byte", build([], [entry("w", offset=2**40)])),
    ("byte 224 of 223", build([], [entry("w", (4, 8))])[:-1]),
]


@pytest.mark.parametrize(("reason", "content"), REFUSED)
def test_refused_in_one_line(reason, content, tmp_path):
    with pytest.raises(WeightsFileError) as caught:
        opened(tmp_path, content)
    message = str(caught.value)
    assert reason in message
    assert message.startswith(str(tmp_path / "model.gguf"))
    assert "\n" not in message
    assert len(message) < 600


def test_a_long_name_in_the_file_makes_no_long_message(tmp_path):
    with pytest.raises(WeightsFileError) as caught:
        opened(tmp_path, build([pair("x\n" * 5000, U32, b"\0" * 4)] * 2))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


SOUND = build(
    [
        pair("general.architecture", STRING, string("llama")),
        pair("words", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("b")),
        pair("numbers", ARRAY, struct.pack("<IQ", U32, 2) + b"\0" * 8),
    ],
    [entry("v", (2, 32), 3), entry("w", (4, 8), 0, 64)],
    b"\1" * 192,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(0, len(SOUND)) | st.just(len(SOUND)),
    flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(1, 255)), max_size=4),
)
def test_damage_is_read_or_refused(tmp_path, cut, flips):
    content = bytearray(SOUND)
    for at, bits in flips:
        content[at] ^= bits
    refusal = ""
    tracemalloc.start()
    try:
        file = opened(tmp_path, bytes(content[:cut]))
        assert all(file.read(name).size <= len(SOUND) for name in file.tensors)
    except WeightsFileError as error:
        refusal = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "\n" not in refusal
    assert peak < 2_000_000
