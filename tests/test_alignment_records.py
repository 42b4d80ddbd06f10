"""Results survive, and figures follow from what is stored."""

import pytest

from common.alignment_records import Records, preferred, scores_by_kind, share, short
from common.instruction_data import Instruction

ENTRIES = [
    Instruction("2 + 2?", "4", kind="arithmetic", checkable=True),
    Instruction("Opposite of hot?", "cold", kind="antonym", checkable=True),
    Instruction("3 + 3?", "6", kind="arithmetic", checkable=True),
    Instruction("Say hello.", "Hello there!", kind="message"),
]


def test_rows_are_kept_in_order_and_found_by_their_fields(tmp_path):
    records = Records(tmp_path / "new")
    assert records.rows("runs") == []
    records.add("runs", [{"unit": "a", "loss": 1 / 3}, {"unit": "b", "text": "naïve\u2028"}])
    records.add("runs", [{"unit": "a", "loss": [2e-9 / 3]}])
    assert [row["unit"] for row in records.rows("runs")] == ["a", "b", "a"]
    assert records.rows("runs", unit="b")[0]["text"] == "naïve\u2028"
    assert [row["loss"] for row in records.rows("runs", unit="a")] == [0.33333, [6.6667e-10]]
    assert [path.name for path in records.folder.iterdir()] == ["runs.jsonl"]


def test_a_damaged_line_is_said_with_its_number(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"unit": "a"}\n{"unit":\n', encoding="utf8")
    with pytest.raises(ValueError, match=r"runs.jsonl, line 2 is damaged") as caught:
        Records(tmp_path).rows("runs")
    assert "\n" not in str(caught.value)


def test_short_keeps_five_digits_at_any_depth():
    assert short({"a": (123456.7, {"b": 0.00001234567}), "c": 7}) == {
        "a": [123460.0, {"b": 1.2346e-05}],
        "c": 7,
    }


def test_scores_by_kind():
    found = scores_by_kind(["4", "Cold.", "about 6", "Hi there"], ENTRIES)
    assert list(found) == ["checkable", "free", "antonym", "arithmetic"]
    assert found["checkable"]["exact"] == pytest.approx(2 / 3)
    assert found["checkable"]["contains"] == 1
    assert (found["arithmetic"]["exact"], found["arithmetic"]["n"]) == (0.5, 2)
    assert found["free"]["f1"] == pytest.approx(0.5)


def test_the_same_words_are_a_tie_whatever_they_earn():
    found = preferred([2.0, 0.0, 1.0, 5.0], [1.0, 1.0, 1.0, 4.0], list("abcd"), [*"xyz", "d "])
    assert (found.n, found.share) == (4, (1 + 0 + 0.5 + 0.5) / 4)
    assert found.interval[0] < found.share < found.interval[1]


def test_share():
    found = share([True, False, False, False])
    assert (found["n"], found["share"]) == (4, 0.25)
    assert found["interval"][0] < 0.25 < found["interval"][1]
