"""Tiny policies learn a plain reward by each algorithm, begin at ratio 1, and feel the leash."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from common.gpt import GPT, GPTConfig
from common.lora import add_lora, lora_parameters
from common.policy_training import ActorCritic, policy_table, train_policy
from common.reinforcement import GRPO, PPO, KLWeight, Reinforce
from common.rollout import Reference, policy_logprobs, rollout
from common.training import TrainingSettings

EOS, WANTED = 0, 5
CONFIG = GPTConfig(16, context_length=32, d_model=32, n_layers=2, n_heads=4, d_ff=64)
PROMPTS = [[1, 2], [3], [4, 1, 2]]
SETTINGS = TrainingSettings(40, 5e-3, schedule="constant", weight_decay=0.0)
FREE = lambda: KLWeight(0.0)
ALGORITHMS = {
    "reinforce": lambda kl: Reinforce(group_size=8, kl=kl),
    "grpo": lambda kl: GRPO(group_size=8, kl=kl),
    "ppo": lambda kl: PPO(group_size=8, kl=kl),
}
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def fresh(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(replace(CONFIG, **changes)).eval()


def wanted(prompts, responses):
    """The share of one token in the answer."""
    return [sum(i == WANTED for i in r) / max(len(r), 1) for r in responses]


def learn(name: str, kl=None, model=None, settings=SETTINGS, reward=wanted, **options):
    model = model or fresh()
    options = {"max_new_tokens": 8, "prompts_per_step": 4, "progress": False, **options}
    algorithm = ALGORITHMS[name](kl or FREE())
    return model, train_policy(model, PROMPTS, reward, algorithm, settings, eos_id=EOS, **options)


# --- It learns


@each_algorithm
def test_each_algorithm_learns_a_plain_reward(name):
    _, steps = learn(name)
    assert steps[0].reward < 0.15
    assert sum(step.reward for step in steps[-5:]) / 5 > 0.6
    assert steps[-1].kl > 2, "without a leash it has gone far"


@each_algorithm
def test_a_short_leash_keeps_it_near(name):
    _, free = learn(name)
    _, held = learn(name, KLWeight(5.0))
    assert abs(held[-1].kl) < 0.5 < free[-1].kl
    assert held[-1].reward < 0.5 * free[-1].reward


def test_it_learns_to_end_when_ending_pays():
    """The end token gets its reward: answers become shorter than chance would make them."""
    early = lambda prompts, responses: [float(r[-1] == EOS and len(r) <= 2) for r in responses]
    _, steps = learn("ppo", reward=early)
    assert steps[0].ended < 0.6
    assert sum(step.ended for step in steps[-5:]) / 5 > 0.9
    assert steps[-1].length < 3 < steps[0].length


def test_running_on_may_cost():
    _, steps = learn("grpo", reward=lambda p, r: [0.0] * len(r), no_end_penalty=1.0)
    assert steps[0].reward == pytest.approx(steps[0].ended - 1)
    assert steps[-1].ended > 0.9


def test_an_adaptive_leash_ends_near_its_target():
    settings = replace(SETTINGS, n_steps=80)
    _, steps = learn("ppo", KLWeight(0.01, target=1.5, horizon=30), settings=settings)
    late = [step.kl for step in steps[-15:]]
    assert 0.4 < sum(late) / len(late) < 4
    weights = [step.kl_weight for step in steps]
    assert max(weights) > 2 * weights[0], "it had to pull"


def test_adapters_alone_learn_and_are_their_own_reference():
    model = fresh()
    model.token_embedding.weight.data *= 10  # frozen, and too small for a firm opinion
    add_lora(model, rank=4)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    settings = replace(SETTINGS, learning_rate=2e-2)
    _, steps = learn("grpo", model=model, settings=settings)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == set(lora_parameters(model))
    assert steps[0].kl == pytest.approx(0, abs=1e-6)
    assert steps[-1].kl > 0.3
    assert steps[-1].reward > 2 * steps[0].reward


# --- The first step


@each_algorithm
def test_on_the_first_step_the_ratio_is_1_and_the_kl_0(name):
    _, steps = learn(name, settings=replace(SETTINGS, n_steps=2))
    assert steps[0].ratio_error == 0
    assert steps[1].ratio_error == 0, "and again at the beginning of every rollout"
    assert steps[0].kl == 0
    if name == "grpo":
        assert steps[0].loss == pytest.approx(0, abs=1e-5), "advantages of groups cancel"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_and_low_precision_leave_the_ratio_at_1(dtype):
    model = fresh(dropout=0.5).train()
    settings = replace(SETTINGS, n_steps=2, dtype=dtype)
    _, steps = learn("ppo", model=model, settings=settings)
    assert [step.ratio_error for step in steps] == [0, 0]
    assert model.training


def test_minibatches_and_passes_move_the_ratio():
    algorithm = PPO(group_size=4, passes=3, minibatches=2, kl=FREE())
    settings = replace(SETTINGS, n_steps=1, learning_rate=0.05)
    steps = train_policy(fresh(), PROMPTS, wanted, algorithm, settings, eos_id=EOS,
                         max_new_tokens=6, progress=False)  # fmt: skip
    assert steps[0].ratio_error == pytest.approx(0, abs=1e-5)
    assert steps[0].clipped > 0.05


# --- The parts


def test_the_value_is_read_before_its_token_is_written():
    """Two answers that differ in the last token alone have the same values."""
    actor = ActorCritic(fresh(), has_value=True)
    actor.value.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    played = rollout(actor.gpt, [[1, 2]] * 64, 2, EOS, generator=torch.Generator().manual_seed(0))
    firsts = [i for i, r in enumerate(played.responses) if len(r) == 2 and r[0] == 3]
    with torch.no_grad():
        logprobs, values = actor(played)
    assert len({tuple(played.responses[i]) for i in firsts}) > 1
    assert_close(values[firsts], values[firsts[:1]].expand(len(firsts), 2))
    assert values[firsts[0], 0] != values[firsts[0], 1]
    assert_close(logprobs, policy_logprobs(actor.gpt, played).detach())
    with torch.no_grad():
        state = actor.gpt.hidden(torch.tensor([[1, 2]]))[0, -1]
    assert_close(values[:, 0], actor.value(state).expand(64).detach())


def test_the_seed_decides_and_the_algorithm_is_not_used_up():
    kl = KLWeight(0.1, target=0.01, horizon=10)
    algorithm, settings = PPO(kl=kl), replace(SETTINGS, n_steps=3)
    run = lambda seed: train_policy(
        fresh(), PROMPTS, wanted, algorithm, settings, eos_id=EOS, seed=seed, max_new_tokens=6,
        progress=False,
    )  # fmt: skip
    assert run(0) == run(0) != run(1)
    assert kl.weight == 0.1


def test_the_reference_may_be_another_model():
    model, other = fresh(), fresh(seed=1)
    copied = copy.deepcopy(other.state_dict())
    _, steps = learn("grpo", KLWeight(0.5), model, replace(SETTINGS, n_steps=2), reference=other)
    assert steps[0].kl > 0
    assert all(torch.equal(p, copied[n]) for n, p in other.state_dict().items())
    assert Reference(model, other).copy is other


def test_steps_make_a_table_and_are_reported():
    seen = []
    _, steps = learn("grpo", settings=replace(SETTINGS, n_steps=3), report=seen.append)
    assert seen == steps
    table = policy_table(steps)
    assert table.index.tolist() == [1, 2, 3]
    assert {"reward", "kl", "length", "kl_weight"} <= set(table.columns)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda p, r: [1.0], "must be 32 finite numbers, one per response; it is of shape"),
        (lambda p, r: [float("nan")] * len(r), "and not finite"),
    ],
)
def test_a_reward_that_is_none(reward, message):
    with pytest.raises(ValueError, match=message):
        learn("grpo", reward=reward)


def test_no_prompts():
    with pytest.raises(ValueError, match="0 prompts, 8 per step"):
        train_policy(fresh(), [], wanted, GRPO(), SETTINGS, eos_id=EOS, progress=False)
