"""Tokenizers and their roles in other programs' files. `test_sources` reads foreign ones,
`test_export` lets transformers read ours.

uv run pytest tests/test_token_formats.py
"""

import json

import numpy as np
import pytest
from test_sources import strings
from tokenizers import Tokenizer

from common.gguf_file import WeightsFileError
from common.gpt import GPT, GPTConfig
from common.pretokenizer import DIGITS_PATTERN, GPT2_PATTERN
from common.token_formats import (
    NO_ROLES,
    Roles,
    gguf_tokenizer,
    hugging_face_files,
    own_files,
    read_folder,
    read_gguf,
)
from common.tokenizer import BPETokenizer
from common.weights import load_pretrained, save_checkpoint

TEXT = "ab ab abc abc 12 12 123 hello hello world"
ROLES = Roles(265, 265, 266, "{{ messages }}")


@pytest.fixture(params=[GPT2_PATTERN, DIGITS_PATTERN], ids=["gpt2", "digits"])
def tokenizer(request) -> BPETokenizer:
    special = ["<|endoftext|>", "<|pad|>"]
    return BPETokenizer.train(TEXT, 267, special, pattern=request.param)


def put(folder, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf8")


def assert_same(actual: BPETokenizer, expected: BPETokenizer) -> None:
    assert actual.merges == expected.merges
    assert actual.vocab == expected.vocab
    assert actual.special_tokens == expected.special_tokens
    assert actual.pattern == expected.pattern


def test_files_come_back(tokenizer, tmp_path):
    assert read_folder(tmp_path) == (None, NO_ROLES)
    for files in (own_files(tokenizer, ROLES), hugging_face_files(tokenizer, ROLES, 128)):
        put(tmp_path, files)
        again, roles = read_folder(tmp_path)
        assert_same(again, tokenizer)
        assert roles == ROLES
    put(tmp_path, own_files(tokenizer, ROLES))
    assert_same(BPETokenizer.load(tmp_path / "tokenizer.json"), tokenizer)


def test_gguf_metadata_comes_back(tokenizer, tmp_path):
    table = gguf_tokenizer(tokenizer, ROLES, vocab_size=300)
    again, roles = read_gguf(tmp_path, table, 300)
    assert_same(again, tokenizer)
    assert roles == ROLES
    assert table["tokenizer.ggml.pre"] == (
        "gpt-2" if tokenizer.pattern == GPT2_PATTERN else "smollm"
    )
    assert len(table["tokenizer.ggml.tokens"]) == len(table["tokenizer.ggml.token_type"]) == 300
    with pytest.raises(ValueError, match="not for the 299 tokens"):
        read_gguf(tmp_path, table, 299)


def test_the_tokenizers_library_gives_our_ids(tokenizer):
    files = hugging_face_files(tokenizer, ROLES, 128)
    theirs = Tokenizer.from_str(files["tokenizer.json"])
    for text in [*strings(300), "a<|pad|><|endoftext|> 12"]:
        ids = tokenizer.encode(text, allowed_special="all")
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_a_checkpoint_finds_the_tokenizer_beside_it(tokenizer, tmp_path):
    save_checkpoint(
        GPT(GPTConfig(267, 8, d_model=8, n_layers=1, n_heads=2)), tmp_path / "a.safetensors"
    )
    tokenizer.save(tmp_path / "tokenizer.json")
    assert_same(load_pretrained(tmp_path / "a.safetensors")[1], tokenizer)
    assert read_folder(tmp_path)[1] == Roles(bos=265, eos=265)  # GPT-2's habit
    save_checkpoint(
        GPT(GPTConfig(200, 8, d_model=8, n_layers=1, n_heads=2)), tmp_path / "a.safetensors"
    )
    with pytest.warns(UserWarning, match="its tokenizer has 267 tokens, and the model 200"):
        assert load_pretrained(tmp_path / "a.safetensors")[1] is None


@pytest.mark.parametrize(
    ("settings", "roles"),
    [
        ({}, NO_ROLES),
        ({"eos_token": "<|pad|>"}, Roles(eos=266)),
        ({"eos_token": {"content": "<|pad|>", "lstrip": False}}, Roles(eos=266)),
        ({"bos_token": "<s>", "pad_token": None, "eos_token": ["<|pad|>"]}, NO_ROLES),
        ({"chat_template": "{{ 1 }}"}, Roles(chat_template="{{ 1 }}")),
        ({"chat_template": [{"name": "tools"}]}, NO_ROLES),
    ],
    ids=str,
)
def test_how_others_say_roles(settings, roles, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    put(tmp_path, {"tokenizer_config.json": json.dumps(settings)})
    assert read_folder(tmp_path)[1] == roles


def test_roles_that_can_not_be(tokenizer, tmp_path):
    table = gguf_tokenizer(tokenizer, ROLES, 267)
    for bad in (99_999, "0", 5, -1):  # 5 is an ordinary token
        assert read_gguf(tmp_path, table | {"tokenizer.ggml.eos_token_id": bad}, 267)[1].eos is None
    bad = np.array([265])
    assert read_gguf(tmp_path, table | {"tokenizer.ggml.eos_token_id": bad}, 267)[1].eos is None
    tokenizer.save(tmp_path / "tokenizer.json")
    put(tmp_path, {"tokenizer_config.json": "[]"})
    with pytest.raises(WeightsFileError, match=r"tokenizer_config.json: it is not a JSON object"):
        read_folder(tmp_path)


def test_a_damaged_tokenizer_of_ours(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf8")
    put(tmp_path, {"tokenizer.json": text.replace('"version": 1', '"version": 9')})
    with pytest.raises(WeightsFileError, match=r"tokenizer.json: it is damaged .version 9"):
        read_folder(tmp_path)
