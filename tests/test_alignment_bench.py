"""Data in fixed parts, units that are done once, and models by name."""

import pytest
import torch
from test_alignment_models import source  # noqa: F401
from test_instruction import TALKS, model

from common.alignment_bench import Bench, look, summary
from common.chat_format import ChatFormat
from common.history import History
from common.instruction import InstructionBatches, response_loss
from common.training import TrainingSettings


@pytest.fixture
def bench(source, tmp_path) -> Bench:  # noqa: F811
    return Bench(source, tmp_path / "out", limit=10, steps=3)


def test_a_limit_thins_out_the_data_evenly(bench, source):  # noqa: F811
    whole = Bench(source, bench.records.folder)
    for some, every in (
        (bench.instructions("test"), whole.instructions("test")),
        (bench.pairs("b"), whole.pairs("b")),
    ):
        assert 10 <= len(some) <= 11 < len(every)
        assert set(some) < set(every)
    assert len({pair.category for pair in bench.pairs("b")}) > 3


def test_recipes_are_chosen_on_a_fifth_that_is_not_learned_from(source, tmp_path):  # noqa: F811
    bench = Bench(source, tmp_path)
    for half in "ab":
        train, held_out = bench.divided_pairs(half)
        assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
        assert len(held_out) == pytest.approx(len(train) / 4, abs=1)
        assert {pair.half for pair in train + held_out} == {half}
        assert len({pair.category for pair in held_out}) == 8


def test_a_unit_is_done_once_and_leaves_nothing_when_it_fails(bench):
    with pytest.raises(ZeroDivisionError), bench.unit("runs", "first") as rows:
        rows.append({"loss": 1 / 0})
    with bench.unit("runs", "first") as rows:
        rows.append({"loss": 1.0})
    with bench.unit("runs", "first") as rows:
        assert rows is None
    assert bench.records.rows("runs") == [{"unit": "first", "loss": 1.0}]


def test_a_stage_that_comes_too_early_is_told_what_is_missing(bench):
    with pytest.raises(ValueError, match=r"sft.safetensors is missing: run the stage"):
        bench.policy("sft")


def test_answers_are_greedy_and_in_order(bench):
    policy = bench.policy(seed=1)
    prompts = ["Hi?", "A longer question, is it?"]
    options = {"max_new_tokens": 5}
    both = bench.answer(policy, prompts, **options)
    assert both == [bench.answer(policy, [prompt], **options)[0] for prompt in prompts]


def test_runs_are_no_longer_than_asked(bench):
    asked = TrainingSettings(100, warmup_steps=10)
    assert (bench.settings(asked).n_steps, bench.settings(asked).warmup_steps) == (3, 3)
    assert bench.settings(TrainingSettings(2)).n_steps == 2


def test_a_summary_holds_settings_and_curves(bench):
    gpt = model().bfloat16()
    batches = InstructionBatches(ChatFormat(bench.tokenizer, "chatml"), TALKS, 2)
    found = look(batches, response_loss)(gpt)
    row = summary(History(evaluations={0: found}), TrainingSettings(5), 0.0, seed=7)
    assert row["validation"] == {"0": found.loss}
    assert 4 < found.loss < 7
    assert (row["seed"], row["settings"]["n_steps"], row["losses"]) == (7, 5, [])
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16
