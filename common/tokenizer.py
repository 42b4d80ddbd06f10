"""From text to token ids and back.

    WordTokenizer      one id per word: easy to follow, and lost at the first unknown word
    BPETokenizer       byte-level byte-pair encoding: train, encode, decode, save, load; GPT-2's own
    gpt2_tokenizer()   the same GPT-2 encoding as tiktoken has it, without a network

How text is cut into words first is in `pretokenizer`, how merges are learned in `bpe_training`.
"""

import hashlib
import heapq
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import tiktoken

from common import tokenizer_file
from common.assets import ASSETS, fetch
from common.bpe_training import Pair, check_merges, learn_merges
from common.pretokenizer import (
    GPT2_PATTERN,
    WordCache,
    WordCutter,
    numbered,
    split_special,
    well_formed,
)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"


class WordTokenizer:
    """One id for every different word and punctuation mark of a text.

    The words come first, sorted; then `<|unk|>`, which stands for every unknown word, and
    `<|endoftext|>`. White space is not kept: `decode` gives back the words, not the layout.
    """

    WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")  # "don't" is one word

    def __init__(self, words: Iterable[str]):
        known = sorted(set(words) - {UNKNOWN, END_OF_TEXT})
        self.vocab: dict[int, str] = dict(enumerate([*known, UNKNOWN, END_OF_TEXT]))
        self.special_tokens = {UNKNOWN: len(known), END_OF_TEXT: len(known) + 1}
        self._ids = {word: i for i, word in self.vocab.items()}

    @classmethod
    def train(cls, text: str) -> "WordTokenizer":
        """The tokenizer that knows the words of `text`. Raises ValueError if there are none."""
        words = cls.WORD.findall(well_formed(text))
        if not words:
            raise ValueError("there are no words in the text to train on: is the file empty?")
        return cls(words)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, allowed_special: Collection[str] | str = ()) -> list[int]:
        """Token ids of `text`; `allowed_special` means what it does in `BPETokenizer.encode`."""
        ids = []
        for special, part in split_special(text, allowed_special, self.special_tokens):
            words = [part] if special else self.WORD.findall(part)
            ids += [self._ids.get(word, self.special_tokens[UNKNOWN]) for word in words]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The words with a space between them, but none before closing punctuation."""
        return re.sub(r" (?=[,.;:?!)\]}])", "", " ".join(_look_up(self.vocab, ids)))


class BPETokenizer:
    """Byte-level byte-pair encoding: any text to token ids, and back to the very same text.

    merges:          pairs of tokens (bytes), in the order in which they are joined
    special_tokens:  texts that are one token each and never part of a merge: {text: id}, or only
                     the texts, which are then numbered after everything else
    vocab:           {id: token} without the special tokens. By default ids 0 to 255 are the bytes,
                     and then come the merges in their order
    pattern:         regular expression that cuts text into words, across which nothing is merged.
                     It must match every character, capture no group, and start a new word wherever
                     white space follows something else, as GPT2_PATTERN and DIGITS_PATTERN do

    Raises ValueError where these do not fit together. Source: Radford et al. 2019, section 2.2.
    """

    def __init__(
        self,
        merges: Iterable[Pair],
        special_tokens: Mapping[str, int] | Iterable[str] = (),
        vocab: Mapping[int, bytes] | None = None,
        pattern: str = GPT2_PATTERN,
    ):
        self.merges: list[Pair] = [(first, second) for first, second in merges]
        self.pattern = pattern
        self._explicit_vocab = vocab
        if vocab is None:
            vocab = dict(enumerate([bytes([b]) for b in range(256)]))
            vocab |= enumerate([a + b for a, b in self.merges], start=256)
        self.special_tokens = numbered(special_tokens, first=len(vocab))
        special = {i: text.encode("utf8") for text, i in self.special_tokens.items()}
        self.vocab: dict[int, bytes] = {**vocab, **special}

        ids = {token: i for i, token in vocab.items()}
        check_merges(self.merges, ids)
        if len(ids) < len(vocab):
            raise ValueError("two tokens of the vocabulary have the same bytes")
        if sorted(self.vocab) != list(range(len(vocab) + len(self.special_tokens))):
            raise ValueError("ids must run from 0 without a gap, and none may stand for two tokens")
        self._byte_ids = [ids.get(bytes([b])) for b in range(256)]
        self._ranks = {(ids[a], ids[b]): rank for rank, (a, b) in enumerate(self.merges)}
        self._merged_ids = [ids[a + b] for a, b in self.merges]
        self._cut = WordCutter(pattern)
        self._words = WordCache(self._encode_word)

    @classmethod
    def train(
        cls,
        text_or_chunks: str | Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = (),
        *,
        pattern: str = GPT2_PATTERN,
    ) -> "BPETokenizer":
        """Learn merges from one text, or from chunks that need not fit into memory together.

        The most frequent pair is merged first; of equally frequent ones, the lexicographically
        greatest pair of byte strings. Ids: 0 to 255 are the bytes, then come the merges, then the
        special tokens, whose text is left out of the training. A word ends where its chunk ends.
        A text that runs out of pairs early gives fewer tokens than `vocab_size`.

        Raises ValueError for a text without a single word and for a `vocab_size` below 256 plus
        the special tokens; TypeError for bytes.
        """
        special_tokens = list(numbered(special_tokens, first=256))
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {vocab_size}, but 256 bytes and {len(special_tokens)} special "
                f"tokens need at least {smallest}"
            )
        chunks = [text_or_chunks] if isinstance(text_or_chunks, str | bytes) else text_or_chunks
        word_counts, cut = Counter(), WordCutter(pattern)
        for chunk in chunks:
            for special, part in split_special(chunk, "all", special_tokens):
                for words in () if special else cut(part):
                    word_counts.update(words)
        if not word_counts:
            raise ValueError("there is no text to train on: is the file empty?")
        merges = learn_merges(word_counts, vocab_size - smallest)
        return cls(merges, special_tokens, pattern=pattern)

    @classmethod
    def gpt2(cls) -> "BPETokenizer":
        """GPT-2's tokenizer: 50,257 tokens, the same ids as tiktoken's.

        Raises AssetUnavailable where its two files are not on this machine.
        """
        merges, vocab, special_tokens = tokenizer_file.read_gpt2_files(
            fetch("gpt2-bpe-encoder"), fetch("gpt2-bpe-vocab")
        )
        return cls(merges, special_tokens, vocab)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str, allowed_special: Collection[str] | str = ()) -> list[int]:
        """Token ids of `text`.

        The text of a special token is ordinary text, unless `allowed_special` names it or is
        "all": what a user types must never become a control token by accident. Where two special
        tokens match, the longer one counts. Half a surrogate pair, which is no character, becomes
        U+FFFD, as in tiktoken.

        Raises TypeError for bytes, ValueError for a special token that this tokenizer has not.
        """
        ids: list[int] = []
        for special, part in split_special(text, allowed_special, self.special_tokens):
            if special:
                ids.append(self.special_tokens[part])
                continue
            for words in self._cut(part):
                ids.extend(chain.from_iterable(map(self._words.__getitem__, words)))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids: a list, or a one-dimensional array or tensor.

        Bytes that are not UTF-8, such as half a character, become U+FFFD; for the bytes themselves
        join `vocab[id]`. Raises ValueError for an id that is not in the vocabulary.
        """
        return b"".join(_look_up(self.vocab, ids)).decode("utf8", errors="replace")

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Join the pair that comes first in `merges`, the leftmost first, until none is left.

        A linked list and a heap: n log n steps, even if a single "word" fills a megabyte.
        """
        ids = [self._byte_ids[b] for b in word.encode("utf8")]
        if None in ids:
            raise ValueError(f"a byte of {word[:20]!r} has no token in this vocabulary")
        end, rank_of = len(ids), self._ranks.get
        left, right = list(range(-1, end - 1)), list(range(1, end + 1))
        ranks = map(rank_of, pairwise(ids))
        heap = [(rank, i) for i, rank in enumerate(ranks) if rank is not None]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = right[i]
            if j == end or rank_of((ids[i], ids[j])) != rank:
                continue  # an earlier merge took one of the two
            before, after = left[i], right[j]
            ids[i], ids[j], right[i] = self._merged_ids[rank], None, after
            if before >= 0 and (rank := rank_of((ids[before], ids[i]))) is not None:
                heapq.heappush(heap, (rank, before))
            if after < end:
                left[after] = i
                if (rank := rank_of((ids[i], ids[after]))) is not None:
                    heapq.heappush(heap, (rank, i))
        return tuple(i for i in ids if i is not None)

    def save(self, path: str | Path) -> None:
        """Write a JSON file that people can read. Raises OSError, in one line, where it can't."""
        _, made_from = self.__reduce__()
        tokenizer_file.write_atomically(Path(path), tokenizer_file.dump(*made_from))

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` wrote. Raises ValueError, in one line, for anything else."""
        content = Path(path).read_bytes()
        try:
            return cls(**tokenizer_file.parse(content))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged, or no tokenizer that BPETokenizer.save wrote: {error}"
            ) from None

    def __reduce__(self):
        # For worker processes: only what made the tokenizer, not what it has cached since.
        return type(self), (self.merges, self.special_tokens, self._explicit_vocab, self.pattern)

    def __repr__(self) -> str:
        special = ", ".join(self.special_tokens)
        return f"BPETokenizer(vocab_size={self.vocab_size}, special_tokens=[{special}])"


def _look_up(vocab: Mapping, ids: Iterable[int]) -> list:
    """The token of every id."""
    try:
        return [vocab[i] for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except KeyError as error:
        raise ValueError(f"id {error} is not in the vocabulary: 0 to {len(vocab) - 1}") from None
    except TypeError:
        raise TypeError("decode needs a flat sequence of ids; a batch goes row by row") from None


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    """tiktoken's own "gpt2" encoding, made from files on this machine.

    tiktoken would download two files, unless it finds them in TIKTOKEN_CACHE_DIR under the SHA-1
    of their addresses. This sets up such a folder for the moment of loading: the variable, and a
    cache of your own, are then as before. Raises AssetUnavailable if a file is not here.
    """
    from tiktoken_ext.openai_public import gpt2

    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        for asset in (ASSETS["gpt2-bpe-encoder"], ASSETS["gpt2-bpe-vocab"]):
            key = hashlib.sha1(asset.url.encode()).hexdigest()
            shutil.copyfile(fetch(asset.name), Path(folder, key))
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        try:
            # Not tiktoken.get_encoding: what that returns is pickled as a mere name, and a worker
            # process would set out to download it again.
            return tiktoken.Encoding(**gpt2())
        finally:
            os.environ.pop("TIKTOKEN_CACHE_DIR")
            if before is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = before
