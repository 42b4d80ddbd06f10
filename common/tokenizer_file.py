"""Byte-pair tokenizers on disk: the course's own JSON format, and the two files of GPT-2.

Tokens are bytes, often half a character, which neither JSON nor a reader's eye takes well. Like
GPT-2, these files show each byte as one printable character: b" the" is "Ġthe".
"""

import json
import os
from pathlib import Path

FORMAT, VERSION = "byte-level BPE", 1

# Bytes that are printable in Latin-1 show as themselves, the others as U+0100, U+0101, …
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
_HIDDEN = [b for b in range(256) if b not in set(_PRINTABLE)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_HIDDEN)}
_CHARACTER_OF = {b: character for character, b in _BYTE_OF.items()}


def to_printable(token: bytes) -> str:
    """The bytes of a token as GPT-2's printable characters, one each."""
    return "".join(_CHARACTER_OF[b] for b in token)


def from_printable(text: str) -> bytes:
    """The bytes behind GPT-2's printable characters. Raises ValueError for any other character."""
    try:
        return bytes(_BYTE_OF[character] for character in text)
    except KeyError as error:
        raise ValueError(f"the character {error} in {text!r} stands for no byte") from None


def parse_merge(line: str) -> tuple[bytes, bytes]:
    """The pair of tokens in a line such as "Ġt he". Raises ValueError for any other line."""
    parts = line.split(" ")
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"the merge {line!r} is not two tokens with a space between them")
    return from_printable(parts[0]), from_printable(parts[1])


def read_gpt2_files(encoder: Path, merges: Path) -> tuple[list, dict[int, bytes], dict[str, int]]:
    """Merges, vocabulary and special tokens from GPT-2's encoder.json and vocab.bpe."""
    ids = json.loads(encoder.read_text(encoding="utf8"))
    special_tokens = {"<|endoftext|>": ids.pop("<|endoftext|>")}
    vocab = {i: from_printable(token) for token, i in ids.items()}
    lines = merges.read_text(encoding="utf8").split("\n")[1:-1]  # the first line names a version
    return [parse_merge(line) for line in lines], vocab, special_tokens


def dump(merges, special_tokens, vocab, pattern) -> str:
    """The JSON text of a tokenizer, one merge a line; `vocab` is None where it follows."""
    data = {
        "format": FORMAT,
        "version": VERSION,
        "pattern": pattern,
        "special_tokens": special_tokens,
        "merges": [f"{to_printable(a)} {to_printable(b)}" for a, b in merges],
        "vocab": None if vocab is None else {to_printable(t): i for i, t in vocab.items()},
    }
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def parse(content: bytes) -> dict:
    """The arguments of `BPETokenizer` from what `dump` made. Raises ValueError if it is not."""
    try:
        data = json.loads(content.decode("utf8"), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'it does not say "format": "{FORMAT}"')
    if data.get("version") != VERSION:
        raise ValueError(f"version {data.get('version')!r} where {VERSION} is known")
    merges, vocab = data.get("merges"), data.get("vocab")
    if not isinstance(merges, list) or not all(isinstance(line, str) for line in merges):
        raise ValueError('"merges" is not a list of texts')
    if not isinstance(data.get("pattern"), str):
        raise ValueError('"pattern" is not a text')
    for name, ids in ("special_tokens", data.get("special_tokens")), ("vocab", vocab):
        if name == "vocab" and ids is None:
            continue
        if not isinstance(ids, dict) or not all(type(i) is int for i in ids.values()):
            raise ValueError(f'"{name}" does not give each token a whole number')
    return {
        "merges": [parse_merge(line) for line in merges],
        "special_tokens": data["special_tokens"],
        "vocab": None if vocab is None else _inverted(vocab),
        "pattern": data["pattern"],
    }


def _without_repetition(pairs: list[tuple[str, object]]) -> dict:
    """JSON allows a key twice, and Python would keep the last one without a word."""
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} is there twice")
    return dict(pairs)


def _inverted(ids: dict[str, int]) -> dict[int, bytes]:
    vocab = {i: from_printable(token) for token, i in ids.items()}
    if len(vocab) < len(ids):
        raise ValueError("two tokens have the same id")
    return vocab


def write_atomically(path: Path, text: str) -> None:
    """Write `text`, or leave `path` as it was. Raises OSError in one line, with what to do."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        try:
            part.write_text(text, encoding="utf8", newline="\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"can't write {path}: {reason}; choose a folder that you may write to"
        ) from None
