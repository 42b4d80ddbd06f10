"""What a file or folder of weights is recognised as, and what is refused.

uv run pytest tests/test_sources.py
"""

import json
import pickle
import random
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from unicodedata import ucd_3_2_0

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from common.assets import fetch
from common.gguf_file import GGUFFile
from common.gpt import GPT, PRESETS, GPTConfig
from common.pretokenizer import DIGITS_PATTERN, GPT2_PATTERN
from common.sources import open_source
from common.tokenizer import BPETokenizer
from common.weights import WeightsFileError, load_pretrained, save_checkpoint

TINY = GPTConfig(20, 8, d_model=8, n_layers=1, n_heads=2)
SMOLLM2_LACKS = bytes([4, 6, 0x13, 0x14, 0x16, 0x1D])  # control characters without a token


# --------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def smollm2_metadata():
    return GGUFFile(fetch("smollm2-135m")).metadata


@pytest.fixture(scope="module")
def reference(smollm2_metadata) -> Tokenizer:
    """The same vocabulary and merges in Hugging Face's tokenizers, set up as SmolLM2's."""
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in smollm2_metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = smollm2_metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == 3])
    return tokenizer


# Libraries disagree about characters that came with the latest versions of Unicode.
ASSIGNED = [chr(c) for c in range(0xA0, 0x30000) if ucd_3_2_0.category(chr(c)) not in ("Cn", "Cs")]


def strings(n: int) -> list[str]:
    """English words, digits, white space, contractions and Unicode, in every mixture."""
    rng = random.Random(0)
    words = fetch("story").read_text(encoding="utf8").split()
    signs = ["'s", "'ll", "'D", "¼", "½", "٣", "Ⅷ", "五", "é", "e\u0301", "ß", "İ", "🙂", "👩‍👩‍👧"]
    signs += ["\u200d", "\ufeff", "\u00a0", "\u2028", "\x85", "\x1c", "\x00", "\ud7ff", "\ue000"]
    spaces = ["", "", " ", " ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\r\n", "\u3000"]

    def piece() -> str:
        kind = rng.randrange(8)
        if kind < 3:
            return rng.choice(words)
        if kind < 5:
            return str(rng.randrange(10 ** rng.randrange(1, 9)))
        if kind == 5:
            return rng.choice(signs)
        if kind == 6:
            return "".join(map(chr, (rng.randrange(32, 127) for _ in range(3))))
        return rng.choice(ASSIGNED)

    return [
        "".join(rng.choice(spaces) + piece() for _ in range(rng.randrange(1, 9))) for _ in range(n)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return open_source(fetch("smollm2-135m")).tokenizer


def test_the_tokenizer_in_the_gguf_gives_the_ids_of_the_reference(tokenizer, reference):
    texts = strings(10_000)
    expected = [encoding.ids for encoding in reference.encode_batch(texts)]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens_of_the_chat(tokenizer, reference):
    chat = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(chat, allowed_special="all")
    assert ids == reference.encode(chat).ids
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == chat
    assert len(tokenizer.encode(chat)) > len(ids)  # typed by a user, they are ordinary text


def test_bytes_that_smollm2_has_no_token_for(tokenizer):
    for byte in SMOLLM2_LACKS:
        with pytest.raises(ValueError, match="no token"):
            tokenizer.encode(f"a{chr(byte)}")


TOKENS = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]


