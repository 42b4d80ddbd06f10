"""Tokenizers: every text comes back, GPT-2's ids are tiktoken's, bad input gets one clear line."""

import ast
import os
import pickle
import random
import subprocess
import sys
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.assets import ASSETS, fetch
from common.pretokenizer import DIGITS_PATTERN
from common.tokenizer import END_OF_TEXT, BPETokenizer, WordTokenizer, gpt2_tokenizer
from common.tokenizer_file import to_printable

any_text = st.text(max_size=60)
with_surrogates = st.text(st.characters(exclude_categories=[]), max_size=20)
few_letters = st.text("ab ", max_size=30)


@pytest.fixture(scope="module")
def story():
    return fetch("story").read_text(encoding="utf8")


@pytest.fixture(scope="module")
def gpt2():
    return BPETokenizer.gpt2()


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    return gpt2_tokenizer()


@pytest.fixture(scope="module")
def trained(story):
    return BPETokenizer.train(story, 500, [END_OF_TEXT, "<|end|>", "<|endof"])


# ------------------------------------------------------------------------------------------ words


def test_words_become_ids_and_come_back():
    tokenizer = WordTokenizer.train("The cat sat, and the dog didn't.")
    assert [*tokenizer.vocab.values()] == [
        ",", ".", "The", "and", "cat", "didn't", "dog", "sat", "the", "<|unk|>", "<|endoftext|>",
    ]  # fmt: skip
    ids = tokenizer.encode("The dog sat, and didn't.")
    assert ids == [2, 6, 7, 0, 3, 5, 1]
    assert tokenizer.decode(ids) == "The dog sat, and didn't."
    assert tokenizer.vocab_size == 11


def test_unknown_words_are_lost_and_special_tokens_are_opt_in():
    tokenizer = WordTokenizer.train("a b")
    assert tokenizer.decode(tokenizer.encode("a zebra b")) == "a <|unk|> b"
    end = tokenizer.special_tokens[END_OF_TEXT]
    assert tokenizer.encode("a <|endoftext|> b", allowed_special="all") == [0, end, 1]
    assert end not in tokenizer.encode("a <|endoftext|> b")


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_word_tokenizer_needs_words(text):
    with pytest.raises(ValueError, match="no words in the text"):
        WordTokenizer.train(text)


# --------------------------------------------------------------------- training and round trips


@settings(deadline=None)
@given(any_text)
def test_every_text_comes_back(trained, gpt2, text):
    for tokenizer in (trained, gpt2):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, allowed_special="all")) == text


def test_ids_are_bytes_then_merges_then_special_tokens(trained):
    assert trained.vocab_size == len(trained.vocab) == 500
    assert [trained.vocab[i] for i in range(256)] == [bytes([b]) for b in range(256)]
    for i, (a, b) in enumerate(trained.merges, start=256):
        assert trained.vocab[i] == a + b
    assert trained.special_tokens == {END_OF_TEXT: 497, "<|end|>": 498, "<|endof": 499}
    assert trained.vocab[498] == b"<|end|>"


@settings(deadline=None)
@given(few_letters.filter(bool), few_letters)
def test_encoding_replays_the_merges_in_order(corpus, text):
    tokenizer = BPETokenizer.train(corpus, 300)
    word = [bytes([b]) for b in text.replace(" ", "").encode()]
    expected = list(word)
    for a, b in tokenizer.merges:
        i = 0
        while i < len(expected) - 1:
            if (expected[i], expected[i + 1]) == (a, b):
                expected[i : i + 2] = [a + b]
            i += 1
    assert [tokenizer.vocab[i] for i in tokenizer.encode("".join(text.split()))] == expected


def test_nothing_is_merged_across_words():
    tokenizer = BPETokenizer.train("to be or not to be " * 9, 300)
    assert b" be" in tokenizer.vocab.values()
    assert not [token for token in tokenizer.vocab.values() if b" " in token[1:]]


def test_training_stops_where_the_pairs_run_out():
    tokenizer = BPETokenizer.train("aaaa", 1000, [END_OF_TEXT])
    assert tokenizer.merges == [(b"a", b"a"), (b"aa", b"aa")]
    assert tokenizer.vocab_size == 256 + 2 + 1


