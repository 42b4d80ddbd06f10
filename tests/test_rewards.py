"""A reward is of the last real token, pairs decide it, and swapping them changes nothing else."""

import math

import pytest
import torch
from test_chat_format import CHAT
from test_instruction import CONFIGS, model
from torch.testing import assert_close

from common.chat_format import CHATML
from common.fine_tuning import train_only, trained_parameters
from common.instruction_data import Preference, conversation
from common.judges import win_rate
from common.lora import add_lora
from common.rewards import (
    PairScores,
    RewardBatches,
    RewardModel,
    bradley_terry_loss,
    reward_loss,
    score_pairs,
    train_reward_model,
)
from common.training import TrainingSettings

# What is preferred here is politeness; lengths are alike.
PAIRS = [
    Preference(question, f"{answer} please", f"{answer} or else")
    for question, answer in [("Go?", "Wait"), ("When?", "Soon"), ("Who?", "You"), ("Why?", "Think")]
]
HELD_OUT = [Preference("What?", "Listen please", "Listen or else"),
            Preference("How?", "Fast please", "Fast or else")]  # fmt: skip
SETTINGS = TrainingSettings(60, 3e-3, weight_decay=0.0, stop_on_explosion=False)


def fresh(family: str = "llama", seed: int = 0, head: float = 0.0) -> RewardModel:
    found = RewardModel(model(family, seed), CHAT, CHATML).eval()
    found.head.weight.data.normal_(0, head, generator=torch.Generator().manual_seed(seed))
    return found


# --- The loss


def test_the_loss_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert bradley_terry_loss(chosen, rejected).item() == pytest.approx(expected)


def test_equal_rewards_cost_ln_2_and_differences_are_all_that_counts():
    chosen, rejected = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert bradley_terry_loss(chosen, chosen).item() == pytest.approx(math.log(2))
    shifted = bradley_terry_loss(chosen + 5, rejected + 5)
    assert_close(bradley_terry_loss(chosen, rejected), shifted)


def test_swapped_pairs_have_the_complementary_probability():
    chosen, rejected = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    p, q = ((-bradley_terry_loss(a[None], b[None])).exp() for a, b in
            ((chosen[0], rejected[0]), (rejected[0], chosen[0])))  # fmt: skip
    assert_close(p + q, torch.tensor(1.0))
    rewards = torch.zeros(2, 9, requires_grad=True)
    bradley_terry_loss(*(rewards + torch.stack([chosen, rejected]))).backward()
    assert_close(rewards.grad[0], -rewards.grad[1])  # what one gains, the other loses