def gguf_file(folder, **changes):
    """A GGUF file with a tokenizer and hardly a model; `None` leaves a key out."""
    table = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": ["a b"]}
    table = table | {"token_type": [3] + [1] * 257} | changes
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in table.items():
        if value is not None:
            add = writer.add_array if isinstance(value, list) else writer.add_string
            add(f"tokenizer.ggml.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((258, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def test_a_tokenizer_in_a_gguf(tmp_path):
    for pre, pattern in (("smollm", DIGITS_PATTERN), ("gpt-2", GPT2_PATTERN)):
        tokenizer = open_source(gguf_file(tmp_path, pre=pre)).tokenizer
        assert tokenizer.encode("<|end|>ab", allowed_special="all") == [0, 257]
        assert tokenizer.pattern == pattern
    assert open_source(gguf_file(tmp_path, tokens=None)).tokenizer is None
    for other in ({"model": "llama"}, {"pre": "qwen2"}, {"pre": None}, {"pre": ["smollm"]}):
        with pytest.warns(UserWarning, match="tokenizer is not of a kind known here"):
            assert open_source(gguf_file(tmp_path, **other)).tokenizer is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": TOKENS[:-1]}, "incomplete"),
        ({"tokens": list(range(258))}, "incomplete"),
        ({"merges": None}, "incomplete"),
        ({"merges": "a b"}, "incomplete"),
        ({"token_type": None}, "incomplete"),
        ({"token_type": [1]}, "incomplete"),
        ({"merges": ["ab"]}, "'ab' is not two tokens"),
        ({"merges": ["b a"]}, "merge 0"),
        ({"tokens": [*TOKENS[:-1], "日"]}, "'日'"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "merge 0"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_damaged_tokenizer_in_a_gguf_is_refused(tmp_path, changes, reason):
    assert_refused(gguf_file(tmp_path, **changes), reason)


def tokenizer_json(folder, steps, **changes) -> None:
    """tokenizer.json as Hugging Face's library writes it, over a tiny vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "12", "ab", "Ġab", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("1", "2"), ("a", "b"), ("Ġ", "ab")]))
    tokenizer.pre_tokenizer = steps
    tokenizer.add_special_tokens(["<|end|>"])
    table = json.loads(tokenizer.to_str())
    for key, value in changes.items():
        table[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(table), encoding="utf8")


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama of 260 tokens, as Hugging Face's `save_pretrained` leaves it."""
    config = {
        "model_type": "llama",
        "vocab_size": 260,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf8")
    save_file(llama_weights(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def llama_weights() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (260, 8), "norm": (8,)}
    layer = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    layer |= {f"self_attn.{part}_proj": (8, 8) for part in "qkvo"}
    layer |= {"mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16)}
    shapes |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    return {f"model.{k}.weight": torch.randn(shape, generator=g) for k, shape in shapes.items()}


@pytest.mark.parametrize("steps", [BYTES, pre_tokenizers.Sequence([DIGITS, BYTES])])
def test_tokenizer_json(folder, steps):
    tokenizer_json(folder, steps)
    ours = open_source(folder).tokenizer
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("ab 12 ab", "ab12  12", " 12\n ab<|end|>", "  1"):
        assert ours.encode(text, allowed_special="all") == theirs.encode(text).ids


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (pre_tokenizers.Split(Regex(r"\d"), "isolated"), {}),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}),
        (pre_tokenizers.Whitespace(), {}),
        (BYTES, {"normalizer": {"type": "NFC"}}),
        (BYTES, {"model": {"type": "Unigram", "vocab": []}}),
        (BYTES, {"pre_tokenizer": None}),
    ],
)
def test_a_tokenizer_of_another_kind_is_none_and_said_so(folder, steps, changes):
    tokenizer_json(folder, steps, **changes)
    with pytest.warns(UserWarning, match="tokenizer is not of a kind known here"):
        assert open_source(folder).tokenizer is None


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "BPE", "vocab": {"日": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": [], "merges": 7}},
        {"model": 5},
        {"pre_tokenizer": 5},
        {"added_tokens": [{"content": "<|end|>"}]},
    ],
    ids=str,
)
def test_a_damaged_tokenizer_is_refused(folder, changes):
    tokenizer_json(folder, BYTES, **changes)
    assert_refused(folder, "tokenizer.json: it is damaged")


# ------------------------------------------------------------------------------- files and folders


def assert_refused(path, reason: str) -> None:
    with pytest.raises(WeightsFileError) as caught:
        load_pretrained(path)
    message = str(caught.value)
    assert reason in message
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 600


def test_pickles_are_refused_whatever_they_are_called(tmp_path):
    weights = {"wte.weight": torch.zeros(2, 2)}
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors"):
        torch.save(weights, tmp_path / name)
        assert_refused(tmp_path / name, "it is a pickle")
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=False)
        assert_refused(tmp_path / name, "it is a pickle")
        (tmp_path / name).write_bytes(pickle.dumps(weights))
        assert_refused(tmp_path / name, ".safetensors version")


