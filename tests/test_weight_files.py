"""Writers of weights against the libraries that read them.

uv run pytest tests/test_weight_files.py
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from common.gguf_file import GGUFFile
from common.weight_files import Outgoing, write_gguf, write_npz, write_safetensors, write_torch

SHAPES = {"odd": (3, 5), "one": (1,), "vector": (7,), "wide": (2, 33), "日本": (4,)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def outgoing(dtype: torch.dtype) -> tuple[list[Outgoing], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}
    made = [Outgoing(n, SHAPES[n], dtype, lambda n=n: tensors[n]) for n in tensors]
    return made, tensors


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors(dtype, tmp_path):
    tensors, expected = outgoing(dtype)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors, {"format": "pt", "note": "größer"})
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "größer"}
    actual = load_file(path)
    assert_same({name: actual[name] for name in expected}, expected)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_numpy(dtype, tmp_path):
    tensors, expected = outgoing(dtype)
    write_npz(tmp_path / "model.npz", tensors, {"n_layers": 2})
    with np.load(tmp_path / "model.npz", allow_pickle=False) as arrays:
        assert json.loads(arrays["gpt_config.json"]) == {"n_layers": 2}
        assert_same({name: torch.from_numpy(arrays[name]) for name in expected}, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorch(dtype, tmp_path):
    tensors, expected = outgoing(dtype)
    write_torch(tmp_path / "model.pt", tensors, {"n_layers": 2, "bias": False, "norm": "rms"})
    table = torch.load(tmp_path / "model.pt", weights_only=True)
    assert table["gpt_config"] == {"n_layers": 2, "bias": False, "norm": "rms"}
    assert_same(table["state_dict"], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gguf(dtype, tmp_path):
    tensors, expected = outgoing(dtype)
    metadata = {
        "general.architecture": "llama",
        "text": "Ġgrößer 日本",
        "number": 2**32 - 1,
        "real": 0.1,
        "yes": True,
        "no": False,
        "words": ["Ġa", "", "日本"],
        "none": [],
        "kinds": np.array([1, -3, 5], np.int32),
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, metadata)
    theirs, ours = gguf.GGUFReader(path), GGUFFile(path)
    for key, value in metadata.items():
        if key != "none":  # gguf's reader has no type for what is in an empty list
            assert theirs.fields[key].contents() == pytest.approx(
                value.tolist() if key == "kinds" else value
            )
        assert np.array_equal(ours.metadata[key], np.float32(value) if key == "real" else value)
    types = {key: theirs.fields[key].types[0].name for key in ("number", "real", "yes", "words")}
    assert types == {"number": "UINT32", "real": "FLOAT32", "yes": "BOOL", "words": "ARRAY"}
    assert path.stat().st_size % 32 == 0
    for tensor in theirs.tensors:
        wanted = expected[tensor.name].float().numpy()
        assert tuple(tensor.shape)[::-1] == wanted.shape
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        np.testing.assert_array_equal(numbers, wanted)
        np.testing.assert_array_equal(ours.read(tensor.name), wanted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full: Linux's")
@pytest.mark.parametrize("write", [write_safetensors, write_npz, write_torch, write_gguf])
def test_a_full_disk_is_an_oserror(write):
    big = Outgoing("big", (1000, 1000), torch.float32, lambda: torch.zeros(1000, 1000))
    with pytest.raises(OSError, match="No space left"):
        write(Path("/dev/full"), [big], {})