def test_chunks_may_be_a_stream(story):
    lines = story.splitlines(keepends=True)
    paragraphs = "".join(lines).split("\n\n")
    streamed = BPETokenizer.train((part for part in paragraphs), 400)
    assert streamed.merges == BPETokenizer.train(paragraphs, 400).merges
    assert BPETokenizer.train([story], 400).merges == BPETokenizer.train(story, 400).merges


def test_special_tokens_take_no_part_in_training():
    tokenizer = BPETokenizer.train(f"ab{END_OF_TEXT}cd" * 2, 300, [END_OF_TEXT])
    # The words are ab, cdab and cd: nothing of "<|endoftext|>".
    assert tokenizer.merges == [(b"c", b"d"), (b"a", b"b"), (b"cd", b"ab")]


@pytest.mark.parametrize(
    ("text", "vocab_size", "special_tokens", "error", "message"),
    [
        ("", 300, (), ValueError, "no text to train on"),
        ([], 300, (), ValueError, "no text to train on"),
        (["", ""], 300, (), ValueError, "no text to train on"),
        (END_OF_TEXT, 300, [END_OF_TEXT], ValueError, "no text to train on"),
        ("text", 255, (), ValueError, "need at least 256"),
        ("text", 257, ["<|a|>", "<|b|>"], ValueError, "need at least 258"),
        ("text", 300, ["<|a|>", "<|a|>"], ValueError, "there twice"),
        ("text", 300, [""], ValueError, "one character or more"),
        ("text", 300, "<|a|>", ValueError, "give a list"),
        (b"text", 300, (), TypeError, "needs a str, not bytes"),
        ([b"text"], 300, (), TypeError, "needs a str, not bytes"),
    ],
)
def test_training_refuses_bad_input(text, vocab_size, special_tokens, error, message):
    with pytest.raises(error, match=message) as caught:
        BPETokenizer.train(text, vocab_size, special_tokens)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- encode and decode


def test_special_tokens_are_ordinary_text_by_default(trained):
    end = trained.special_tokens[END_OF_TEXT]
    assert end not in trained.encode(f"a{END_OF_TEXT}b")
    assert trained.encode(f"a{END_OF_TEXT}b", allowed_special={END_OF_TEXT}) == [97, end, 98]
    assert trained.encode("<|endof<|end|>", "all") == [499, 498]


def test_the_longest_special_token_wins(trained):
    assert trained.encode(END_OF_TEXT, allowed_special="all") == [497]
    assert trained.encode(END_OF_TEXT, allowed_special={"<|endof"})[0] == 499


def test_encoding_refuses_bad_input(trained):
    with pytest.raises(ValueError, match="no special token"):
        trained.encode("hello", allowed_special={"<|im_start|>"})
    with pytest.raises(TypeError, match="needs a str, not bytes"):
        trained.encode(b"hello")
    assert trained.encode("") == []


def test_decoding_takes_arrays_and_half_characters(trained):
    ids = trained.encode("naïve")
    assert trained.decode(np.array(ids)) == trained.decode(iter(ids)) == "naïve"
    assert trained.decode([0xC3]) == "\ufffd"
    assert trained.decode([]) == ""


@pytest.mark.parametrize("ids", [[500], [-1], [97, 10**9], ["a"], np.array([500])])
def test_an_id_out_of_range_is_refused(trained, ids):
    with pytest.raises(ValueError, match=r"id .* is not in the vocabulary: 0 to 499"):
        trained.decode(ids)


