"""From texts to what a pretraining run reads: a held-out part, a tokenizer, token shards.

    data = open_data(prepare("run", Texts(["shakespeare"]), vocab_size=4096))
    data.tokenizer, data.train, data.validation, data.bytes_per_token

A text is a UTF-8 file, a .jsonl file, a folder of .txt files, or a corpus by name:

    shakespeare  38 plays, of which three are held out: a tragedy, a comedy, a history
    docstrings   those of all installed packages, without near-copies, one file in twenty held out
"""

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import corpus, distributed
from common.corpus import Document
from common.evaluation import IGNORED
from common.shards import TokenShards, fingerprint, write_shards
from common.tokenizer import END_OF_TEXT, BPETokenizer
from common.tokenizer_file import write_atomically

HELD_OUT_PLAYS = ("tragedies/hamlet.md", "comedies/twelfth-night.md", "histories/henry-v.md")
Documents = Callable[[], Iterable[Document]]  # from the beginning, each time


def shakespeare() -> tuple[Documents, Documents]:
    """Training and validation documents."""
    plays = list(corpus.normalised(corpus.read_shakespeare()))
    return _sides(plays, lambda play: play.name in HELD_OUT_PLAYS)


def docstrings() -> tuple[Documents, Documents]:
    """The same. Copies go before the split, which is by file: there texts resemble each other."""
    documents = corpus.drop_exact_duplicates(corpus.normalised(corpus.harvest_docstrings()))
    distinct = list(corpus.drop_near_duplicates(documents, threshold=0.5))
    return _sides(distinct, lambda d: corpus.uniform(d.name.partition(":")[0], seed=0) < 0.05)


CORPORA = {"shakespeare": shakespeare, "docstrings": docstrings}


def _sides(documents: list[Document], held_out: Callable[[Document], bool]):
    train = [document for document in documents if not held_out(document)]
    validation = [document for document in documents if held_out(document)]
    return lambda: train, lambda: validation


# ------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Texts:
    """What to train on, and what to validate on: paths, or one name of `CORPORA`.

    Without `validation`, the last tenth of every file is held out; of a folder or a .jsonl file,
    one document in ten.
    """

    train: Sequence[str]
    validation: Sequence[str] = ()

    def __post_init__(self):
        for name in (*self.train, *self.validation):
            if name not in CORPORA and not Path(name).exists():
                raise ValueError(f"{name}: no such file, and no corpus ({', '.join(CORPORA)})")
        named = CORPORA.keys() & {*self.train, *self.validation}
        if named and (len(self.train) > 1 or not named <= set(self.train)):
            raise ValueError("a corpus by its name stands alone, and brings its own validation")

    def sides(self) -> tuple[Documents, Documents]:
        """Training and validation documents."""
        if self.train[0] in CORPORA:
            train, validation = CORPORA[self.train[0]]()
            return train, (lambda: _read(self.validation)) if self.validation else validation
        if self.validation:
            return lambda: _read(self.train), lambda: _read(self.validation)
        return lambda: _split(self.train, False), lambda: _split(self.train, True)

    def digest(self) -> str:
        """The name of a corpus, or a SHA-256 of everything that is in the files."""
        return "; ".join(
            name if name in CORPORA else _digest(Path(name))
            for name in (*self.train, *self.validation)
        )


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.glob("**/*.txt") if p.is_file()) if path.is_dir() else [path]


