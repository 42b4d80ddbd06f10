"""What is in a corpus: uv run pytest tests/test_audit.py"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.audit import (
    GROUPS,
    associations,
    audit,
    leakage,
    personal_data,
    redact,
    words_of,
)
from common.corpus import Document


def named(*texts: str) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


# ---------------------------------------------------------------------------------- personal data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to ada.l+x@mail.example.org.", [("email", "ada.l+x@mail.example.org")]),
        ("host 192.168.0.1.", [("ip", "192.168.0.1")]),
        ("not 999.168.0.1, not 1.2.3, not 1.2.3.4.5", []),
        ("pay 4111 1111 1111 1111 now", [("card", "4111 1111 1111 1111")]),
        ("pay 4111-1111-1111-1112 now", []),  # the check digit is wrong
        ("0000 0000 0000 0000", []),
        ("amex 3782-822463-10005.", [("card", "3782-822463-10005")]),
        ("4 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1", []),
        ("call +44 20 7946 0958!", [("phone", "+44 20 7946 0958")]),
        ("call 555-867-5309", [("phone", "555-867-5309")]),
        ("call (030) 1234 5678", [("phone", "(030) 1234 5678")]),
        ("call (415) 555-0132", [("phone", "(415) 555-0132")]),
        ("000000000001, J. Stat. 12 (1975) 165-184", []),
        ("text 08452810075over18's", [("phone", "08452810075")]),
        ("in 2026-11-23, 12:30:45, π = 3.14159265358979, 1 000 000 of 123456789", []),
        ("[10 20 30 40 50 60 70 80]", []),
        ("@decorator, a @ b, user@localhost", []),
    ],
)  # fmt: skip
def test_personal_data(text, expected):
    assert personal_data(text) == expected


def test_redact_leaves_the_rest_alone():
    text = "I am a@b.org or 0800 169 6031, version 300.1.1.1."
    assert redact(text) == "I am [EMAIL] or [PHONE], version 300.1.1.1."


@given(st.text(st.sampled_from("0123456789 -.()+@ab/"), max_size=60))
def test_redacted_is_clean(text):
    clean = redact(text)
    assert not set(personal_data(text)) & set(personal_data(clean))
    if not personal_data(text):
        assert clean == text


def luhn_number(rng: random.Random, n_digits: int) -> str:
    """A number whose last digit is right, found by trying all ten with the textbook definition."""
    start = [4, *(rng.randrange(10) for _ in range(n_digits - 2))]
    for last in range(10):
        total = 0
        for i, d in enumerate(reversed([*start, last])):
            d = d * 2 if i % 2 else d
            total += d - 9 if d > 9 else d
        if total % 10 == 0:
            return "".join(map(str, [*start, last]))
    raise AssertionError


@pytest.mark.parametrize("n_digits", range(13, 20))
def test_one_of_ten_check_digits_is_right(n_digits):
    rng = random.Random(n_digits)
    for _ in range(20):
        right = luhn_number(rng, n_digits)
        cards = [
            n for n in (f"{right[:-1]}{d}" for d in range(10)) if personal_data(f"no {n}, yes")
        ]
        assert [personal_data(n) for n in cards if n == right] == [[("card", right)]]
        assert all(kind != "card" for n in cards if n != right for kind, _ in personal_data(n))


@pytest.mark.parametrize("piece", ["a", "1", "1 ", "a.", "1-", "(12) ", "a@", "1.2."])
def test_what_almost_matches_does_not_take_for_ever(piece):
    """Half a megabyte: a pattern that backtracks quadratically would hang here for hours."""
    found = personal_data(piece * (500_000 // len(piece)))
    assert {kind for kind, _ in found} <= {"phone"}


# --------------------------------------------------------------------------------------- overview


def test_audit_counts():
    documents = named(
        "The queen and her lady wrote to the king at queen@palace.org about everything.",
        "Le petit chat est monté sur la table et il a mangé tout le fromage de la maison.",
        "He?",
    )
    result = audit(documents)
    assert result.documents == 3
    assert result.characters == sum(len(d.text) for d in documents)
    assert result.words == 14 + 1 + 17 + 1 + 1  # the address is three words, "everything" included
    assert result.length["shortest"] == 3
    assert result.length["longest"] == len(documents[1].text)
    assert result.language == {"?": 1, "en": 1, "fr": 1}
    assert result.personal_data == {"email": 1}
    assert result.group_terms["women"] == 4
    assert result.group_terms["men"] == 2


def test_audit_reads_well():
    result = audit(named("She met him at the river, and they walked home through the long grass."))
    shown = str(result)
    assert shown.startswith("1 documents, 70 characters, 14 words")
    assert "language      en 1" in shown
    assert "personal data none" in shown
    frame = result.to_frame()
    assert frame.set_index(["about", "item"])["count"]["group_terms", "women"] == 1
    assert frame.set_index(["about", "item"])["count"]["documents", "all"] == 1


def test_audit_of_nothing():
    result = audit([])
    assert (result.documents, result.length, result.language) == (0, {}, {})
    assert str(result).startswith("0 documents")


def test_groups_do_not_overlap():
    assert not GROUPS["men"] & GROUPS["women"]


# ------------------------------------------------------------------------------------ association


def test_association_finds_the_skew_and_only_that():
    rng = random.Random(0)
    texts = []
    for _ in range(2000):
        she = rng.random() < 0.5
        job = rng.choices(["nurse", "pilot"], [9, 1] if she else [1, 9])[0]
        texts.append(
            f"{'she' if she else 'he'} is a {job} who lives {rng.choice(['here', 'there'])}"
        )
    result = associations(named(*texts), {"he"}, {"she"})
    assert len(result.rows) == len(["is", "a", "nurse", "pilot", "who", "lives", "here", "there"])
    assert result.rows[0].word == "pilot"
    assert result.rows[-1].word == "nurse"
    assert result["pilot"].z > 10
    assert result["nurse"].z < -10
    assert abs(result["here"].z) < 3
    assert result.beyond_chance() == 2
    assert "2 of 8 words have |z| ≥ 3" in str(result)
    assert len(result.to_frame()) == 8


def test_association_is_antisymmetric():
    documents = named("he reads and she writes", "she reads", "he sleeps and sleeps")
    forth = associations(documents, {"he"}, {"she"})
    back = associations(documents, {"she"}, {"he"})
    for row in forth.rows:
        assert back[row.word].z == pytest.approx(-row.z)
        assert (back[row.word].count_a, back[row.word].count_b) == (row.count_b, row.count_a)


def test_association_by_hand():
    """Two words, counted by hand, in the formula of the paper."""
    from math import log, sqrt

    result = associations(named("he x x x y", "she x y y"), {"he"}, {"she"}, prior=10)
    prior_x = 10 * 4 / (7 + 1)
    in_a, in_b = 3 + prior_x, 1 + prior_x
    log_odds = log(in_a / (4 + 10 - in_a)) - log(in_b / (3 + 10 - in_b))
    assert result["x"].log_odds == pytest.approx(log_odds)
    assert result["x"].z == pytest.approx(log_odds / sqrt(1 / in_a + 1 / in_b))


def test_a_rare_word_can_not_look_extreme():
    documents = named(*["he walks and she walks"] * 200, "he juggles", "he juggles")
    assert abs(associations(documents, {"he"}, {"she"})["juggles"].z) < 2


def test_window_and_word_list():
    documents = named("he a b c d e f")
    found = associations(documents, {"he"}, {"she"}, window=2)
    assert {row.word for row in found.rows} == {"a", "b"}
    listed = associations(documents, {"he"}, {"she"}, words=["b", "f", "zebra"])
    assert {row.word for row in listed.rows} == {"b", "f"}


def test_a_place_near_two_terms_counts_once():
    assert associations(named("he x he"), {"he"}, {"she"})["x"].count_a == 1


def test_the_only_word_there_is_leans_to_nobody():
    result = associations(named("he x", "she x"), {"he"}, {"she"})
    assert result["x"].z == 0


def test_association_without_any_term():
    assert associations(named("nothing here"), {"he"}, {"she"}).rows == ()


# ---------------------------------------------------------------------------------------- leakage


def test_leakage_by_hand():
    train = named("a b c d e f", "x y z")
    validation = [
        Document("quotes", "Q A, b; C q"),  # a b c
        Document("clean", "a b q d e q"),
        Document("copy", "x y z"),
        Document("short", "y z"),  # two words, in training only as part of a run of three
    ]
    found = leakage(train, validation, size=3)
    assert found.documents == 4
    assert found.leaking == ("quotes", "copy")
    assert (found.shared, found.runs) == (2, 3 + 4 + 1 + 1)
    assert str(found).startswith("2 of 4 (50.0%) validation documents share a run of 3 words")


def test_leakage_of_nothing():
    assert str(leakage([], [])).startswith("0 of 0 (0.0%)")


def test_words():
    assert words_of("The king's 2 Äpfel, l'été!") == ["the", "king", "s", "äpfel", "l", "été"]
