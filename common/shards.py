"""Token shards: a corpus as token ids on disk, written in parallel, opened without being loaded.

    from common.shards import TokenShards, write_shards
    write_shards(documents, tokenizer, "shards", workers=4)
    shards = TokenShards("shards", tokenizer)       # batches: common.dataloader.RandomBatches

A folder of flat files of 16- or 32-bit integers, to be read one after the other, and a
manifest.json that says what they are. The stream opens with an end-of-text token and every document
ends with one, so that every token of every document, its end included, follows something.

No torch here: a worker process imports this module, and torch would cost it seconds and 600 MB.
"""

import errno
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from hashlib import sha256
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from common.corpus import Document
from common.tokenizer import END_OF_TEXT

MANIFEST = "manifest.json"

# ------------------------------------------------------------------- what a tokenizer has to offer
# Ours and tiktoken's will do: `encode(text)`, and `vocab` (id to token) or tiktoken's `n_vocab`.


def vocabulary(tokenizer) -> dict[int, bytes | str]:
    """{id: token}, special tokens included."""
    if hasattr(tokenizer, "vocab"):
        vocab = tokenizer.vocab
        return dict(vocab) if hasattr(vocab, "keys") else dict(enumerate(vocab))
    tokens = {}
    for token_id in range(tokenizer.n_vocab):
        with suppress(KeyError):  # some of tiktoken's vocabularies have gaps
            tokens[token_id] = tokenizer.decode_single_token_bytes(token_id)
    return tokens


def fingerprint(tokenizer) -> str:
    """SHA-256 of the vocabulary. Ours and tiktoken's GPT-2 have the same."""
    digest = sha256()
    for token_id, token in sorted(vocabulary(tokenizer).items()):
        digest.update(f"{token_id} {token!r}\n".encode())
    return digest.hexdigest()


def _end_of_text(tokenizer) -> int:
    known = getattr(tokenizer, "special_tokens", {}).get(END_OF_TEXT)
    known = getattr(tokenizer, "eot_token", known)
    if known is None:
        raise ValueError(
            f"the tokenizer has no {END_OF_TEXT} to put between documents; "
            f'train it with special_tokens=["{END_OF_TEXT}"], or pass end_of_text=<an id>'
        )
    return known


# ---------------------------------------------------------------------------------------- writing


class _Encoder:
    """Texts to arrays of token ids, each closed by end of text; can be sent to another process."""

    def __init__(self, tokenizer, end_of_text: int, dtype: str):
        self.tokenizer, self.end_of_text, self.dtype = tokenizer, end_of_text, dtype

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        # tiktoken's `encode` refuses texts that spell a special token; here they are text like any.
        encode = getattr(self.tokenizer, "encode_ordinary", self.tokenizer.encode)
        return [np.array([*encode(text), self.end_of_text], self.dtype) for text in texts]


def _work_with(encoder: _Encoder) -> None:
    """Give a new worker process its encoder once, rather than with every task."""
    global _encoder
    _encoder = encoder


def _work(texts: list[str]) -> list[np.ndarray]:
    return _encoder(texts)