class Burglar:
    """What unpickling it does is up to whoever pickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_runs_code_even_if_it_looks_like_ours(tmp_path):
    file, traces = tmp_path / "model.pt", tmp_path / "traces"
    config = asdict(TINY)
    for table in (
        {"gpt_config": config, "state_dict": {"head.weight": Burglar(traces)}},
        {"gpt_config": Burglar(traces), "state_dict": GPT(TINY).state_dict()},
    ):
        torch.save(table, file)
        assert_refused(file, "it is a pickle")
        assert not traces.exists()
        torch.load(file, weights_only=False)  # what would have happened
        assert traces.exists()
        traces.unlink()


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"gpt_config": asdict(TINY), "state_dict": {}}, "belongs to another file"),
        ({"gpt_config": {"n_heads": 7}, "state_dict": {}}, "configuration can't be understood"),
        ({"gpt_config": [1], "state_dict": {}}, "configuration can't be understood"),
        ({"gpt_config": {}, "state_dict": {"a": torch.ones(2).int()}}, "as torch.int32, not as"),
        ({"gpt_config": {}, "state_dict": {"a": torch.eye(2).to_sparse()}}, "not as a plain float"),
        ({"gpt_config": {}, "state_dict": {"a": 1.0}}, "it is a pickle"),
        ({"state_dict": {"a": torch.ones(2)}}, "it is a pickle"),
        ([torch.ones(2)], "it is a pickle"),
    ],
    ids=["empty", "odd", "list", "integers", "sparse", "numbers", "no configuration", "no table"],
)
def test_pytorch_files_that_do_not_belong(table, reason, tmp_path):
    torch.save(table, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", reason)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"a": np.ones(2)}, "'gpt_config.json' in the archive"),
        ({"a": np.ones(2), "gpt_config.json": b"{}"}, "its 'a' is stored as float64"),
        ({"a": np.array([None]), "gpt_config.json": b"{}"}, "'a.npy' is not an array as numpy"),
        ({"a": np.ones(2, np.float32), "gpt_config.json": b"[1]"}, "can't be understood"),
        ({"a": np.ones(2, np.float32), "gpt_config.json": b"{}"}, "belongs to another file"),
    ],
    ids=["no configuration", "float64", "objects", "list", "another"],
)
def test_numpy_files_that_do_not_belong(arrays, reason, tmp_path):
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        for name, value in arrays.items():
            if isinstance(value, bytes):
                archive.writestr(name, value)
            else:
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, value)
    assert_refused(tmp_path / "model.npz", reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no sound safetensors file"),
        (b"\xff" * 100, "no sound safetensors file"),
        (b"\x10" + b"\0" * 7 + b"not JSON at all!", "no sound safetensors file"),
        (b"<!DOCTYPE html><html>sign in to download</html>", "no sound safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "no sound safetensors file"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path, content, reason):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert_refused(tmp_path / "model.safetensors", reason)
    assert_refused(tmp_path, reason)


def test_other_models_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"conv.weight": torch.zeros(2)}, file)
    assert_refused(file, "neither GPT-2's nor Llama's")
    save_file({"wte.weight": torch.zeros(2, 2, dtype=torch.int8)}, file)
    assert_refused(file, "stored as I8")
    save_file({"wte.weight": torch.zeros(2, 2), "transformer.wte.weight": torch.zeros(2, 2)}, file)
    assert_refused(file, "'wte.weight' twice")
    save_file({"wte.weight": torch.zeros(2, 2)}, file)
    assert_refused(file, "load_pretrained(path, config=GPTConfig(...))")


def test_folders(tmp_path):
    assert_refused(tmp_path, "has no .safetensors")
    save_checkpoint(GPT(TINY), tmp_path / "mine.safetensors")
    assert open_source(tmp_path).config == TINY
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "copy.safetensors")
    assert_refused(tmp_path, "has 2 files of weights")
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "model.safetensors")
    assert open_source(tmp_path).config == TINY


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"smollm2-135m") as caught:
        load_pretrained(tmp_path / "gpt5")
    assert "\n" not in str(caught.value)


def test_shards(folder):
    (folder / "model.safetensors").unlink()
    weights, files = llama_weights(), {}
    for i, name in enumerate(weights):
        files.setdefault(f"model-{i % 3:05}-of-00003.safetensors", {})[name] = weights[name]
    for file, part in files.items():
        save_file(part, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf8")
    model, _ = load_pretrained(folder)
    torch.testing.assert_close(model.token_embedding.weight, weights["model.embed_tokens.weight"])
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert_refused(folder, "'model-00002-of-00003.safetensors', which is no file")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "'../model.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd'"),
        ({"weight_map": {"a": "gone.safetensors"}}, "'gone.safetensors'"),
        ({"weight_map": {"a": ["b"]}}, "which is no file"),
        ({"weight_map": {}}, "neither GPT-2's nor Llama's"),
        ({"weight_map": 3}, "neither GPT-2's nor Llama's"),
        ([], "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_strange_indexes_of_shards(tmp_path, index, reason):
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf8")
    assert_refused(tmp_path, reason)


def test_openai_s_gpt2_is_known_by_its_size(tmp_path):
    small = PRESETS["gpt2-124m"]
    tensors = {f"h.{i}.ln_1.weight": torch.zeros(1) for i in range(12)}
    tensors["wte.weight"] = torch.zeros(small.vocab_size, small.d_model, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source(tmp_path / "model.safetensors")
    assert source.config == small
    assert source.tokenizer.encode("Hello world") == [15496, 995]
    save_file(tensors | {"h.12.ln_1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", "config.json beside it")
