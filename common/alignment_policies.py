"""The stages that learn from preferences: DPO, and PPO against a reward model.

direct_preference(bench)  # dpo.jsonl, dpo.safetensors, dpo-anchored.safetensors
reinforcement(bench)      # ppo.jsonl, ppo.safetensors, and the run without a leash
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from common.alignment_bench import Bench, look, summary
from common.alignment_models import TEMPLATE, low_precision, save_policy
from common.alignment_records import Row
from common.chat_format import ChatFormat
from common.fine_tuning import fit
from common.gpt import GPT
from common.instruction import characters
from common.policy_training import PolicyStep, train_policy
from common.preference import PreferenceBatches, preference_loss
from common.reinforcement import PPO, KLWeight
from common.rollout import Ids, rollout
from common.training import TrainingSettings

BETA = 0.1  # the leash
ANCHORS = {"dpo": 0.0, "dpo-anchored": 1.0}  # the weight of the chosen answers' own loss
DPO = TrainingSettings(
    81, 3e-4, warmup_steps=8, weight_decay=0.0, dtype="bfloat16", evaluate_every=9
)  # three epochs
DPO_BATCH = 8


def direct_preference(bench: Bench) -> None:
    """DPO from the fine-tuned model on half "a", as published and anchored.

    The best look at a fifth of the half is kept.
    """
    for name in ANCHORS:
        with bench.unit("dpo", name) as rows:
            if rows is not None:
                rows.append(train_dpo_policy(bench, name, DPO))


def train_dpo_policy(bench: Bench, name: str, settings: TrainingSettings, seed: int = 0) -> Row:
    """Go on from the adapters of SFT, whose log-probabilities are remembered as the reference."""
    begun, settings = perf_counter(), bench.settings(settings)
    policy, chat = bench.policy("sft"), ChatFormat(bench.tokenizer, TEMPLATE)
    generator = torch.Generator().manual_seed(seed)
    train, held_out = (
        PreferenceBatches(chat, pairs, DPO_BATCH, source).remember(policy, True, adapters=True)
        for pairs, source in zip(bench.divided_pairs("a"), (generator, None), strict=True)
    )
    loss = partial(preference_loss, beta=BETA, anchor=ANCHORS[name])
    history = fit(policy, train, loss, settings, look=look(held_out, loss), report=print)
    save_policy(policy, bench.source, bench.records.folder / f"{name}.safetensors")
    about = {
        "seed": seed,
        "batch_size": DPO_BATCH,
        "beta": BETA,
        "anchor": ANCHORS[name],
        "pairs": len(train.lengths),
    }
    return summary(history, settings, begun, **about)


# ------------------------------------------------------------------------ reinforcement learning

PPO_SETTINGS = TrainingSettings(
    48, 2e-4, warmup_steps=4, weight_decay=0.0, dtype="bfloat16"
)  # a cosine
PROMPTS_PER_STEP = 32
LONGEST = 48  # tokens of an answer
NO_END = 1.0  # off the reward of an answer that was cut off there


class Run(NamedTuple):
    """One run of PPO: how tight its leash is, in rewards per nat, and its settings."""

    kl_weight: float
    settings: TrainingSettings


RUNS = {
    "ppo": Run(0.05, PPO_SETTINGS),
    "ppo-free": Run(0.0, replace(PPO_SETTINGS, n_steps=30, learning_rate=1e-3)),
}


def reinforcement(bench: Bench, names: Sequence[str] = tuple(RUNS)) -> None:
    """PPO from the fine-tuned model against the judge of half "a", with a leash and without."""
    for name in names:
        with bench.unit("ppo", name) as rows:
            if rows is not None:
                rows += PPORun(bench, name).train(RUNS[name])


class PPORun:
    """One run from the adapters of SFT, and what it leaves: settings, steps, samples.

    Rewards are shifted and scaled so that the fine-tuned model's own have mean 0 and deviation 1
    (Ziegler et al. 2019, section 2.2): a weight of the KL then means the same for any judge.
    """

    def __init__(self, bench: Bench, name: str):
        self.bench, self.name, self.judge = bench, name, bench.judge("a")
        self.chat = ChatFormat(bench.tokenizer, TEMPLATE)
        self.prompts = [self.chat.prompt(pair.prompt) for pair in bench.pairs("a")]
        self.rows: list[Row] = []
        self.mean, self.spread = torch.tensor(0.0), torch.tensor(1.0)

    def train(self, run: Run, seed: int = 0) -> list[Row]:
        """Train, save the adapters; rows: what was set, every step, answers on the way."""
        self.begun, settings = perf_counter(), self.bench.settings(run.settings)
        policy, reference = (self.bench.policy("sft") for _ in range(2))
        self.scale(reference, seed)
        self.moments = {1, settings.n_steps // 2, settings.n_steps}
        train_policy(
            policy, self.prompts, self.reward, algorithm(run), settings,
            eos_id=self.chat.end_id, max_new_tokens=LONGEST, prompts_per_step=PROMPTS_PER_STEP,
            no_end_penalty=NO_END, reference=reference, seed=seed, progress=False,
            report=self.report,
        )  # fmt: skip
        path = self.bench.records.folder / f"{self.name}.safetensors"
        save_policy(policy, self.bench.source, path)
        about = {
            "run": self.name, "seed": seed, "kl_weight": run.kl_weight,
            "prompts_per_step": PROMPTS_PER_STEP, "max_new_tokens": LONGEST,
            "no_end_penalty": NO_END, "reward_mean": self.mean.item(),
            "reward_spread": self.spread.item(), "settings": asdict(settings),
            "seconds": round(perf_counter() - self.begun, 1),
        }  # fmt: skip
        return [about, *self.rows]

    def scale(self, model: GPT, seed: int) -> None:
        """Find mean and spread of the rewards of a model's own answers."""
        drawn = torch.Generator().manual_seed(seed)
        with low_precision():
            played = rollout(model, self.prompts[::3], LONGEST, self.chat.end_id, generator=drawn)
        found = self.reward(played.prompts, played.responses)
        self.mean, self.spread = found.mean(), found.std().clamp(min=1e-3)

    def reward(self, prompts: Ids, responses: Ids) -> Tensor:
        """What the judge gives, scaled; remembers it for `report`."""
        with low_precision():
            found = (self.judge.rewards_of_ids(prompts, responses) - self.mean) / self.spread
        self.played = list(zip(prompts, responses, found.tolist(), strict=True))
        return found

    def report(self, step: PolicyStep) -> None:
        """Keep a step, and at some of them, eight of its answers."""
        self.rows.append({"run": self.name, **step._asdict()})
        seconds = perf_counter() - self.begun
        print(
            f"{self.name} {step.step}: reward {step.reward:.3f}, KL {step.kl:.2f}, "
            f"{step.length:.1f} tokens, ended {step.ended:.0%}, {seconds:.0f} s",
            flush=True,
        )
        said = lambda ids: "".join(characters(self.bench.tokenizer, ids)).strip()
        if step.step in self.moments:
            asked = {tuple(self.chat.prompt(p.prompt)): p.prompt for p in self.bench.pairs("a")}
            self.rows += [
                {"run": self.name, "sample_at": step.step, "prompt": asked[tuple(prompt)],
                 "answer": said(response), "reward": reward}
                for prompt, response, reward in self.played[:8]
            ]  # fmt: skip


def algorithm(run: Run) -> PPO:
    """Two passes over each rollout, in two halves."""
    return PPO(kl=KLWeight(run.kl_weight), passes=2, minibatches=2)
