"""Raw text, from where it lies to what a tokenizer should see: read, clean, deduplicate, split.

    from common.corpus import drop_near_duplicates, normalised, read_shakespeare, split_documents
    train, validation = split_documents(drop_near_duplicates(normalised(read_shakespeare())))

Everything streams: functions take and return iterators of `Document`, one document in memory at a
time, so a corpus larger than memory goes through. What has to be remembered (a digest, a signature)
is said where it is. What is in the text, and whom it treats how, `common.audit` finds out.
"""

import ast
import csv
import json
import re
import unicodedata
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

from common import assets


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and a name that says where it comes from."""

    name: str
    text: str


# ---------------------------------------------------------------------------------------- reading


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without byte order mark. ValueError: not UTF-8, or blank."""
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}; "
            "save it as UTF-8, or if you know its encoding, read it with "
            "Path(path).read_text(encoding='cp1252') or the like"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} holds no text; choose another file")
    return text


def read_documents(folder: str | Path, pattern: str = "**/*.txt") -> Iterator[Document]:
    """Every file of a folder that matches the pattern, in the order of their names.

    A file is a document; in a `.jsonl` file every line is one, an object whose "text" is the text.
    Empty files hold no document. Raises FileNotFoundError if nothing matches, ValueError for a file
    that is not UTF-8 or a line that is not such an object.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern} in {folder}; check folder and pattern")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            yield from _read_json_lines(path, name)
        elif path.stat().st_size:
            yield Document(name, read_text(path))


def _read_json_lines(path: Path, name: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):  # not UTF-8 is a ValueError, too
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: expected {{"text": "…"}}, in UTF-8')
            yield Document(f"{name}:{number}", text)


def read_shakespeare() -> Iterator[Document]:
    """38 plays, 5.3 MB, named like "tragedies/hamlet.md"."""
    return read_documents(assets.fetch("shakespeare"), "*/*.md")


def read_sms() -> Iterator[Document]:
    """4,862 text messages of the SMS Spam Collection, named "ham/1", "ham/2", "spam/3", …"""
    with assets.fetch("sms-spam").open(encoding="utf8", newline="") as file:
        for number, (label, text) in enumerate(csv.reader(file, delimiter="\t"), 1):
            yield Document(f"{label}/{number}", text)


def harvest_docstrings(
    packages: Iterable[str] | None = None,
    min_characters: int = 200,
    skipped: list[str] | None = None,
) -> Iterator[Document]:
    """The docstrings of installed packages (default: all), by package and file, as written there.

    The source is parsed, never imported: about 7 MB of it a second. Docstrings shorter than
    `min_characters` are left out: "Return the size." teaches nothing. The paths of files that do
    not parse are appended to `skipped`.
    Raises ValueError for a package that is not installed.
    """
    for package in sorted(packages_distributions() if packages is None else packages):
        spec = find_spec(package.partition(".")[0])  # of a top-level name: imports nothing
        if spec is None and packages is not None:
            raise ValueError(f"package '{package}' is not installed; install it or leave it out")
        for root in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(root).rglob("*.py")):
                name = f"{package}/{path.relative_to(root).as_posix()}"
                yield from _docstrings(path, name, min_characters, skipped)


def _docstrings(path: Path, name: str, min_characters: int, skipped: list | None):
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return  # parsing is what takes the time, and no long docstring is written without these
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        if skipped is not None:
            skipped.append(str(path))
        return
    nodes = [(name, tree)]
    while nodes:
        name, node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= min_characters:
                yield Document(name, text)
        children = getattr(node, "body", ())
        nodes += [(f"{name}:{getattr(n, 'name', '')}".rstrip(":"), n) for n in reversed(children)]


# --------------------------------------------------------------------------------------- cleaning

_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_SPACES = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Controls but \t and \n; soft hyphen, zero-width space, direction marks, byte order mark; halves of
# surrogate pairs, which UTF-8 can't write. U+200C and U+200D stay: Persian and emoji need them.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ud800-\udfff]"
)


def normalise(text: str) -> str:
    """One way to write what looks the same. Applying it twice changes nothing more.

    Choices, each of which you may want otherwise:
    - every line end becomes a newline, every exotic space (no-break, em, ideographic) a space;
    - control and invisible characters go;
    - Unicode NFC: é is one code point. Not NFKC, which would also turn x² into x2 and ﬁ into fi;
    - no space at the end of a line, at most one blank line in a row, none at the start or end.
      Indentation stays: in code and poems it means something.
    """
    text = _SPACES.sub(" ", _LINE_ENDS.sub("\n", text))
    text = unicodedata.normalize("NFC", _INVISIBLE.sub("", text))
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def normalised(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, each text normalised; those with nothing left are dropped."""
    for document in documents:
        if text := normalise(document.text):
            yield replace(document, text=text)


