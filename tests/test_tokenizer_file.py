"""Tokenizers on disk: what is written comes back, and what is damaged is refused in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tokenizer import BPETokenizer
from common.tokenizer_file import from_printable, parse_merge, to_printable


@pytest.fixture
def saved(tmp_path):
    tokenizer = BPETokenizer.train("a rose is a rose is a rose\n", 270, ["<|endoftext|>", "<|é|>"])
    tokenizer.save(tmp_path / "rose.json")
    return tokenizer, tmp_path / "rose.json"


@settings(deadline=None)
@given(st.binary())
def test_bytes_show_as_printable_characters_and_come_back(token):
    text = to_printable(token)
    assert len(text) == len(token)
    assert text.isprintable()
    assert " " not in text
    assert from_printable(text) == token


def test_a_space_shows_as_gpt2_shows_it():
    assert to_printable(b" the\n") == "ĠtheĊ"
    assert parse_merge("Ġt he") == (b" t", b"he")


@pytest.mark.parametrize("line", ["a", "a b c", "a  b", " ", "", "a \u4e00"])
def test_a_damaged_merge_is_refused(line):
    with pytest.raises(ValueError, match=r"merge|stands for no byte"):
        parse_merge(line)


def test_what_is_saved_comes_back(saved):
    tokenizer, path = saved
    loaded = BPETokenizer.load(str(path))
    for name in ("merges", "vocab", "special_tokens", "pattern"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert [file.name for file in path.parent.iterdir()] == ["rose.json"]


def test_an_explicit_vocabulary_comes_back(saved, tmp_path):
    tokenizer, _ = saved
    n = tokenizer.vocab_size - len(tokenizer.special_tokens)
    backwards = {n - i: tokenizer.vocab[i] for i in range(n)}  # ids n down to 1
    other = BPETokenizer(tokenizer.merges, {"<|begin|>": 0}, backwards)
    other.save(tmp_path / "other.json")
    loaded = BPETokenizer.load(tmp_path / "other.json")
    assert loaded.vocab == other.vocab
    expected = [0] + [n - i for i in tokenizer.encode("a rose is")]
    assert loaded.encode("<|begin|>a rose is", allowed_special="all") == expected


def test_people_can_read_the_file(saved):
    lines = saved[1].read_text(encoding="utf8").splitlines()
    assert '  "r o",' in lines or '  "o s",' in lines
    assert '  "<|endoftext|>": 263,' in lines


def test_a_truncated_file_is_refused(saved):
    _, path = saved
    content = path.read_bytes()
    for length in range(0, len(content) - 2, 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"rose\.json is damaged") as caught:
            BPETokenizer.load(path)
        assert "\n" not in str(caught.value)


def damaged(**changes):
    return pytest.param(lambda data: data | changes, id=str(changes)[:60])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: [data],
        lambda data: {**data, "merges": data["merges"][1:]},
        lambda data: {**data, "merges": data["merges"] + data["merges"][:1]},
        lambda data: {**data, "special_tokens": {"<|x|>": 5, "<|y|>": 263}},
        lambda data: {**data, "vocab": {line: n for n, line in enumerate("abc")}},
        *[lambda data, key=key: {k: v for k, v in data.items() if k != key}
          for key in ("format", "version", "pattern", "special_tokens", "merges")],
        damaged(format="something else"),
        damaged(version=2),
        damaged(version=None),
        damaged(pattern="("),
        damaged(pattern=7),
        damaged(merges={}),
        damaged(merges=[1, 2]),
        damaged(merges=["a"]),
        damaged(merges=["a b c"]),
        damaged(merges=[["a", "b"]]),
        damaged(merges=["a 漢"]),
        damaged(special_tokens=[]),
        damaged(special_tokens={"": 263}),
        damaged(special_tokens={"<|x|>": "263"}),
        damaged(special_tokens={"<|x|>": 263.0}),
        damaged(special_tokens={"<|x|>": 264}),
        damaged(special_tokens={"<|x|>": -1}),
        damaged(special_tokens={"\ud800": 263}),
        damaged(vocab=[]),
        damaged(vocab=""),
        damaged(vocab={}),
        damaged(vocab={"a": 0, "b": 0}),
        damaged(vocab={"a": None}),
        damaged(merges=[], special_tokens={"<|x|>": 1}, vocab={"a": 0, "b": 0}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(saved, damage):
    _, path = saved
    data = damage(json.loads(path.read_text(encoding="utf8")))
    path.write_text(json.dumps(data), encoding="utf8")
    with pytest.raises(ValueError, match=r"rose\.json is damaged") as caught:
        BPETokenizer.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"NaN", b'{"a": 1, "a": 2}'],
    ids=["empty", "not UTF-8", "deep", "null", "NaN", "a key twice"],
)
def test_any_other_file_is_refused(tmp_path, content):
    path = tmp_path / "rose.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rose\.json is damaged") as caught:
        BPETokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_a_special_token_twice_in_the_file_is_refused(saved):
    _, path = saved
    text = path.read_text(encoding="utf8").replace("<|é|>", "<|endoftext|>")
    path.write_text(text, encoding="utf8")
    with pytest.raises(ValueError, match="is there twice"):
        BPETokenizer.load(path)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "nothing.json")


def test_what_cannot_be_written_is_said_in_one_line(saved, tmp_path):
    tokenizer, path = saved
    for unwritable in (tmp_path / "no such folder" / "x.json", path / "x.json", tmp_path):
        with pytest.raises(OSError, match=r"can't write .*choose a folder") as caught:
            tokenizer.save(unwritable)
        assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["rose.json"]


def test_a_full_disk_leaves_the_old_file(saved, monkeypatch):
    tokenizer, path = saved
    before = path.read_bytes()

    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="No space left on device"):
        tokenizer.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["rose.json"]
