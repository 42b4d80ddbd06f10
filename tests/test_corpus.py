"""Raw text: uv run pytest tests/test_corpus.py"""

import random
import sys
import tracemalloc
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.corpus import (
    Document,
    content_key,
    drop_exact_duplicates,
    drop_near_duplicates,
    harvest_docstrings,
    in_validation,
    normalise,
    normalised,
    read_documents,
    read_shakespeare,
    read_sms,
    read_text,
    shingles,
    split_documents,
)

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]


def prose(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def named(*texts: str) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------------- reading


def test_read_text_drops_the_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffnaïve".encode())
    assert read_text(path) == "naïve"


def test_not_utf8_says_where_and_what_to_do(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("déjà vu".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 1; save"
    ) as e:
        read_text(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("blank", ["", " \n\t "])
def test_blank_file_is_refused(tmp_path, blank):
    (tmp_path / "a.txt").write_text(blank, encoding="utf8")
    with pytest.raises(ValueError, match="holds no text"):
        read_text(tmp_path / "a.txt")


def test_read_documents_in_order_one_at_a_time(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "two"), ("a.txt", "one"), ("sub/c.txt", "three"), ("e.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf8")
    (tmp_path / "z.txt").write_bytes(b"\xff")
    documents = read_documents(tmp_path)
    assert [next(documents) for _ in range(3)] == [
        Document("a.txt", "one"),
        Document("b.txt", "two"),
        Document("sub/c.txt", "three"),
    ]
    with pytest.raises(ValueError, match=r"z\.txt is not UTF-8"):
        next(documents)  # only now is the bad file opened


def test_read_json_lines(tmp_path):
    path = tmp_path / "web.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two\\n", "id": 2}\n', encoding="utf8")
    assert [d.text for d in read_documents(tmp_path, "*.jsonl")] == ["one", "two\n"]


@pytest.mark.parametrize(
    "line", [b'{"txt": "two"}', b'{"text": 2}', b'{"text": "\xfc"}', b"[2]", b"two", b""]
)
def test_json_lines_of_another_kind(tmp_path, line):
    (tmp_path / "web.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    message = r'web\.jsonl, line 2: expected \{"text": "…"\}, in UTF-8$'
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path, "*.jsonl"))


def test_no_matching_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file matches \*\.md"):
        list(read_documents(tmp_path, "*.md"))


def test_shakespeare_and_sms():
    plays = {play.name: play.text for play in read_shakespeare()}
    assert len(plays) == 38
    assert "To be, or not to be" in plays["tragedies/hamlet.md"]
    messages = list(read_sms())
    assert len(messages) == 4862
    assert sum(m.name.startswith("spam/") for m in messages) == 642
    assert not any(m.text.startswith(('"Free', "ham\t", "spam\t")) for m in messages)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package whose import would fail."""
    root = tmp_path / "zoo_of_docstrings"
    root.mkdir()
    (root / "__init__.py").write_text(
        '"""The package."""\nraise RuntimeError("imported")\n\n'
        'class Cat:\n    """A cat."""\n    def meow(self):\n        """Loud: \\d."""\n\n'
        'def f():\n    """Last."""\n',
        encoding="utf8",
    )
    (root / "bad.py").write_text('"""Broken."""\ndef (:\n', encoding="utf8")
    (root / "null.py").write_bytes(b'"""Null."""\n\0')
    monkeypatch.syspath_prepend(tmp_path)
    return "zoo_of_docstrings"


def test_docstrings_are_parsed_not_imported(package):
    skipped = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape sequence must make no noise
        found = list(harvest_docstrings([package], min_characters=1, skipped=skipped))
    names = ["", ":Cat", ":Cat:meow", ":f"]
    assert [d.name for d in found] == [f"{package}/__init__.py{name}" for name in names]
    assert [d.text for d in found] == ["The package.", "A cat.", "Loud: \\d.", "Last."]
    assert [path.rpartition("_docstrings")[2][1:] for path in skipped] == ["bad.py", "null.py"]
    assert package not in sys.modules
    assert len(list(harvest_docstrings([package], min_characters=8))) == 2


def test_docstrings_of_what_is_installed():
    found = harvest_docstrings(["numpy"])
    first = [next(found) for _ in range(50)]
    assert all(len(d.text) >= 200 for d in first)
    again = harvest_docstrings(["numpy"])
    assert first == [next(again) for _ in range(50)]


def test_docstrings_of_what_is_not_installed():
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        list(harvest_docstrings(["no_such_package"]))


# --------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("a\r\nb\rc\u2028d\x85e", "a\nb\nc\nd\ne"),
        ("10\u00a0km\u3000away", "10 km away"),
        ("e\u0301", "é"),
        ("x² ﬁ", "x² ﬁ"),
        ("soft\u00adhyphen\u200b\ufeff\x00!", "softhyphen!"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("end  \n\n\n\n  indented\t\n", "end\n\n  indented"),
    ],
)
def test_normalise(given_text, expected):
    assert normalise(given_text) == expected


@given(st.text(st.characters(), max_size=40) | st.text(" \n\t\r\xa0\xade\u0301\u200b", max_size=40))
def test_normalise_twice_is_once(text):
    once = normalise(text)
    assert normalise(once) == once
    once.encode("utf8")


def test_normalised_drops_what_is_left_empty():
    documents = named("a ", "\u200b\n")
    assert list(normalised(documents)) == [Document("0", "a")]


# ---------------------------------------------------------------------------------- deduplication


def test_exact_duplicates():
    removed = []
    documents = named("One two.", "three", "one\n two.", "One two!")
    kept = list(drop_exact_duplicates(documents, removed))
    assert [d.name for d in kept] == ["0", "1", "3"]
    assert removed == ["2"]


def edited(text: str, n_changes: int) -> str:
    """The text with single words replaced, each of which changes 5 runs of 5 words."""
    words = text.split()
    for i in range(n_changes):
        words[10 + 20 * i] = f"changed{i}"
    return " ".join(words)


def test_near_duplicates_by_similarity():
    """300 words have 296 runs; k scattered changes leave (296 - 5k) / (296 + 5k) of them."""
    removed, kept = [], []
    for seed in range(20):
        text = prose(300, seed)
        documents = [
            Document("original", text),
            Document("few", edited(text, 2)),  # similarity 0.93
            Document("many", edited(text, 12)),  # similarity 0.66
            Document("other", prose(300, 1000 + seed)),  # similarity 0
        ]
        kept += [d.name for d in drop_near_duplicates(documents, removed=removed)]
    assert kept.count("original") == kept.count("other") == 20
    assert kept.count("few") == 0
    assert kept.count("many") >= 19  # an estimate: 0.66 is 3.3 standard deviations below 0.8
    few = [similarity for name, _, similarity in removed if name == "few"]
    assert len(few) == 20
    assert abs(sum(few) / 20 - 0.93) < 0.02


def test_near_duplicates_name_the_one_kept():
    removed = []
    text = prose(200, 0)
    documents = [Document("other", prose(200, 1)), Document("first", text), Document("copy", text)]
    assert len(list(drop_near_duplicates(documents, removed=removed))) == 2
    assert removed == [("copy", "first", 1.0)]


def test_texts_without_a_word_are_not_duplicates():
    assert len(list(drop_near_duplicates(named("!!!", "...", "", "…")))) == 4


def test_near_duplicates_of_short_texts_are_copies_only():
    documents = named("Ok lar", "ok, LAR!", "Ok then")
    assert [d.name for d in drop_near_duplicates(documents)] == ["0", "2"]


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=r"between 0\.1 and 1"):
        list(drop_near_duplicates([], threshold))


def test_shingles():
    assert shingles("To be, or NOT to be", 4) == ["to be or not", "be or not to", "or not to be"]
    assert shingles("To be", 4) == ["to be"]
    assert shingles("?!", 4) == []


def test_streams_keep_signatures_not_texts():
    """120 documents of 40 kB go through every stage in a fraction of their 5 MB."""

    def corpus():
        for i in range(120):
            yield Document(str(i), (10 * WORDS[i] + WORDS[i][::-1] + " ") * 1200)

    stream = drop_near_duplicates(drop_exact_duplicates(normalised(corpus())))
    next(stream)  # imports what it needs
    tracemalloc.start()
    try:
        for _ in range(118):
            next(stream)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1_000_000  # signatures, and the document of the moment
    assert peak < 2_500_000


# -------------------------------------------------------------------------------------- splitting


def test_split_by_content():
    documents = named(*(prose(20, seed) for seed in range(2000)))
    train, validation = split_documents(documents, 0.1)
    assert len(train) + len(validation) == 2000
    assert 150 < len(validation) < 250
    assert {d.name for d in validation} == {d.name for d in documents if in_validation(d)}
    longer = named(*(prose(20, seed) for seed in range(3000)))[::-1]
    assert set(validation) <= set(split_documents(longer, 0.1)[1])  # nobody changes sides
    assert split_documents(documents, 0.1, seed=1)[1] != validation
    assert split_documents(documents, 0)[1] == split_documents(documents, 1.0)[0] == []


def test_split_is_the_same_everywhere():
    """Python's own hash differs from run to run; a checkpoint's validation set must not."""
    sides = [in_validation(document, 0.5) for document in named(*"abcdefgh")]
    assert sides == [False, False, True, False, False, False, True, True]


@given(st.text(max_size=20), st.integers(0, 5))
def test_duplicates_do_not_straddle(text, seed):
    copies = [Document("a", text), Document("b", f" {text.upper().lower()}\n"), Document("c", text)]
    sides = {
        in_validation(c, 0.5, seed) for c in copies if content_key(c.text) == content_key(text)
    }
    assert len(sides) == 1


def test_impossible_share():
    with pytest.raises(ValueError, match="between 0 and 1"):
        in_validation(Document("", ""), 10)
