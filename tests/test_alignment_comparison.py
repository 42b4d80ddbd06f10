"""Figures follow from stored rows; the blind reading hides who is who, and is counted fairly."""

import pytest
import torch
from test_structure import ROOT

from common.alignment_bench import Bench
from common.alignment_comparison import (
    MODELS,
    N_READ,
    RIVALS,
    figures,
    mean,
    prepare_reading,
    verdicts,
)
from common.alignment_models import TEMPLATE, low_precision, open_base
from common.alignment_records import Records, scores_by_kind, short
from common.alignment_supervised import SFT_BATCH
from common.chat_format import ChatFormat
from common.instruction import InstructionBatches, response_loss
from common.instruction_data import Preference, read_instructions, read_preferences

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
    found.add("dpo", [{"unit": "dpo", "seconds": 90.0}])
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


# --- What is stored beside chapter 7


@pytest.fixture(scope="module")
def stored() -> Records:
    return Records(ROOT / "ch07_instruction_finetune" / "results")


def test_stored_figures_are_what_the_stored_answers_say(stored):
    pairs, table = read_preferences(half="b"), stored.rows("compare")
    assert [row.pop("unit") for row in table] == list(MODELS)
    for row in table:
        assert short(figures(stored, pairs, row["model"])) == row, row["model"]


def test_stored_scores_are_those_of_the_stored_answers(stored):
    test = read_instructions(split="test")
    for name in ("course-small", "base", "sft", *RIVALS):
        answers = {
            row["id"]: row["answer"] for row in stored.rows("answers", model=name, set="test")
        }
        found = scores_by_kind([answers[entry.id] for entry in test], test)
        rows = {row["kind"]: row for row in stored.rows("scores", model=name)}
        assert rows.keys() == found.keys()
        for kind, scores in found.items():
            assert short(scores) == {key: rows[kind][key] for key in scores}, (name, kind)


def test_stored_verdicts_are_one_for_each_pair(stored):
    said = stored.rows("reading_verdicts")
    assert [row["number"] for row in said] == [
        row["number"] for row in stored.rows("reading_pairs")
    ]
    assert {row["verdict"] for row in said} <= {"A", "B", "tie"}
    assert {name: found.n for name, found in verdicts(stored).items()} == dict.fromkeys(RIVALS, 25)


def test_stored_results_are_small_and_name_no_machine(stored):
    files = sorted(stored.folder.glob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) < 1e6
    for file in files:
        assert "/work/" not in file.read_text(encoding="utf8"), file


def test_the_first_stored_loss_of_fine_tuning_is_what_the_code_computes(stored):
    """The course's data, SmolLM2, the first batch: within what bf16 rounds differently."""
    bench = Bench("smollm2-135m", stored.folder)
    (run,) = stored.rows("sft")
    chat, generator = ChatFormat(bench.tokenizer, TEMPLATE), torch.Generator().manual_seed(0)
    talks = [entry.messages for entry in bench.instructions("train")]
    inputs, targets = next(iter(InstructionBatches(chat, talks, SFT_BATCH, generator)))
    with torch.no_grad(), low_precision():
        found = response_loss(open_base("smollm2-135m")[0].bfloat16(), inputs, targets)
    assert found.item() == pytest.approx(run["losses"][0], abs=0.03)