def test_scores_by_hand():
    scores = PairScores.of(torch.tensor([2.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert (scores.n, scores.accuracy, scores.margin) == (4, 2.5 / 4, 0.0)
    assert str(scores).startswith("accuracy 62.5% (")
    with pytest.raises(ValueError, match="no pairs"):
        PairScores.of(torch.tensor([]), torch.tensor([]))


# --- The model


def test_a_new_model_has_no_opinion():
    found = score_pairs(fresh(), PAIRS)
    assert (found.accuracy, found.margin) == (0.5, 0.0)
    assert fresh().prefer("?", "a", "b") == 0.5


@pytest.mark.parametrize("family", CONFIGS)
def test_the_reward_is_read_from_the_token_that_ends_the_answer(family):
    rewards = fresh(family, head=0.5)
    talk = conversation("Go?", "Wait")
    ids = rewards.encode(talk)
    assert ids[-1] == CHAT.special_tokens["<|im_end|>"]
    with torch.no_grad():
        expected = rewards.head(rewards.gpt.hidden(ids[None])[0, -1])
    assert_close(rewards.rewards([talk]), expected)


def test_neighbours_and_filling_change_nothing():
    rewards = fresh(head=0.5)
    talks = [conversation("Go?", "a" * n) for n in (1, 30, 7)]
    alone = torch.cat([rewards.rewards([talk]) for talk in talks])
    assert_close(rewards.rewards(talks), alone)
    assert alone.std() > 0.01, "or this would prove nothing"


def test_ids_as_written_have_the_same_reward():
    rewards = fresh(head=0.5)
    prompt = rewards.chat.prompt("Go?")
    answer = [*CHAT.encode("Wait"), rewards.chat.end_id]
    found = rewards.rewards_of_ids([prompt] * 2, [answer, answer[:-1]])
    assert_close(found[0], rewards.rewards([conversation("Go?", "Wait")])[0])
    assert found[0] != found[1], "without an end it is another answer"


def test_what_is_too_long_or_unanswered():
    with pytest.raises(ValueError, match=r"has 2.. tokens, the context 160"):
        fresh().rewards([conversation("Go?", "a" * 200)])
    with pytest.raises(ValueError, match="ends with the user's turn"):
        fresh().rewards(["Go?"])


# --- Training


@pytest.mark.parametrize("how", ["all", "last block", "lora"])
def test_it_learns_what_is_preferred_and_about_other_prompts_too(how):
    torch.manual_seed(0)
    rewards = fresh()
    if how == "last block":
        train_only(rewards, ["blocks.1.*", "final_norm.*"])
        assert rewards.n_frozen == 1
    if how == "lora":
        add_lora(rewards.gpt, rank=8)
    learning = {n for n in trained_parameters(rewards)}
    before = {n: p.clone() for n, p in rewards.state_dict().items()}
    history = train_reward_model(rewards, PAIRS, SETTINGS, batch_size=4, progress=False)
    assert history.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert history.losses[-1] < 0.1
    assert score_pairs(rewards, HELD_OUT).accuracy == 1
    moved = {n for n, p in rewards.state_dict().items() if not torch.equal(p, before[n])}
    assert moved <= learning
    assert "head.weight" in moved
    assert win_rate(rewards, ["Hm?"], ["Stay please"], ["Stay or else"]).share == 1
    assert rewards.prefer("Hm?", "", "x") == 0
    assert rewards.prefer("Hm?", "x", " ") == 1
    p = rewards.prefer("Hm?", "Stay please", "Stay or else")
    assert p + rewards.prefer("Hm?", "Stay or else", "Stay please") == pytest.approx(1)


def test_frozen_blocks_computed_once_change_no_step(monkeypatch):
    def trained():
        rewards = train_only(fresh(seed=1), ["blocks.1.*"])
        settings = TrainingSettings(4, 1e-3, weight_decay=0.0)
        train_reward_model(rewards, PAIRS, settings, batch_size=2, progress=False)
        return trained_parameters(rewards)

    cached = trained()
    monkeypatch.setattr("common.rewards.lower_states", lambda model, rows: rows)
    for (name, a), b in zip(cached.items(), trained().values(), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_an_epoch_has_every_pair_once_side_by_side():
    rows = [[torch.full((n,), 10 * n + side) for n in range(1, 8)] for side in (0, 1)]
    batches = RewardBatches(*rows, 3, torch.Generator().manual_seed(0))
    assert len(batches) == 3
    seen = []
    for x, lengths in batches:
        chosen, rejected = x[:, 0].chunk(2)
        assert torch.equal(chosen + 1, rejected)
        assert torch.equal(*lengths.chunk(2))
        seen += chosen.tolist()
    assert sorted(seen) == [10 * n for n in range(1, 8)]


def test_validation_keeps_the_best_weights():
    rewards = fresh()
    wrong = [Preference(p.prompt, p.rejected, p.chosen) for p in HELD_OUT]
    settings = TrainingSettings(20, 3e-3, evaluate_every=5, stop_on_explosion=False)
    history = train_reward_model(rewards, PAIRS, settings, validation=wrong, progress=False)
    looks = [found.loss for found in history.evaluations.values()]
    assert looks[0] == min(looks) == pytest.approx(math.log(2), abs=1e-6)
    assert rewards.head.weight.abs().max() == 0, "the further it learned, the worse it got"


def test_the_loss_of_a_batch_is_of_its_halves():
    rewards = fresh(head=0.5)
    rows = [rewards.encode(talk) for pair in PAIRS for talk in pair.messages]
    x, lengths = next(iter(RewardBatches(rows[::2], rows[1::2], 4)))
    found = rewards.rewards([t for pair in PAIRS for t in pair.messages])
    assert_close(reward_loss(rewards, x, lengths), bradley_terry_loss(found[::2], found[1::2]))
