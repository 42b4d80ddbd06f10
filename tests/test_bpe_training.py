"""Learned merges, against the textbook loop that counts everything again after each merge."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.assets import fetch
from common.bpe_training import check_merges, count_pairs, learn_merges, merge

few_letters = st.dictionaries(st.text("ab", min_size=1, max_size=12), st.integers(1, 5))
any_letters = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 5))


def naive_merges(word_counts, n_merges):
    """Sennrich et al. 2016, algorithm 1: slow, and plain to see."""
    words = Counter()
    for word, count in word_counts.items():
        words[tuple(bytes([b]) for b in word.encode("utf8"))] += count
    merges = []
    while len(merges) < n_merges and (counts := count_pairs(words)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = Counter({merge(word, best): count for word, count in words.items()})
    return merges


def test_count_pairs_counts_every_neighbour_as_often_as_its_word():
    counts = count_pairs({(b"a", b"b", b"a", b"b"): 2, (b"b", b"a"): 3, (b"a",): 9})
    assert counts == {(b"a", b"b"): 4, (b"b", b"a"): 2 + 3}


def test_merge_goes_from_left_to_right():
    assert merge((b"a", b"a", b"a"), (b"a", b"a")) == (b"aa", b"a")
    assert merge((b"x", b"a", b"b", b"b"), (b"a", b"b")) == (b"x", b"ab", b"b")
    assert merge((b"a",), (b"a", b"b")) == (b"a",)


@settings(deadline=None)
@given(st.one_of(few_letters, any_letters), st.integers(0, 40))
@example({"aaaa": 1, "aaaaa": 2, "aaa": 1}, 40)
def test_the_same_merges_as_the_naive_loop(word_counts, n_merges):
    assert learn_merges(word_counts, n_merges) == naive_merges(word_counts, n_merges)


def test_the_same_merges_as_the_naive_loop_on_prose():
    word_counts = Counter(fetch("story").read_text(encoding="utf8").split()[:1500])
    assert learn_merges(word_counts, 300) == naive_merges(word_counts, 300)


def test_a_tie_goes_to_the_greatest_pair_of_byte_strings():
    assert learn_merges({"ab": 1, "cd": 1}, 1) == [(b"c", b"d")]
    assert learn_merges({"ab": 1, "az": 1}, 1) == [(b"a", b"z")]
    # After b"ab" is made, it ties with b"a" as the first of a pair; the longer one is greater.
    assert learn_merges({"ab": 9, "abx": 2, "ax": 2}, 2)[1] == (b"ab", b"x")


def test_training_stops_where_the_pairs_run_out():
    assert learn_merges({"abc": 1}, 100) == [(b"b", b"c"), (b"a", b"bc")]
    assert learn_merges({"a": 7}, 100) == []


def test_a_word_of_a_hundred_thousand_letters_takes_no_quadratic_time():
    learned = learn_merges({"ab" * 50_000: 1, "a" * 100_000: 1}, 50)
    assert learned[:2] == [(b"a", b"a"), (b"a", b"b")]


@settings(deadline=None)
@given(few_letters, st.integers(0, 60))
def test_no_token_is_made_twice(word_counts, n_merges):
    merges = learn_merges(word_counts, n_merges)
    vocab = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    assert len(set(vocab)) == len(vocab)
    check_merges(merges, vocab)


@pytest.mark.parametrize(
    "merges",
    [
        [(b"ab", b"c"), (b"a", b"b")],  # used before it is made
        [(b"a", b"b"), (b"a", b"b")],  # made twice
        [(b"x", b"y")],  # not in the vocabulary
        [("a", "b")],  # not bytes
    ],
)
def test_merges_that_do_not_chain_are_refused(merges):
    with pytest.raises(ValueError, match="does not make a new token of known ones"):
        check_merges(merges, {b"a", b"b", b"c", b"x", b"y", b"ab", b"abc"})