# ---------------------------------------------------------------------------------- deduplication


def content_key(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in case and white space."""
    return blake2b(
        " ".join(text.casefold().split()).encode("utf8", "surrogatepass"), digest_size=16
    ).digest()


def drop_exact_duplicates(
    documents: Iterable[Document], removed: list[str] | None = None
) -> Iterator[Document]:
    """The first document of every content. The names of the others are appended to `removed`.

    Remembers 16 bytes per document kept, about 100 with Python's bookkeeping.
    """
    seen = set()
    for document in documents:
        key = content_key(document.text)
        if key not in seen:
            seen.add(key)
            yield document
        elif removed is not None:
            removed.append(document.name)


def shingles(text: str, size: int) -> list[str]:
    """Every run of `size` words, lower-cased; all words as one run if there are fewer."""
    words = re.findall(r"\w+", text.lower())
    last = max(len(words) - size, 0)
    return [" ".join(words[i : i + size]) for i in range(last + 1)] if words else []


def drop_near_duplicates(
    documents: Iterable[Document],
    threshold: float = 0.8,
    size: int = 5,
    permutations: int = 128,
    removed: list[tuple[str, str, float]] | None = None,
) -> Iterator[Document]:
    """Keep a document unless one kept shares at least `threshold` of its runs of `size` words.

    MinHash (Broder 1997) estimates that share, the Jaccard similarity, from `permutations` numbers
    per document, with a standard deviation of at most 0.5/√permutations. Only documents that agree
    in one whole band of these numbers are compared (Indyk and Motwani 1998): 90% of the pairs at
    the threshold do, and more above it. Appends (name, name of the one kept, estimated similarity)
    to `removed`. Remembers about 2.3 KB per document kept, however long it is.
    """
    if not 0.1 <= threshold <= 1:
        raise ValueError(f"threshold is a similarity between 0.1 and 1, not {threshold}")
    from datasketch import MinHash  # here, because it brings SciPy: a second

    blank = MinHash(num_perm=permutations, hashfunc=zlib.crc32)
    found = lambda rows: 1 - (1 - threshold**rows) ** (permutations // rows)
    rows = max(r for r in range(1, permutations + 1) if r == 1 or found(r) >= 0.9)
    bands: list[dict[int, int]] = [{} for _ in range(permutations // rows)]
    kept: list[tuple] = []  # (name, signature)
    for document in documents:
        runs = shingles(document.text, size)
        if not runs:  # not a word in it: nothing to compare
            yield document
            continue
        signature = _signature(blank, runs)
        keys = [hash(signature[i * rows : (i + 1) * rows].tobytes()) for i in range(len(bands))]
        rivals = {band[key] for band, key in zip(bands, keys, strict=True) if key in band}
        # The best rival; the earliest one where two are equally similar.
        best = max(((float((kept[i][1] == signature).mean()), -i) for i in rivals), default=(0, 0))
        if best[0] < threshold:
            for band, key in zip(bands, keys, strict=True):
                band.setdefault(key, len(kept))
            kept.append((document.name, signature))
            yield document
        elif removed is not None:
            removed.append((document.name, kept[-best[1]][0], best[0]))


def _signature(blank, runs: list[str]):
    """The MinHash of a set of strings: (permutations,) unsigned integers."""
    minhash = blank.copy()
    for start in range(0, len(runs), 4096):  # bounds a table of (strings, permutations)
        minhash.update_batch(run.encode("utf8", "replace") for run in runs[start : start + 4096])
    return minhash.hashvalues


# -------------------------------------------------------------------------------------- splitting


def uniform(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on content and seed alone, on every machine and every run."""
    digest = blake2b(
        content_key(text), digest_size=8, salt=seed.to_bytes(16, "little", signed=True)
    )
    return int.from_bytes(digest.digest(), "little") / 2**64


def in_validation(document: Document, validation: float = 0.1, seed: int = 0) -> bool:
    """Whether a document belongs to the validation side: decided by its content alone.

    So it stays there when the corpus grows or is reordered, and exact duplicates can't straddle.
    """
    if not 0 <= validation <= 1:
        raise ValueError(f"validation is a share between 0 and 1, not {validation}")
    return uniform(document.text, seed) < validation


def split_documents(
    documents: Iterable[Document], validation: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(train, validation). For a corpus larger than memory, filter with `in_validation` instead."""
    sides: tuple[list, list] = ([], [])
    for document in documents:
        sides[in_validation(document, validation, seed)].append(document)
    return sides
