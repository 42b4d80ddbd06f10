"""Policies begin at the fine-tuned model, and rewards at mean 0 and deviation 1."""

import math

import pytest
import torch
from test_alignment_models import moved, source  # noqa: F401

from common.alignment_bench import Bench
from common.alignment_models import low_precision, open_judge, save_judge, save_policy
from common.alignment_policies import RUNS, PPORun, Run, direct_preference, reinforcement
from common.instruction import characters
from common.lora import lora_parameters
from common.rollout import rollout


@pytest.fixture
def bench(source, tmp_path) -> Bench:  # noqa: F811
    """A comparison with a fine-tuned model and a judge, both moved at random."""
    bench = Bench(source, tmp_path, limit=10, steps=2)
    sft = bench.records.folder / "sft.safetensors"
    save_policy(moved(bench.policy()), source, sft)
    save_judge(moved(open_judge(source, sft)), bench.records.folder / "judge-a.safetensors")
    return bench


def test_dpo_begins_at_ln_2_because_its_reference_is_sft(bench):
    direct_preference(bench)
    run, anchored = bench.records.rows("dpo")
    assert anchored["losses"][0] > 3 + run["losses"][0], "of bytes at random: ln 259 more"
    assert run["losses"][0] == run["validation"]["0"] == pytest.approx(math.log(2), abs=1e-4)
    assert run["pairs"] == len(bench.divided_pairs("a")[0])
    before, after = bench.policy("sft"), bench.policy("dpo")
    weights = zip(lora_parameters(before).values(), lora_parameters(after).values(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)


def test_rewards_of_the_fine_tuned_model_have_mean_0_and_deviation_1(bench):
    run, model = PPORun(bench, "ppo"), bench.policy("sft")
    run.scale(model, seed=3)
    generator = torch.Generator().manual_seed(3)
    with low_precision():
        played = rollout(model, run.prompts[::3], 48, run.chat.end_id, generator=generator)
    found = run.reward(played.prompts, played.responses)
    assert found.mean().item() == pytest.approx(0, abs=1e-3)
    assert found.std().item() == pytest.approx(1, abs=1e-3)


def test_ppo_leaves_steps_and_samples_and_starts_at_kl_0(bench):
    reinforcement(bench, ["ppo"])
    rows = bench.records.rows("ppo", unit="ppo")
    about, steps = rows[0], [row for row in rows if "step" in row]
    samples = [row for row in rows if "sample_at" in row]
    assert about["kl_weight"] == RUNS["ppo"].kl_weight > 0 == RUNS["ppo-free"].kl_weight
    assert [step["step"] for step in steps] == [1, 2]
    assert (steps[0]["kl"], steps[0]["ratio_error"]) == (0, 0)
    assert {row["sample_at"] for row in samples} == {1, 2}
    assert {row["prompt"] for row in samples} <= {pair.prompt for pair in bench.pairs("a")}
    assert bench.policy("ppo")


def test_samples_are_what_was_rewarded(bench):
    run = PPORun(bench, "ppo")
    run.train(Run(0.1, RUNS["ppo"].settings))
    last = [row for row in run.rows if row.get("sample_at") == 2]
    texts = ["".join(characters(bench.tokenizer, r)).strip() for _, r, _ in run.played[:8]]
    assert [row["answer"] for row in last] == texts
    assert [row["reward"] for row in last] == [reward for *_, reward in run.played[:8]]