def _batches(documents: Iterable[Document], characters: int = 1 << 18) -> Iterator[list[str]]:
    """Texts in lists of about 256 K characters: enough to be worth sending to a process."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= characters:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _encode_in_order(documents, encoder: _Encoder, workers: int) -> Iterator[np.ndarray]:
    """One array per document, in order. At most 2 × workers + 1 batches are under way."""
    if workers == 0:
        yield from chain.from_iterable(map(encoder, _batches(documents)))
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_work_with, initargs=(encoder,)
    )
    under_way = deque()
    try:
        for texts in _batches(documents):
            under_way.append(pool.submit(_work, texts))
            if len(under_way) > 2 * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process died: out of memory (try fewer workers), or a script that starts "
            'workers outside `if __name__ == "__main__":`'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_files(arrays: Iterator[np.ndarray], opening: int, folder: Path, shard_tokens: int):
    """Fill shards, each up to the first end of a document at or past `shard_tokens`."""
    shards, documents = [], 0
    for array in arrays:  # the first of a shard; the inner loop takes the others
        if not shards:
            array = np.concatenate([np.array([opening], array.dtype), array])
        path, tokens, digest = folder / f"shard_{len(shards):05}.bin", 0, sha256()
        with path.open("wb") as file:
            for piece in chain([array], arrays):
                file.write(piece.data)
                digest.update(piece.data)
                tokens += len(piece)
                documents += 1
                if tokens >= shard_tokens:
                    break
        shards.append({"file": path.name, "tokens": tokens, "sha256": digest.hexdigest()})
    return shards, documents


def write_shards(
    documents: Iterable[Document],
    tokenizer,
    folder: str | Path,
    *,
    shard_tokens: int = 50_000_000,
    workers: int = 0,
    end_of_text: int | None = None,
    overwrite: bool = False,
) -> "TokenShards":
    """Tokenize documents into a folder of shards and open it. The files don't depend on `workers`.

    documents:    read once; the memory needed is that of a few batches and the longest document
    shard_tokens: a shard ends with the document that reaches this number
    workers:      processes that tokenize; 0 is this one. Each costs half a second to start
    end_of_text:  id of the token after every document; default: the tokenizer's own
    overwrite:    replace shards that are in the folder, once the new ones are complete

    All or nothing: until everything is written the folder has no manifest, and after an error or an
    interrupt nothing new is in it. Raises ValueError for no documents or no end-of-text token,
    FileExistsError for shards that are there already, OSError for a full disk.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds token shards; write elsewhere or pass overwrite=True"
        )
    end_of_text = _end_of_text(tokenizer) if end_of_text is None else end_of_text
    vocab_size = max(end_of_text, *vocabulary(tokenizer)) + 1
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_run in folder.glob(".part-*"):
        shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    arrays = _encode_in_order(documents, _Encoder(tokenizer, end_of_text, dtype), workers)
    try:
        with TemporaryDirectory(prefix=".part-", dir=folder) as part:
            shards, n_documents = _write_files(arrays, end_of_text, Path(part), shard_tokens)
            if not shards:
                raise ValueError("no documents: there is nothing to write")
            manifest = {
                "dtype": dtype,
                "vocab_size": vocab_size,
                "end_of_text": end_of_text,
                "tokenizer": fingerprint(tokenizer),
                "documents": n_documents,
                "shards": shards,
            }
            Path(part, MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf8")
            _move_in(Path(part), folder, [*(shard["file"] for shard in shards), MANIFEST])
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        message = "disk full: no shard was kept; free some space or write elsewhere"
        raise OSError(errno.ENOSPC, message, str(folder)) from None
    finally:
        arrays.close()  # stops the workers
    return TokenShards(folder)


def _move_in(part: Path, folder: Path, names: list[str]) -> None:
    """Move files from `part` to `folder`, the last one last; what they replace goes first."""
    for old in (folder / MANIFEST, *folder.glob("shard_*.bin")):
        old.unlink(missing_ok=True)
    for name in names:
        os.replace(part / name, folder / name)


# ---------------------------------------------------------------------------------------- reading


class TokenShards:
    """A folder written by `write_shards`, memory-mapped: opening reads the manifest and file sizes.

    arrays:      one read-only numpy array of token ids per shard; the disk is read as they are
    documents, end_of_text, vocab_size: of the corpus
    fingerprint: a SHA-256 of everything

    With a tokenizer, checks that it is the one the shards were written with. Raises
    FileNotFoundError where there is no manifest or a shard is missing, ValueError for a damaged
    manifest, a truncated shard, another tokenizer.
    """

    def __init__(self, folder: str | Path, tokenizer=None):
        self.folder = Path(folder)
        try:
            text = (self.folder / MANIFEST).read_text(encoding="utf8")
            manifest = json.loads(text)
            self.documents, self.vocab_size = manifest["documents"], manifest["vocab_size"]
            self.end_of_text, self._shards = manifest["end_of_text"], manifest["shards"]
            self.arrays = [self._map(shard, np.dtype(manifest["dtype"])) for shard in self._shards]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is missing: {self.folder} is no folder of token shards, or an "
                "incomplete one; write it with write_shards"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(
                f"{self.folder / MANIFEST} is damaged; write the shards again"
            ) from None
        if tokenizer is not None and fingerprint(tokenizer) != manifest["tokenizer"]:
            raise ValueError(
                f"{self.folder} was written with another tokenizer ({self.vocab_size:,} tokens, "
                f"yours has {len(vocabulary(tokenizer)):,}); use that one, or write new shards"
            )
        self.fingerprint = sha256(text.encode()).hexdigest()

    def _map(self, shard: dict, dtype: np.dtype) -> np.ndarray:
        path = self.folder / shard["file"]
        size, expected = path.stat().st_size, shard["tokens"] * dtype.itemsize
        if size != expected:
            raise ValueError(
                f"{path} has {size:,} bytes, not the {expected:,} of the manifest: truncated or "
                "changed; write the shards again"
            )
        # A plain array on top of the map: slices of np.memmap itself are ten times as slow.
        return np.asarray(np.memmap(path, dtype, mode="r"))

    def verify(self) -> None:
        """Read everything and compare with the manifest's SHA-256; ValueError if it differs."""
        for shard in self._shards:
            with (self.folder / shard["file"]).open("rb") as file:
                digest = sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != shard["sha256"]:
                raise ValueError(
                    f"{shard['file']} has changed since it was written; write it again"
                )

    def __len__(self) -> int:
        """Number of tokens."""
        return sum(len(array) for array in self.arrays)

    def __repr__(self) -> str:
        counts = f"{len(self):,} tokens, {self.documents:,} documents, {len(self.arrays)} shards"
        return f"TokenShards({str(self.folder)!r}: {counts})"

    def __reduce__(self):  # to a worker process goes the address, not the corpus
        return type(self), (self.folder,)
