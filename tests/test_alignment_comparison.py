"""Figures follow from stored rows; the blind reading hides who is who, and is counted fairly."""

import pytest

from common.alignment_comparison import N_READ, RIVALS, figures, mean, prepare_reading, verdicts
from common.alignment_records import Records
from common.instruction_data import Preference

PAIRS = [
    Preference(f"Question {i}?", "Yes.", "No.", category=category, id=str(i))
    for i, category in enumerate(["refuse"] * 30 + ["over_refusal"] * 30)
]


@pytest.fixture
def records(tmp_path) -> Records:
    """Answers of three models: "dpo" refuses what it should, "ppo" says what SFT says."""
    found = Records(tmp_path)
    for name in ("sft", *RIVALS):
        rows = []
        for i, pair in enumerate(PAIRS):
            refuses = name == "dpo" and pair.category == "refuse"
            answer = "I can't help with that." if refuses else f"Here is answer {i}."
            answer += " Gladly." if name == "ppo" and i % 2 else ""
            rows.append({"unit": f"{name}, b", "id": pair.id, "answer": answer, "kl": 0.5 * refuses,
                         "tokens": 5, "reward_a": 0.0, "reward_b": float(refuses)})  # fmt: skip
        found.add("answers", rows)
    found.add("dpo", [{"unit": "training", "seconds": 90.0}])
    return found


def test_figures_of_a_model(records):
    dpo, ppo = (figures(records, PAIRS, name) for name in RIVALS)
    assert (dpo["win_rate"], dpo["same_text"]) == ((30 + 15) / 60, 0.5)
    assert (ppo["win_rate"], ppo["same_text"]) == (0.5, 0.5)
    assert dpo["win_interval"][0] < 0.75 < dpo["win_interval"][1]
    assert (dpo["refused_unsafe"]["share"], dpo["refused_harmless"]["share"]) == (1, 0)
    assert (dpo["refused_unsafe"]["n"], dpo["refused_harmless"]["n"]) == (30, 30)
    assert dpo["kl_per_token"] == pytest.approx(0.05)
    assert (dpo["minutes"], dpo["exact"]) == (1.5, None)
    assert figures(records, PAIRS, "sft")["win_rate"] == 0.5


def test_the_mean_of_a_column():
    assert mean([{"x": 1.0, "y": 5}, {"x": 2.0}], "x") == 1.5


def test_pairs_to_read_differ_and_do_not_say_whose_they_are(records):
    prepare_reading(records, PAIRS)
    read, key = records.rows("reading_pairs"), records.rows("reading_key")
    assert len(read) == len(key) == 2 * N_READ
    assert all(set(row) == {"number", "prompt", "A", "B"} and row["A"] != row["B"] for row in read)
    firsts = [row["A"] for row in key]
    assert 10 < firsts.count("sft") < 40, "each stands first about as often"
    assert [row["number"] for row in read] == [*range(1, 51)]
    for shown, hidden in zip(read, key, strict=True):
        for side in "AB":
            (answer,) = records.rows("answers", unit=f"{hidden[side]}, b", id=hidden["id"])
            assert shown[side] == answer["answer"]
    before = records.path("reading_pairs").read_bytes()
    prepare_reading(records, PAIRS, seed=1)
    assert records.path("reading_pairs").read_bytes() == before, "what was read stays"


def test_verdicts_are_counted_for_the_rival_wherever_it_stood(records):
    prepare_reading(records, PAIRS)
    assert verdicts(records) == {}
    said = []
    for row in records.rows("reading_key"):
        rival, side = next((row[side], side) for side in "AB" if row[side] != "sft")
        said.append({"number": row["number"], "verdict": side if rival == "dpo" else "tie"})
    records.add("reading_verdicts", said)
    found = verdicts(records)
    assert (found["dpo"].share, found["ppo"].share) == (1, 0.5)
    assert found["dpo"].n == found["ppo"].n == N_READ
