"""Who is in a corpus, and how often: uv run pytest tests/test_balance.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.audit import GROUPS, associations, audit
from common.balance import mixture_weights, resample, swap_gender, with_counterfactuals
from common.corpus import Document


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She lost her king.", "He lost his queen."),
        ("He gave him his book. It was his.", "She gave her her book. It was hers."),
        (
            "I saw her. HER dog saw her too; is it hers?",
            "I saw him. HIS dog saw him too; is it his?",
        ),
        ("Mr. and Mrs. Who", "Mrs. and Mr. Who"),
        ("_Enter two Gentlemen_, stabs him_", "_Enter two Gentlewomen_, stabs her_"),
        ("Hero, shell, human, ashes, theme", "Hero, shell, human, ashes, theme"),
        ("tell her\nto go, ask her\nname", "tell him\nto go, ask his\nname"),
    ],
)
def test_swap_gender(text, expected):
    assert swap_gender(text) == expected


UNAMBIGUOUS = "he she himself herself man woman King queen LORD lady mr mrs the sat on x ,".split()  # noqa: SIM905


@given(st.lists(st.sampled_from(UNAMBIGUOUS)).map(" ".join))
def test_swapping_twice_is_not_swapping(text):
    assert swap_gender(swap_gender(text)) == text


@given(st.text("abcdoxyz 1_.,'", max_size=50))
def test_text_without_gender_stays(text):
    assert swap_gender(text) == text  # no gendered word can be spelled with these letters


def test_counterfactuals_take_the_skew_away():
    """Numbers before and after: as many women as men, and no word that leans to either."""
    jobs = [("he", "pilot")] * 90 + [("she", "pilot")] * 10 + [("she", "nurse")] * 50
    documents = [Document(str(i), f"{who} was a {job} then") for i, (who, job) in enumerate(jobs)]
    before = associations(documents, GROUPS["men"], GROUPS["women"])
    balanced = list(with_counterfactuals(documents))
    after = associations(balanced, GROUPS["men"], GROUPS["women"])
    assert before.beyond_chance() == 2
    assert after.beyond_chance() == 0
    terms = audit(balanced).group_terms
    assert terms["men"] == terms["women"] == 150


def test_counterfactuals_only_where_something_changes():
    documents = [Document("a", "The rain fell."), Document("b", "The king fell.")]
    assert [d.name for d in with_counterfactuals(documents)] == ["a", "b", "b (swapped)"]


def test_resample_repeats_drops_and_tosses():
    documents = [Document(str(i), f"text {i}") for i in range(1000)]
    assert list(resample(documents, lambda d: 1)) == documents
    assert list(resample(documents, lambda d: 0)) == []
    assert len(list(resample(documents, lambda d: 2.0))) == 2000
    some = list(resample(documents, lambda d: 0.3))
    assert 250 < len(some) < 350
    assert some == list(resample(documents, lambda d: 0.3))
    assert some != list(resample(documents, lambda d: 0.3, seed=1))
    assert [d in some for d in documents[:500]] == [
        d in set(resample(documents[:500], lambda d: 0.3)) for d in documents[:500]
    ]  # what happens to one document does not depend on the others


def test_mixture_weights():
    sizes = {"web": 900, "books": 100}
    assert mixture_weights(sizes, alpha=1) == {"web": 1, "books": 1}
    equal = mixture_weights(sizes, alpha=0)
    assert equal["web"] * 900 == pytest.approx(equal["books"] * 100)
    half = mixture_weights(sizes, alpha=0.5)
    assert half["web"] * 900 == pytest.approx(3 * half["books"] * 100)  # √900 = 3 √100
    assert half["web"] * 900 + half["books"] * 100 == pytest.approx(1000)