def _digest(path: Path) -> str:
    digest = sha256()
    for file in _files(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read(names: Iterable[str]) -> Iterator[Document]:
    for path in map(Path, names):
        if path.is_dir():
            yield from corpus.normalised(corpus.read_documents(path))
        elif path.suffix == ".jsonl":
            lines = corpus.read_documents(path.parent, glob.escape(path.name))
            yield from corpus.normalised(lines)
        else:
            yield Document(path.name, corpus.normalise(corpus.read_text(path)))


def _split(names: Iterable[str], validation: bool) -> Iterator[Document]:
    for name in names:
        whole = Path(name).is_file() and Path(name).suffix != ".jsonl"
        for document in _read([name]):
            if not whole:
                if corpus.in_validation(document) == validation:
                    yield document
                continue
            text = document.text
            cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
            yield Document(document.name, text[cut:] if validation else text[:cut])


# ----------------------------------------------------------------------------------- what is made


@dataclass(frozen=True)
class PretrainingData:
    """What `open_data` opens: a tokenizer, its shards, how long its tokens are in `validation`."""

    tokenizer: BPETokenizer
    train: TokenShards
    validation: TokenShards
    bytes_per_token: float
    characters_per_token: float
    identity: dict  # what must be the same for a run to go on


@dataclass(frozen=True)
class _Record:
    """What `data.json` says of the folder that it is in. Written last: then all is complete."""

    text: str
    vocab_size: int | None  # that a tokenizer was trained for
    tokenizer: str
    validation_bytes: int
    validation_characters: int


def prepare(
    folder: str | Path,
    texts: Texts,
    *,
    tokenizer: BPETokenizer | None = None,
    vocab_size: int = 4096,
    workers: int = 0,
) -> Path:
    """Tokenize `texts` into `folder`, unless that is done; returns the folder, for `open_data`.

    tokenizer: None trains one of `vocab_size` on the training documents; it becomes tokenizer.json
    workers:   processes that tokenize, as in `write_shards`

    Raises ValueError for a folder with the data of another text or tokenizer, for texts that are
    empty or too short to hold anything out; AssetUnavailable for a corpus that is not here.
    """
    folder = Path(folder)
    asked = None if tokenizer else vocab_size
    if record := _recorded(folder):
        _check_same(folder, record, texts, tokenizer, asked)
        return folder
    train, validation = texts.sides()
    if tokenizer is None:
        chunks = (document.text for document in train())
        tokenizer = BPETokenizer.train(chunks, vocab_size, [END_OF_TEXT])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    write = lambda documents, name: write_shards(
        documents, tokenizer, folder / "shards" / name, workers=workers, overwrite=True
    )
    write(train(), "train")
    lengths = _Lengths()
    try:
        write(lengths.counted(validation()), "validation")
    except ValueError as error:
        raise ValueError(f"{error}: nothing is held out; pass --validation FILE") from None
    record = _Record(
        texts.digest(), asked, fingerprint(tokenizer), lengths.bytes, lengths.characters
    )
    write_atomically(folder / "data.json", json.dumps(asdict(record), indent=1) + "\n")
    return folder


class _Lengths:
    """How long the documents are that pass by."""

    def __init__(self):
        self.bytes = self.characters = 0

    def counted(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.bytes += len(document.text.encode("utf8", "replace"))
            self.characters += len(document.text)
            yield document


def _recorded(folder: Path) -> _Record | None:
    path = folder / "data.json"
    try:
        return _Record(**json.loads(path.read_text(encoding="utf8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; remove it, and the data will be made again") from None


def _check_same(folder: Path, record: _Record, texts: Texts, tokenizer, asked: int | None) -> None:
    for what, same in (
        ("another text", record.text == texts.digest()),
        ("another vocabulary size", tokenizer or record.vocab_size == asked),
        ("another tokenizer", not tokenizer or record.tokenizer == fingerprint(tokenizer)),
    ):
        if not same:
            raise ValueError(f"{folder} holds the data of {what}; use that, or another folder")


def open_data(folder: str | Path) -> PretrainingData:
    """Open what `prepare` made. Raises ValueError or FileNotFoundError where a part is damaged."""
    folder = Path(folder)
    record = _recorded(folder)
    if record is None:
        raise FileNotFoundError(f"{folder} has no data.json: its data is incomplete; prepare it")
    tokenizer = BPETokenizer.load(folder / "tokenizer.json")
    train, validation = (
        TokenShards(folder / "shards" / name, tokenizer) for name in ("train", "validation")
    )
    return PretrainingData(
        tokenizer,
        train,
        validation,
        record.validation_bytes / len(validation),
        record.validation_characters / len(validation),
        {"text": record.text, "tokenizer": record.tokenizer, "shards": train.fingerprint},
    )


def windows_in_order(
    shards: TokenShards, batch_size: int, context_length: int, max_tokens: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """This rank's batches (inputs, targets) of a text of which every token is a target once.

    With `max_tokens`, windows that lie evenly all over the text, with about so many tokens. What a
    rank lacks, to have as many batches as the others, are targets of -100, which don't count.
    """
    T, stream = context_length, np.concatenate(shards.arrays).astype(np.int64)
    n_windows = -(-(len(stream) - 1) // T)
    inputs = np.zeros(n_windows * T, np.int64)
    targets = np.full(n_windows * T, IGNORED)
    inputs[: len(stream) - 1], targets[: len(stream) - 1] = stream[:-1], stream[1:]
    chosen = np.arange(n_windows)
    if max_tokens and n_windows * T > max_tokens:
        chosen = np.linspace(0, n_windows - 1, max(max_tokens // T, 1)).astype(int)
    size = batch_size * distributed.world_size()
    rows = np.zeros((2, -(-len(chosen) // size) * size, T), np.int64)
    rows[1] = IGNORED
    rows[0, : len(chosen)] = inputs.reshape(-1, T)[chosen]
    rows[1, : len(chosen)] = targets.reshape(-1, T)[chosen]
    mine = torch.from_numpy(rows[:, distributed.rank() :: distributed.world_size()].copy())
    return list(zip(*(part.split(batch_size) for part in mine), strict=True))
