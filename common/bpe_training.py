"""Learn byte-pair merges: merge the most frequent pair of neighbours, count again, repeat.

`count_pairs` and `merge` are the two steps as one would say them. `learn_merges` takes the same
steps without counting again: it follows, through linked lists, the few places that a merge changes.

Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, algorithm 1.
"""

import heapq
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from itertools import pairwise

Word = tuple[bytes, ...]  # a word, as the tokens that it consists of so far
Pair = tuple[bytes, bytes]
IdPair = tuple[int, int]


def count_pairs(words: Mapping[Word, int]) -> Counter[Pair]:
    """How often any two tokens are neighbours, given how often each word occurs."""
    counts: Counter[Pair] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
    return counts


def merge(word: Word, pair: Pair) -> Word:
    """`word` with every occurrence of `pair` joined into one token, from left to right."""
    merged, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        merged.append(b"".join(word[i : i + step]))
        i += step
    return tuple(merged)


def learn_merges(word_counts: Mapping[str, int], n_merges: int) -> list[Pair]:
    """The most frequent pair, `n_merges` times, counted anew after each merge.

    Of equally frequent pairs, the lexicographically greatest pair of byte strings. Fewer merges
    come back where the words run out of pairs.

    A heap offers the most frequent pair. Counts that have fallen since are corrected only when
    they come up ("lazily"): a merge changes thousands of them, and few are ever looked at.
    """
    words = _Words(word_counts)
    tokens = [bytes([b]) for b in range(256)]
    order = [_descending(token) for token in tokens]

    def entry(pair: IdPair):
        return -words.counts[pair], order[pair[0]], order[pair[1]], pair

    heap = [entry(pair) for pair in words.counts]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < n_merges:
        negative, _, _, pair = heapq.heappop(heap)
        count = words.counts.get(pair, 0)
        if count == 0:
            continue
        if count != -negative:
            heapq.heappush(heap, entry(pair))
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(b"".join(merges[-1]))
        order.append(_descending(tokens[-1]))
        for brought in words.merge(pair, new=len(tokens) - 1):
            heapq.heappush(heap, entry(brought))
    return merges


def check_merges(merges: Iterable[Pair], vocab: Collection[bytes]) -> None:
    """Raises ValueError unless each merge joins known tokens into a new one of the vocabulary.

    Whatever `learn_merges` learns passes: the way to a token is the same wherever it occurs, so no
    token is made twice. The encoder relies on it.
    """
    known = {token for token in vocab if len(token) == 1}
    for n, (a, b) in enumerate(merges):
        if a not in known or b not in known or a + b in known or a + b not in vocab:
            raise ValueError(f"merge {n}, {a!r} + {b!r}, does not make a new token of known ones")
        known.add(a + b)


class _Words:
    """Distinct words as linked lists of token ids, and for every pair its count and its places.

    All words lie end to end in flat arrays, and a token is known by its place there: `token` holds
    its id, or -1 once it has become part of the token on its left; `left` and `right` hold the
    places of its neighbours, or -1 at the edge of a word; `weight` how often its word occurs.
    """

    def __init__(self, word_counts: Mapping[str, int]):
        self.token, self.left, self.right, self.weight = (array("q") for _ in range(4))
        self.counts: defaultdict[IdPair, int] = defaultdict(int)
        self.places: defaultdict[IdPair, list[int]] = defaultdict(list)
        for word, count in word_counts.items():
            ids = word.encode("utf8")
            first, end = len(self.token), len(self.token) + len(ids)
            self.token.extend(ids)
            self.left.extend([-1, *range(first, end - 1)])
            self.right.extend([*range(first + 1, end), -1])
            self.weight.extend([count] * len(ids))
            for place, pair in enumerate(pairwise(ids), start=first):
                self.counts[pair] += count
                self.places[pair].append(place)

    def merge(self, pair: IdPair, new: int) -> set[IdPair]:
        """Join every occurrence of `pair` into the token `new`; return the pairs this brought."""
        token, left, right, counts, places = (
            self.token, self.left, self.right, self.counts, self.places
        )  # fmt: skip
        (a, b), brought = pair, set()
        for i in places.pop(pair):  # from left to right: "aaa" becomes "aa", "a"
            j = right[i]
            if token[i] != a or j < 0 or token[j] != b:
                continue  # an earlier merge took one of the two
            before, after, weight = left[i], right[j], self.weight[i]
            token[i], token[j], right[i] = new, -1, after
            if before >= 0:
                counts[token[before], a] -= weight
                counts[token[before], new] += weight
                places[token[before], new].append(before)
                brought.add((token[before], new))
            if after >= 0:
                counts[b, token[after]] -= weight
                counts[new, token[after]] += weight
                places[new, token[after]].append(i)
                brought.add((new, token[after]))
                left[after] = i
        del counts[pair]
        return brought


def _descending(token: bytes) -> str:
    """A key that sorts byte strings from the greatest down, since a heap pops its smallest.

    Every byte is mirrored; a sign above all bytes at the end puts b"ab" before its prefix b"a".
    """
    return token.translate(bytes(range(255, -1, -1))).decode("latin1") + "\u0100"
