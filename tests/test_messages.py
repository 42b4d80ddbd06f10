"""No test message is nearly one of training, splits are what they say, tables are checked."""

import io
import random
import re
import zipfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common import messages as room
from common.corpus import shingles
from common.messages import (
    Message,
    check_labels,
    distinct,
    divide,
    fold_digits,
    overlap,
    read_messages,
    read_table,
    runs_of_three,
)

MESSAGES = [Message(f"ham number {'x' * i}", "ham") for i in range(60)] + [
    Message(f"spam number {'y' * i}", "spam") for i in range(30)
]


@pytest.fixture(scope="module")
def sms() -> list[Message]:
    return distinct(read_messages())


def folded_shingles(text: str) -> frozenset[str]:
    return frozenset(shingles(re.sub(r"\d+", "0", text), 3))


# --- The real data


def test_the_collection_as_it_is():
    messages = read_messages()
    assert Counter(m.label for m in messages) == {"ham": 4220, "spam": 642}
    assert messages[1].text.startswith("Free entry in 2 a wkly comp")


def test_enough_is_left_for_a_test_set_and_512_to_learn_from(sms):
    counts = Counter(m.label for m in sms)
    assert counts["spam"] >= 150 + 256
    assert counts["ham"] > 3500


def test_no_two_messages_share_half_their_runs_of_three_words(sms):
    """Exactly, over all pairs: MinHash only estimates."""
    runs, where = [folded_shingles(m.text) for m in sms], {}
    assert len({" ".join(m.text.lower().split()) for m in sms}) == len(sms)
    for i, own in enumerate(runs):
        common = Counter(j for run in own for j in where.get(run, ()))
        for j, n in common.items():
            assert n / len(own | runs[j]) < 0.5, f"{sms[i]} and {sms[j]}"
        for run in own:
            where.setdefault(run, []).append(i)


def test_deduplication_finds_what_spammers_change():
    offer = "Urgent! You have won a {} holiday or {} cash. Call {} now to claim your prize"
    first = Message(offer.format("Tenerife", "£5000", "09061749602"), "spam")
    others = [
        Message(offer.format("Tenerife", "£10000", "08718720201"), "spam"),
        Message(first.text.upper(), "spam"),
        Message(f"  {first.text}\n", "ham"),
        Message(f"Hi. {first.text}!!!", "spam"),
    ]
    unlike = Message("Are you coming to the pub tonight or staying in?", "ham")
    assert distinct([first, *others, unlike]) == [first, unlike]


def test_messages_without_words_are_dropped_only_if_empty():
    kept = distinct([Message(":-)", "ham"), Message("  ", "ham"), Message("?!", "ham")])
    assert [m.text for m in kept] == [":-)", "?!"]


def test_the_full_collection_from_its_archive(tmp_path, monkeypatch):
    path, packed = tmp_path / "sms.zip", io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("readme", "about")
        archive.writestr(room.UCI_MEMBER, 'ham\tHi "there\nspam\tWin\t£5 \n')
    path.write_bytes(packed.getvalue())
    asked = []
    monkeypatch.setattr(
        room, "fetch", lambda name, download: asked.append((name, download)) or path
    )
    expected = [Message('Hi "there', "ham"), Message("Win\t£5 ", "spam")]
    assert read_messages(full=True) == expected
    assert asked == [("sms-spam-full", True)]


# --- Splits


@given(st.integers(2, 40), st.integers(2, 50), st.integers(0, 5), st.sampled_from([0, 0.1, 0.25]))
@hypothesis_settings(max_examples=40, deadline=None)
def test_splits_are_disjoint_balanced_and_of_the_right_size(n_test, n_labelled, seed, share):
    split = divide(MESSAGES, n_labelled, seed, n_test, share) if n_labelled > 3 else None
    if split is None:
        return
    assert len(split.test) == n_test
    assert len(split.train) + len(split.validation) == n_labelled
    assert len(split.validation) == round(share * n_labelled)
    everything = [*split.train, *split.validation, *split.test]
    assert len(set(everything)) == len(everything)
    for part in (split.test, split.validation, split.train):
        spam = sum(m.label == "spam" for m in part)
        if n_test + n_labelled <= 58:  # there is enough spam for all
            assert abs(2 * spam - len(part)) <= 1


