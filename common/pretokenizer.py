"""The cut before the tokens: special tokens out of the text, and the rest into words.

Byte-pair encoding never merges across the edge of such a word (GPT-2, Radford et al. 2019, section
2.2), so a word needs to be encoded only once, however often it occurs.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import regex

# A contraction, or letters, or digits, or other signs, each with at most one space in front; else
# white space, which leaves its last space to the word that follows. The doubled `++` never gives
# back what it has matched: the same words as with one `+`, faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++| ?[\p{N}]++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"""
# The same with every digit a word of its own, without the space in front, as SmolLM2 has it.
DIGITS_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++|[\p{N}]| ?[^\s\p{L}\p{N}]++|\s+(?![^\s\p{N}])|\s+"""
)

SLICE = 2**12  # characters: the words of one slice are in memory at a time, whatever the text
SAFE_CUT = regex.compile(r"\S(?=\s)")  # no word continues from something else into white space


class WordCutter:
    """Cuts text into words by a pattern. ValueError if it is no regular expression, or has groups.

    Python's `re` does not know the letters and numbers of Unicode, `regex` does. Where there are
    none but ASCII's, `re` cuts in the same places, twice as fast.
    """

    def __init__(self, pattern: str):
        try:
            self._any = self._ascii = regex.compile(pattern)
        except (regex.error, TypeError) as error:
            message = f"the pattern {pattern!r} is no regular expression: {error}"
            raise ValueError(message) from None
        if self._any.groups:
            raise ValueError(f"the pattern {pattern!r} captures groups: write (?:…) for (…)")
        if pattern in (GPT2_PATTERN, DIGITS_PATTERN):
            ascii_only = pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9")
            self._ascii = re.compile(ascii_only, re.ASCII)

    def __call__(self, text: str) -> Iterator[list[str]]:
        """All words of `text`, slice by slice, as if it had been cut in one piece."""
        start = 0
        while start < len(text):
            cut = SAFE_CUT.search(text, start + SLICE)
            end = cut.end() if cut else len(text)
            part = text[start:end]
            yield (self._ascii if part.isascii() else self._any).findall(part)
            start = end


def split_special(
    text: str, allowed: Collection[str] | str, special_tokens: Collection[str]
) -> Iterator[tuple[bool, str]]:
    """Parts of `text`, each with whether it is a special token; where two match, the longer one.

    `allowed` is a collection of special tokens, or "all"; what it does not name is ordinary text.
    Raises ValueError if it names a token that is not among `special_tokens`.
    """
    text = well_formed(text)
    if isinstance(allowed, str) and allowed != "all":
        raise ValueError(
            f'allowed_special is {allowed!r}: give a set, as in {{{allowed!r}}}, or "all"'
        )
    tokens = special_tokens if allowed == "all" else allowed
    if not tokens:
        return iter([(False, text)])
    if unknown := set(tokens) - set(special_tokens):
        known = ", ".join(special_tokens) or "none"
        raise ValueError(f"no special token {min(unknown)!r} in this tokenizer, which has: {known}")
    longest_first = sorted(tokens, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    return ((i % 2 == 1, part) for i, part in enumerate(parts) if part)


def numbered(special_tokens: Mapping[str, int] | Iterable[str], first: int) -> dict[str, int]:
    """Special tokens with their ids, which count up from `first` where only the texts are given.

    Raises ValueError for one that is empty, is there twice, or is no text.
    """
    if isinstance(special_tokens, str | bytes):
        raise ValueError(f"special_tokens is one text: give a list, as in [{special_tokens!r}]")
    texts = list(special_tokens)
    for text in texts:
        if not isinstance(text, str) or not text or well_formed(text) != text:
            raise ValueError(f"the special token {text!r} is not a text of one character or more")
        if texts.count(text) > 1:
            raise ValueError(f"the special token {text!r} is there twice")
    if isinstance(special_tokens, Mapping):
        return dict(special_tokens)
    return {text: first + n for n, text in enumerate(texts)}


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined, and half pairs, which are no characters, made U+FFFD.

    tiktoken repairs text in the same way. Raises TypeError for anything that is not a str.
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise TypeError(f"a tokenizer needs a str, not {kind}; bytes: data.decode('utf8') first")
    try:
        text.encode("utf8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class WordCache(dict):
    """Words and their token ids; bounded, so that a corpus of any size goes through."""

    MAX_WORDS, MAX_LENGTH = 2**17, 64  # together at most about 50 MB

    def __init__(self, encode_word: Callable[[str], tuple[int, ...]]):
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._encode_word(word)
        if len(word) <= self.MAX_LENGTH:
            if len(self) >= self.MAX_WORDS:
                self.clear()  # the frequent words are back at once
            self[word] = ids
        return ids
