"""Token shards on disk: uv run pytest tests/test_shards.py"""

import errno
import io
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import shards as shards_module
from common.corpus import Document
from common.shards import MANIFEST, TokenShards, fingerprint, write_shards
from common.tokenizer import END_OF_TEXT, BPETokenizer, WordTokenizer, gpt2_tokenizer


class ByteTokenizer:
    """Ids 0 to 255 are the bytes; the end of text is 256."""

    def __init__(self):
        self.vocab = {i: bytes([i]) for i in range(256)} | {256: END_OF_TEXT.encode()}
        self.special_tokens = {END_OF_TEXT: 256}

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf8"))


def named(*texts: str) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


def stream(shards: TokenShards) -> list[int]:
    return np.concatenate(shards.arrays).tolist()


def expected(texts) -> list[int]:
    return [256] + [i for text in texts for i in [*text.encode("utf8"), 256]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---------------------------------------------------------------------------------------- writing


@given(st.lists(st.text(max_size=30), min_size=1, max_size=10), st.integers(1, 80))
def test_what_is_written_is_read(texts, shard_tokens):
    from tempfile import TemporaryDirectory

    # Windows can't delete what is mapped: let go of the shards before the folder goes.
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shards = write_shards(named(*texts), ByteTokenizer(), folder, shard_tokens=shard_tokens)
        assert stream(shards) == expected(texts)
        assert len(shards) == len(expected(texts))
        assert shards.documents == len(texts)
        assert all(len(array) >= shard_tokens for array in shards.arrays[:-1])
        assert all(array[-1] == shards.end_of_text for array in shards.arrays)
        shards.verify()
        del shards


def test_workers_write_the_same_files(tmp_path):
    """More batches than may be under way at once; a tokenizer that is sent to each process."""
    documents = named(*(chr(97 + i % 26) * 30_000 for i in range(80)))
    tokenizer = BPETokenizer.train("ab" * 100, 258, special_tokens=[END_OF_TEXT])
    one = write_shards(documents, tokenizer, tmp_path / "one", shard_tokens=100_000)
    two = write_shards(documents, tokenizer, tmp_path / "two", shard_tokens=100_000, workers=2)
    assert files(one.folder) == files(two.folder)
    assert one.fingerprint == two.fingerprint
    assert len(one.arrays) > 10


def test_gpt2_tokenizers_are_interchangeable(tmp_path):
    """tiktoken's and ours write the same shards, with the text of a special token as plain text."""
    documents = named("Hello, world!", f"To spell {END_OF_TEXT} ends nothing.")
    theirs = write_shards(documents, gpt2_tokenizer(), tmp_path / "theirs")
    ours = write_shards(documents, BPETokenizer.gpt2(), tmp_path / "ours")
    assert files(theirs.folder) == files(ours.folder)
    assert stream(ours).count(50256) == 3
    assert ours.arrays[0].dtype == np.uint16
    TokenShards(tmp_path / "ours", gpt2_tokenizer())


def test_word_tokenizer(tmp_path):
    tokenizer = WordTokenizer.train("to be or not to be")
    shards = write_shards(named("to be"), tokenizer, tmp_path, end_of_text=0)
    assert stream(shards) == [0, *tokenizer.encode("to be"), 0]


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_width_follows_the_vocabulary(tmp_path, largest, dtype):
    class Wide(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab[largest] = b"last"

        def encode(self, text):
            return [largest] * len(text)

    shards = write_shards(named("ab"), Wide(), tmp_path)
    assert shards.arrays[0].dtype == dtype
    assert stream(shards) == [256, largest, largest, 256]


def test_no_end_of_text(tmp_path):
    tokenizer = BPETokenizer.train("abab", 257)
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|> to put between documents; train"):
        write_shards(named("a"), tokenizer, tmp_path)
    assert write_shards(named("a"), tokenizer, tmp_path, end_of_text=0).end_of_text == 0


def test_no_documents(tmp_path):
    with pytest.raises(ValueError, match="nothing to write"):
        write_shards([], ByteTokenizer(), tmp_path)
    assert files(tmp_path) == {}


def test_shards_are_not_overwritten_unasked(tmp_path):
    write_shards(named("old", "older"), ByteTokenizer(), tmp_path, shard_tokens=1)
    before = files(tmp_path)
    with pytest.raises(
        FileExistsError, match="holds token shards; write elsewhere or pass overwrite"
    ):
        write_shards(named("new"), ByteTokenizer(), tmp_path)
    assert files(tmp_path) == before
    shards = write_shards(named("new"), ByteTokenizer(), tmp_path, overwrite=True)
    assert stream(shards) == expected(["new"])
    assert sorted(files(tmp_path)) == [MANIFEST, "shard_00000.bin"]


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    (tmp_path / ".part-killed").mkdir()
    (tmp_path / ".part-killed" / "shard_00000.bin").write_bytes(b"xx")
    write_shards(named("a"), ByteTokenizer(), tmp_path)
    assert sorted(files(tmp_path)) == [MANIFEST, "shard_00000.bin"]


@pytest.mark.parametrize(("workers", "overwrite"), [(0, False), (0, True), (1, False)])
def test_an_error_on_the_way_leaves_the_folder_as_it_was(tmp_path, workers, overwrite):
    if overwrite:
        write_shards(named("old"), ByteTokenizer(), tmp_path)
    before = files(tmp_path)

    def documents():
        yield from named("x" * 600_000, "y" * 600_000)
        raise ValueError("z.txt is not UTF-8")

    with pytest.raises(ValueError, match="not UTF-8"):
        write_shards(documents(), ByteTokenizer(), tmp_path, workers=workers, overwrite=overwrite)
    assert files(tmp_path) == before


def test_full_disk(tmp_path, monkeypatch):
    class SmallDisk(io.FileIO):
        left = 5_000

        def write(self, data):
            SmallDisk.left -= len(data)
            if SmallDisk.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    open_ = Path.open
    small = lambda path, mode="r", **k: (
        SmallDisk(path, mode) if "w" in mode else open_(path, mode, **k)
    )
    monkeypatch.setattr(shards_module.Path, "open", small)
    texts = ["x" * 1000] * 10
    with pytest.raises(OSError, match="disk full: no shard was kept; free some space") as error:
        write_shards(named(*texts), ByteTokenizer(), tmp_path, shard_tokens=1000)
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert stream(write_shards(named(*texts), ByteTokenizer(), tmp_path)) == expected(texts)


def test_writing_takes_constant_memory(tmp_path):
    """8 MB of text go through while 2 MB may be held: neither texts nor ids pile up."""

    class Encoder(ByteTokenizer):
        def encode(self, text):
            return np.frombuffer(text.encode(), np.uint8)[:2000]

    peaks = []
    for n in (40, 400):
        documents = (Document(str(i), chr(97 + i % 26) * 20_000) for i in range(n))
        tracemalloc.start()
        write_shards(documents, Encoder(), tmp_path / str(n), shard_tokens=50_000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2_000_000
    assert peaks[1] < peaks[0] * 1.5


def test_workers_get_no_more_than_they_can_chew(tmp_path, monkeypatch):
    """Documents are drawn only as results are taken: at most 2 × workers + 1 batches ahead."""
    drawn = taken = ahead = 0

    def documents():
        nonlocal drawn
        for i in range(40):
            drawn += 1
            yield Document(str(i), "x" * (1 << 18))  # a batch each

    encoder = shards_module._Encoder(ByteTokenizer(), 256, "<u2")
    for _ in shards_module._encode_in_order(documents(), encoder, workers=1):
        ahead = max(ahead, drawn - taken)
        taken += 1
    assert taken == 40
    assert ahead <= 3


# ---------------------------------------------------------------------------------------- reading


@pytest.fixture
def folder(tmp_path):
    write_shards(named("one", "two", "three"), ByteTokenizer(), tmp_path, shard_tokens=4)
    return tmp_path


def test_opening_reads_no_tokens(folder, monkeypatch):
    monkeypatch.setattr(np, "fromfile", None)
    shards = TokenShards(folder)
    for array in shards.arrays:
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)
        assert not array.flags.writeable
    assert "3 documents" in repr(shards)


def test_to_another_process_goes_the_address(folder):
    shards = TokenShards(folder)
    assert len(pickle.dumps(shards)) < 500
    assert stream(pickle.loads(pickle.dumps(shards))) == stream(shards)


def test_missing_manifest(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"manifest\.json is missing: .* is no folder of token"
    ):
        TokenShards(tmp_path)


def test_missing_shard(folder):
    (folder / "shard_00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00001\.bin is missing"):
        TokenShards(folder)


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"{", b"{}", b"[]", b'{"documents": 1'])
def test_damaged_manifest(folder, damage):
    (folder / MANIFEST).write_bytes(damage)
    with pytest.raises(ValueError, match="is damaged; write the shards again"):
        TokenShards(folder)


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: b"", lambda data: data + b"\0\0"]
)
def test_truncated_empty_or_longer_shard(folder, change):
    path = folder / "shard_00000.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ValueError, match=r"shard_00000\.bin has \d+ bytes, not the 10 of the manifest"
    ):
        TokenShards(folder)


def test_changed_shard_is_found_by_verify(folder):
    path = folder / "shard_00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"shard_00000\.bin has changed since it was written"):
        TokenShards(folder).verify()


def test_shards_of_another_tokenizer(folder):
    other = ByteTokenizer()
    TokenShards(folder, other)
    other.vocab[65], other.vocab[66] = other.vocab[66], other.vocab[65]
    with pytest.raises(ValueError, match=r"was written with another tokenizer \(257 tokens, yours"):
        TokenShards(folder, other)


def test_fingerprint_knows_order_and_size():
    one, two, three = (ByteTokenizer() for _ in range(3))
    del two.vocab[255]
    three.vocab[1] = b"other"
    assert len({fingerprint(t) for t in (one, two, three)}) == 3


def test_manifest_is_readable_json(folder):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
    assert manifest["dtype"] == "<u2"
    assert [shard["tokens"] for shard in manifest["shards"]] == [5, 4, 6]