@pytest.mark.parametrize("ids", [[[1, 2]], 7, np.array([[1, 2]]), np.array(7)])
def test_a_batch_is_no_sequence_of_ids(trained, ids):
    with pytest.raises(TypeError, match="flat sequence of ids"):
        trained.decode(ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merges": [(b"ab", b"c")]}, "merge 0"),
        ({"merges": [], "special_tokens": {"<|a|>": 5}}, "ids must run from 0"),
        ({"merges": [], "special_tokens": {"<|a|>": 256, "<|b|>": 256}}, "ids must run from 0"),
        ({"merges": [], "vocab": {0: b"a", 2: b"b"}}, "ids must run from 0"),
        ({"merges": [], "vocab": {0: b"a", 1: b"a"}}, "the same bytes"),
        ({"merges": [], "pattern": "(a)"}, "captures groups"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BPETokenizer(**arguments)


def test_a_vocabulary_without_some_byte_says_so():
    tokenizer = BPETokenizer([(b"a", b"b")], ["<|x|>"], {0: b"ab", 1: b"a", 2: b"b"})
    assert tokenizer.encode("abab<|x|>", "all") == [0, 0, 3]
    with pytest.raises(ValueError, match="a byte of 'c' has no token"):
        tokenizer.encode("c")


def test_digits_can_be_kept_apart(story):
    text = "2024 2024 2024 " * 20
    digits = BPETokenizer.train(text, 300, pattern=DIGITS_PATTERN)
    assert digits.merges == []
    assert BPETokenizer.train(text, 300).encode("2024") != digits.encode("2024") == [*b"2024"]


def test_a_pickle_is_small_and_comes_back(trained, story):
    fresh = len(pickle.dumps(trained))
    ids = trained.encode(story)
    pickled = pickle.dumps(trained)
    assert len(pickled) == fresh < 10_000, "the words encoded so far do not belong in a pickle"
    again = pickle.loads(pickled)
    assert again.encode(story) == ids
    assert again.special_tokens == trained.special_tokens
    assert repr(again).startswith("BPETokenizer(vocab_size=500, special_tokens=[<|endoftext|>,")


# -------------------------------------------------------------------------------------- tiktoken


def test_gpt2_has_the_vocabulary_of_tiktoken(gpt2, tiktoken_gpt2):
    assert gpt2.vocab_size == tiktoken_gpt2.n_vocab == 50257
    theirs = {i: tiktoken_gpt2.decode_single_token_bytes(i) for i in range(50257)}
    assert gpt2.vocab == theirs
    assert gpt2.special_tokens == {END_OF_TEXT: tiktoken_gpt2.eot_token}


def random_texts(count):
    """Random Unicode strings of every kind: any character, one script, white space, repetition."""
    draw = random.Random(0)
    scripts = [(32, 127), (0xA0, 0x250), (0x370, 0x530), (0x600, 0x700), (0x900, 0xE00),
               (0x2000, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4),
               (0x1F300, 0x1FA00)]  # fmt: skip
    pieces = [
        "  ",
        "\n",
        "\t",
        " \n ",
        "'s",
        "'ll",
        "'",
        " '",
        "the",
        " The",
        "12",
        " 3",
        "…",
        "aa",
    ]
    for n in range(count):
        length = draw.randrange(60)
        match n % 4:
            case 0:
                codes = (draw.randrange(0x110000) for _ in range(length))
            case 1:
                low, high = draw.choice(scripts)
                codes = (draw.randrange(low, high) for _ in range(length))
            case 2:
                codes = map(ord, "".join(draw.choices(pieces, k=length)))
            case _:
                ranges = draw.choices(scripts, k=length)
                codes = (draw.randrange(low, high) for low, high in ranges for _ in range(2))
        yield "".join(map(chr, codes))


def test_ten_thousand_random_texts_get_the_ids_of_tiktoken(gpt2, tiktoken_gpt2):
    for text in random_texts(10_000):
        assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text), ascii(text)


@settings(deadline=None)
@given(st.one_of(any_text, with_surrogates))
def test_any_text_gets_the_ids_of_tiktoken(gpt2, tiktoken_gpt2, text):
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
    text = f"{text}{END_OF_TEXT}{text}"
    assert gpt2.encode(text, "all") == tiktoken_gpt2.encode(text, allowed_special="all")


@settings(deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=20))
def test_any_ids_decode_as_in_tiktoken(gpt2, tiktoken_gpt2, ids):
    text = gpt2.decode(ids)
    assert text == tiktoken_gpt2.decode(ids)
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


