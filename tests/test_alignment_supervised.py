"""Baselines, judges and scores: each is what a slow look at the same rows finds."""

import math
from dataclasses import replace

import pytest
import torch
from test_alignment_models import source  # noqa: F401
from test_rewards import HELD_OUT, PAIRS

from common.alignment_bench import Bench
from common.alignment_models import rewards, save_policy
from common.alignment_supervised import (
    REWARD,
    baselines,
    fine_tuning,
    judge_accuracy,
    reward_models,
    test_answers,
    train_judge,
)
from common.instruction_data import Preference


@pytest.fixture(scope="module")
def bench(source, tmp_path_factory) -> Bench:  # noqa: F811
    """A comparison whose fine-tuned model has learned nothing yet."""
    bench = Bench(source, tmp_path_factory.mktemp("out"), limit=10, steps=2)
    save_policy(bench.policy(), source, bench.records.folder / "sft.safetensors")
    return bench


def test_words_tell_politeness_and_lengths_do_not():
    longer, bag = baselines(PAIRS, HELD_OUT)
    assert (longer["method"], bag["method"]) == ("longer answer", "bag of words")
    assert bag["accuracy"] == 1
    same = [replace(pair, rejected=pair.chosen[:-1] + "!") for pair in HELD_OUT]
    assert baselines(PAIRS, same)[0]["accuracy"] == 0.5


def test_accuracy_by_category_and_length(bench):
    judge, _ = train_judge(bench, "a", REWARD, seed=0)
    judge.head.weight.data.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    pairs = [
        Preference(p.prompt, p.chosen + tail, p.rejected, category=category)
        for p, tail, category in zip(
            PAIRS, ("", ", thank you", "", "!!!!"), ("kind", "kind", "safe", "safe"), strict=True
        )
    ]
    rows = {row["category"]: row for row in judge_accuracy(judge, pairs)}
    assert list(rows) == ["all", "kind", "safe", "chosen is longer", "chosen is shorter"]
    assert rows["all"]["n"] == rows["kind"]["n"] + rows["safe"]["n"] == 4
    prompts, chosen = [p.prompt for p in pairs], [p.chosen for p in pairs]
    right = rewards(judge, prompts, chosen) > rewards(judge, prompts, [p.rejected for p in pairs])
    assert rows["all"]["accuracy"] == right.float().mean().item()
    assert rows["safe"]["accuracy"] == right[2:].float().mean().item()


def test_of_all_seeds_the_best_on_its_own_half_is_kept(bench):
    reward_models(bench, "a")
    rows = bench.records.rows("reward", unit="judge-a")
    runs = [row for row in rows if "settings" in row]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    kept = next(run for run in runs if run["kept"])
    assert kept["lowest"] == min(run["lowest"] for run in runs)
    assert {row["seed"] for row in rows if row["kept"]} == {kept["seed"]}
    assert next(row for row in rows if row.get("category") == "all")["n"] == len(bench.pairs("b"))
    assert (bench.records.folder / "judge-a.safetensors").exists()


def test_answers_are_stored_before_they_are_scored(bench, capsys):
    test_answers(bench, "sft", bench.policy("sft"), "chatml")
    answers = bench.records.rows("answers", model="sft", set="test")
    assert [row["id"] for row in answers] == [e.id for e in bench.instructions("test")]
    scores = bench.records.rows("scores", model="sft")
    assert scores[0]["kind"] == "checkable"
    assert scores[0]["n"] + scores[1]["n"] == len(answers)
    assert "sft: exact match 0.0%" in capsys.readouterr().out


def test_fine_tuning_lowers_the_loss_and_is_not_done_twice(source, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("common.alignment_supervised.UNTRAINED", source)
    bench = Bench(source, tmp_path, limit=6, steps=12)
    fine_tuning(bench)
    (run,) = bench.records.rows("sft")
    assert run["losses"][0] == pytest.approx(math.log(259), abs=0.7)
    assert run["validation"]["12"] < run["validation"]["0"]
    models = [row["model"] for row in bench.records.rows("scores", kind="checkable")]
    assert models == ["base", "base, short template", "sft", source]
    before = bench.records.path("sft").read_bytes()
    fine_tuning(bench)
    assert bench.records.path("sft").read_bytes() == before