def test_smaller_sets_lie_within_larger_ones_and_the_test_set_stays():
    small, large = (divide(MESSAGES, n, seed=3, n_test=20) for n in (8, 32))
    assert small.test == large.test
    assert small.train == large.train[:8]


def test_the_seed_decides_and_the_order_of_the_file_is_forgotten():
    one, again, other = (divide(MESSAGES, 20, seed, 20) for seed in (1, 1, 2))
    assert one == again
    assert set(one.test) != set(other.test)
    assert one.train != sorted(one.train)


def test_when_spam_runs_out_the_rest_is_ham():
    split = divide(MESSAGES, n_labelled=60, seed=0, n_test=20)
    assert Counter(m.label for m in split.test) == {"ham": 10, "spam": 10}
    assert Counter(m.label for m in split.train) == {"ham": 40, "spam": 20}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_labelled": 71, "n_test": 20}, "71 labelled messages are asked for, and 70 are left"),
        ({"n_labelled": 1, "n_test": 100}, "and 0 are left beside the 100"),
        ({"n_labelled": 0}, "n_labelled 0"),
        ({"n_labelled": 4, "n_test": 0}, "n_test 0"),
        ({"n_labelled": 4, "n_test": 20, "validation": 1.0}, "validation 1.0"),
        ({"n_labelled": 1, "n_test": 20}, "no spam among the 1 labelled messages"),
        ({"n_labelled": 10, "n_test": 70}, "no spam among the 10 labelled messages"),
    ],
    ids=str,
)
def test_impossible_splits(arguments, message):
    with pytest.raises(ValueError, match=message):
        divide(MESSAGES, **arguments)


def test_one_label_is_nothing_to_learn():
    with pytest.raises(ValueError, match="nothing to tell apart"):
        divide(MESSAGES[:60], 10, n_test=10)
    with pytest.raises(ValueError, match="label 'ham' is none of spam, scam"):
        check_labels(MESSAGES, ("spam", "scam"))


# --- Tables of one's own


def table(tmp_path, text: str):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf8")
    return path


def test_a_table_with_commas_quotes_and_other_columns(tmp_path):
    path = table(tmp_path, '\ufeffid,text,label\n1,"Hi, ""you"",\nthere",ham\n2,Win!,spam\n')
    assert read_table(path) == [Message('Hi, "you",\nthere', "ham"), Message("Win!", "spam")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,kind\nHi,ham\n", "has no column 'label', its columns are text, kind: its first"),
        ("label\tmessage\nham\tHi\n", "has no column 'text'"),
        ("label,text\nham,Hi\nspan,Win\n", "line 3: label 'span' is none of ham, spam"),
        ("label,text\nham,Hi\nspam,  \n", "line 3: the message is empty"),
        ("label,text\nham\n", "line 2: the message is empty"),
        ("", "holds no text"),
    ],
    ids=["label", "text", "unknown", "blank", "short", "nothing"],
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_table(table(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_labels_of_ones_own(tmp_path):
    path = table(tmp_path, "label,text\nurgent,now\nlater,whenever\n")
    assert [m.label for m in read_table(path, ("urgent", "later"))] == ["urgent", "later"]


def test_chance_is_its_own():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    divide(MESSAGES, 10, n_test=10)
    assert random.random() == expected


def test_how_alike_two_messages_are():
    assert fold_digits("Call 08712 now, 2day") == "Call 00000 now, 0day"
    assert runs_of_three("a B 1 2") == {("a", "b", "0"), ("b", "0", "0")}
    assert runs_of_three("Win!") == {("win!",)}
    assert runs_of_three("") == {()}
    assert overlap("Call 08 now or never", "call 99 NOW or never") == 1
    assert overlap("a b c d", "a b c e") == pytest.approx(1 / 3)
    assert overlap("", "one two three") == 0
