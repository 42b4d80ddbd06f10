"""Words and special tokens: GPT-2's cut, SmolLM2's, and where special tokens are recognised."""

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from common import pretokenizer
from common.pretokenizer import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    WordCache,
    WordCutter,
    numbered,
    split_special,
    well_formed,
)
from common.tokenizer_file import from_printable

# The pattern as OpenAI published it with GPT-2; ours must cut in the same places.
PUBLISHED = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# Characters that the next version of Unicode assigns are classed differently by every library.
assigned = st.characters(exclude_categories=["Cs", "Cn"])
tricky = st.sampled_from([*"  \n\t\r'stmdlreva09½²٣.!é漢", "'ll", "  ", "\u00a0", "\u2003"])
texts = st.one_of(
    st.text(assigned, max_size=40),
    st.text(st.characters(max_codepoint=127), max_size=40),
    st.lists(tricky, max_size=20).map("".join),
)


def cut(pattern, text):
    return [word for words in WordCutter(pattern)(text) for word in words]


def test_words_of_a_sentence():
    text = "Don't  panic: it's 42!\n"
    assert cut(GPT2_PATTERN, text) == \
        ["Don", "'t", " ", " panic", ":", " it", "'s", " 42", "!", "\n"]  # fmt: skip
    assert cut(DIGITS_PATTERN, text)[-5:] == [" ", "4", "2", "!", "\n"]


@settings(deadline=None)
@given(texts)
def test_gpt2_pattern_cuts_as_published(text):
    assert cut(GPT2_PATTERN, text) == regex.findall(PUBLISHED, text)


@settings(deadline=None)
@given(texts)
@example("a  1")  # both spaces stay together: a digit takes none of them
@example("it's  ½ \n٣, 'll12")
def test_digits_pattern_cuts_as_hugging_face_does(text):
    theirs = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    words = [from_printable(word) for word, _ in theirs.pre_tokenize_str(text)]
    assert [word.encode("utf8") for word in cut(DIGITS_PATTERN, text)] == words


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, DIGITS_PATTERN])
@settings(deadline=None)
@given(text=texts, size=st.integers(0, 10))
def test_slices_change_nothing(pattern, text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenizer, "SLICE", size)
        assert cut(pattern, text) == regex.findall(pattern, text)


def test_a_long_text_is_cut_slice_by_slice():
    lists = list(WordCutter(GPT2_PATTERN)("word " * 100_000))
    assert len(lists) > 5
    assert max(map(len, lists)) < 20_000


@pytest.mark.parametrize("pattern", ["(a)|b", "(", None])
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="the pattern"):
        WordCutter(pattern)


# --------------------------------------------------------------------------------- special tokens

SPECIAL = ["<|a|>", "<|a|><|b|>", "[x]"]


def test_special_tokens_are_text_unless_allowed():
    text = "<|a|>[x]"
    assert list(split_special(text, (), SPECIAL)) == [(False, text)]
    assert list(split_special(text, {"[x]"}, SPECIAL)) == [(False, "<|a|>"), (True, "[x]")]
    assert list(split_special(text, "all", SPECIAL)) == [(True, "<|a|>"), (True, "[x]")]


def test_the_longest_special_token_wins():
    parts = list(split_special("<|a|><|b|><|a|>.", "all", SPECIAL))
    assert parts == [(True, "<|a|><|b|>"), (True, "<|a|>"), (False, ".")]
    assert next(split_special("<|a|><|b|>", {"<|a|>"}, SPECIAL)) == (True, "<|a|>")


def test_nothing_is_allowed_where_there_are_no_special_tokens():
    assert list(split_special("abc", "all", [])) == [(False, "abc")]


@pytest.mark.parametrize(
    ("allowed", "message"),
    [({"<|c|>"}, "no special token '<|c|>'"), ("<|a|>", "give a set"), ({7}, "no special token 7")],
)
def test_unknown_special_tokens_are_refused(allowed, message):
    with pytest.raises(ValueError, match=regex.escape(message)):
        split_special("text", allowed, SPECIAL)


@pytest.mark.parametrize(
    "special_tokens", [["a", "a"], [""], ["a", 7], "<|a|>", b"<|a|>", ["\ud800"], {"": 1}]
)
def test_impossible_special_tokens_are_refused(special_tokens):
    with pytest.raises(ValueError, match="special"):
        numbered(special_tokens, first=256)


def test_special_tokens_are_numbered_or_keep_their_ids():
    assert numbered(["b", "a"], first=256) == {"b": 256, "a": 257}
    assert numbered({"b": 3, "a": 9}, first=256) == {"b": 3, "a": 9}


# ---------------------------------------------------------------------------- surrogates and cache


def test_surrogates_are_joined_or_replaced():
    assert well_formed("\ud83d\ude00!") == "😀!"
    assert well_formed("a\ud800b") == "a\ufffdb"
    assert well_formed("\ufeffabc") == "\ufeffabc"
    assert well_formed("\ufeff\ud800") == "\ufeff\ufffd"


@pytest.mark.parametrize("text", [b"abc", None, 7, ["abc"]])
def test_only_text_is_text(text):
    with pytest.raises(TypeError, match="needs a str"):
        well_formed(text)


def test_the_cache_is_bounded():
    words = WordCache(lambda word: tuple(word.encode("utf8")))
    words.MAX_WORDS = 10
    for n in range(1000):
        assert words[str(n % 37)] == tuple(str(n % 37).encode())
        assert len(words) <= 10
    words.clear()
    assert words["x" * 10_000] == (120,) * 10_000
    assert not words, "one long word could be as large as all others together"