def docstrings(package, files):
    for path in islice(sorted(Path(find_spec(package).origin).parent.rglob("*.py")), files):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                yield ast.get_docstring(node) or ""


@pytest.mark.parametrize(
    "read",
    [
        lambda: [p.read_text(encoding="utf8") for p in fetch("shakespeare").glob("*/*.md")],
        lambda: [fetch("story").read_text(encoding="utf8")],
        lambda: fetch("sms-spam").read_text(encoding="utf8").splitlines(),
        lambda: docstrings("numpy", 200),
        lambda: [Path(__file__).read_text(encoding="utf8")],
    ],
    ids=["shakespeare", "story", "sms", "docstrings", "code"],
)
def test_every_text_at_hand_gets_the_ids_of_tiktoken(gpt2, tiktoken_gpt2, read):
    read_something = False
    for text in read():
        read_something = True
        ids = gpt2.encode(text)
        assert ids == tiktoken_gpt2.encode_ordinary(text)
        assert gpt2.decode(ids) == text
    assert read_something


@pytest.mark.parametrize("letters", ["a", "ab", "abcdefghijklmnopqrstuvwxyz", "漢字"])
def test_a_word_of_fifty_thousand_letters_is_encoded_in_no_quadratic_time(
    gpt2, tiktoken_gpt2, letters
):
    word = "".join(random.Random(0).choices(letters, k=50_000))
    assert gpt2.encode(word) == tiktoken_gpt2.encode_ordinary(word)


def test_hugging_face_gives_the_same_ids_for_trained_merges(trained, story):
    vocab = {to_printable(trained.vocab[i]): i for i in range(497)}
    merges = [(to_printable(a), to_printable(b)) for a, b in trained.merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (story, "aaaaaaa aaa", "naïve   façade \n\n 12,345"):
        assert trained.encode(text) == theirs.encode(text).ids


LOAD_OFFLINE = """
import os, pickle, socket, sys
def refuse(event, args):
    assert event not in ("socket.connect", "socket.getaddrinfo"), f"{event} {args[1:]}"
sys.addaudithook(refuse)
from common.tokenizer import gpt2_tokenizer
before = dict(os.environ)
encoding = gpt2_tokenizer()
assert os.environ == before
assert encoding.name == "gpt2" and encoding.n_vocab == 50257
assert encoding.encode("Hello, world") == [15496, 11, 995]
sys.stdout.buffer.write(pickle.dumps(encoding))
"""
UNPICKLE = """
import pickle, sys
assert pickle.loads(sys.stdin.buffer.read()).encode("Hello, world") == [15496, 11, 995]
"""


@pytest.mark.parametrize("own_cache", [None, "", "mine"])
def test_tiktoken_works_offline_and_leaves_no_trace(tmp_path, own_cache):
    environment = {k: v for k, v in os.environ.items() if k != "TIKTOKEN_CACHE_DIR"}
    # Any attempt to download must fail, not go unnoticed.
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:9", "TMPDIR": str(tmp_path)}
    if own_cache is not None:
        environment["TIKTOKEN_CACHE_DIR"] = own_cache and str(tmp_path / own_cache)
    command = [sys.executable, "-c"]
    made = subprocess.run([*command, LOAD_OFFLINE], env=environment, capture_output=True)
    assert made.returncode == 0, made.stderr.decode()
    assert list(tmp_path.iterdir()) == []
    environment["TIKTOKEN_CACHE_DIR"] = str(tmp_path)
    read = subprocess.run([*command, UNPICKLE], env=environment, input=made.stdout)
    assert read.returncode == 0, "a worker process must not need the network either"


def test_the_addresses_are_those_that_tiktoken_asks_for(monkeypatch):
    asked = []

    def note(url, expected_hash=None):
        asked.append((url, expected_hash))
        raise InterruptedError

    monkeypatch.setattr("tiktoken.load.read_file_cached", note)
    from tiktoken_ext import openai_public

    with pytest.raises(InterruptedError):
        openai_public.gpt2()
    asset = ASSETS["gpt2-bpe-vocab"]
    assert asked == [(asset.url, asset.sha256)]
