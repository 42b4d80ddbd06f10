"""The stages that learn from examples: instruction fine-tuning, and two reward models.

fine_tuning(Bench("smollm2-135m", "results"))    # sft.jsonl, answers.jsonl, sft.safetensors
reward_models(Bench("smollm2-135m", "results"))  # reward.jsonl, judge-a and judge-b
"""

from collections.abc import Sequence
from time import perf_counter

import torch

from common.alignment_bench import Bench, look, summary
from common.alignment_models import (
    TEMPLATE,
    open_base,
    open_judge,
    rewards,
    round_trained,
    save_judge,
    save_policy,
)
from common.alignment_records import Row, scores_by_kind
from common.chat_format import ChatFormat, template_for
from common.fine_tuning import fit, trained_parameters
from common.gpt import GPT
from common.instruction import InstructionBatches, response_loss
from common.instruction_data import HALVES, Preference
from common.pooled import lower_states
from common.rewards import PairScores, RewardBatches, RewardModel, reward_loss
from common.training import TrainingSettings

SFT = TrainingSettings(
    264, 6e-4, warmup_steps=20, weight_decay=0.0, dtype="bfloat16", evaluate_every=44
)  # three epochs
SFT_BATCH = 16
UNTRAINED = "course-small"  # a base model that was never taught to answer


def fine_tuning(bench: Bench) -> None:
    """SFT: answers to the test split before and after, and the training between."""
    base, own = open_base(bench.source)[0].bfloat16(), template_for(bench.tokenizer).name
    test_answers(bench, "base", base, own)
    test_answers(bench, "base, short template", base, TEMPLATE)
    with bench.unit("sft", "training") as rows:
        if rows is not None:
            rows.append(train_sft(bench))
    test_answers(bench, "sft", bench.policy("sft"), TEMPLATE)
    before_instructions(bench)


def train_sft(bench: Bench, seed: int = 0) -> dict:
    """Fine-tune new adapters on the train split and save them; what happened, as a row."""
    begun, settings = perf_counter(), bench.settings(SFT)
    chat, generator = ChatFormat(bench.tokenizer, TEMPLATE), torch.Generator().manual_seed(seed)
    batches = {
        split: InstructionBatches(
            chat,
            [entry.messages for entry in bench.instructions(split)],
            SFT_BATCH,
            generator if split == "train" else None,
        )
        for split in ("train", "validation")
    }
    model = bench.policy(seed=seed)
    asked = look(batches["validation"], response_loss)
    history = fit(model, batches["train"], response_loss, settings, look=asked, report=print)
    save_policy(model, bench.source, bench.records.folder / "sft.safetensors")
    return summary(
        history, settings, begun, seed=seed, template=TEMPLATE, batch_size=SFT_BATCH,
        examples=len(batches["train"].rows),
        parameters=sum(p.numel() for p in trained_parameters(model).values()),
    )  # fmt: skip


def test_answers(bench: Bench, name: str, model: GPT, template: str) -> None:
    """Answers of a model to the test split, and how good they are by kind."""
    test = bench.instructions("test")
    with bench.unit("answers", f"{name}, test") as rows:
        if rows is not None:
            found = bench.answer(model, [entry.prompt for entry in test], template)
            rows += [
                {"model": name, "set": "test", "id": entry.id, "answer": answer}
                for entry, answer in zip(test, found, strict=True)
            ]
    with bench.unit("scores", f"{name}, test") as rows:
        if rows is not None:
            found = [row["answer"] for row in bench.records.rows("answers", unit=f"{name}, test")]
            for kind, scores in scores_by_kind(found, test).items():
                rows.append({"model": name, "template": template, "kind": kind, **scores})
            print(f"{name}: exact match {rows[0]['exact']:.1%} of {rows[0]['n']}", flush=True)


test_answers.__test__ = False  # pytest: not a test


def before_instructions(bench: Bench) -> None:
    """The same for a model that has only ever read: the course's own, in Alpaca's template."""
    gpt, tokenizer = open_base(UNTRAINED)
    other = Bench.__new__(Bench)
    vars(other).update(vars(bench), tokenizer=tokenizer)
    test_answers(other, UNTRAINED, gpt, "alpaca")


# -------------------------------------------------------------------------------- reward models

REWARD = TrainingSettings(
    81, 1e-3, warmup_steps=8, weight_decay=0.0, dtype="bfloat16", evaluate_every=9
)  # three epochs
REWARD_BATCH = 8
SEEDS = (0, 1, 2)


def reward_models(bench: Bench, halves: Sequence[str] = HALVES) -> None:
    """A reward model per half, judged by the other half; of three seeds the best is kept."""
    for half in halves:
        other = "b" if half == "a" else "a"
        with bench.unit("reward", f"judge-{half}") as rows:
            if rows is not None:
                rows += train_judges(bench, half, bench.pairs(other))
        with bench.unit("reward", f"baselines, {half}") as rows:
            if rows is not None:
                rows += baselines(bench.pairs(half), bench.pairs(other))


def train_judges(bench: Bench, half: str, others: Sequence[Preference]) -> list[Row]:
    """Train a reward model per seed on one half, save the best; accuracies on the other half.

    The best is that of the lowest loss on a fifth of its own half, which it did not learn from.
    """
    rows, best = [], float("inf")
    for seed in SEEDS:
        judge, about = train_judge(bench, half, REWARD, seed)
        lowest = min(about["validation"].values())
        rows.append(about | {"half": half, "lowest": lowest})
        found = judge_accuracy(judge, others)
        for row in found:
            rows.append({"half": half, "seed": seed, **row})
        print(f"judge {half}, seed {seed}: validation {lowest:.3f}, {found[0]}", flush=True)
        if lowest < best:
            best, kept = lowest, seed
            save_judge(judge, bench.records.folder / f"judge-{half}.safetensors")
    return [row | {"kept": row["seed"] == kept} for row in rows]


def train_judge(
    bench: Bench, half: str, settings: TrainingSettings, seed: int
) -> tuple[RewardModel, Row]:
    """One reward model, of the best look at a fifth of its half, and what happened."""
    begun, settings = perf_counter(), bench.settings(settings)
    judge = open_judge(bench.source, bench.adapters("sft"), seed)

    def batches(pairs, generator=None) -> RewardBatches:
        talks = [talk for pair in pairs for talk in pair.messages]
        rows = lower_states(judge, [judge.encode(talk) for talk in talks])
        return RewardBatches(rows[::2], rows[1::2], REWARD_BATCH, generator)

    train, held_out = map(batches, bench.divided_pairs(half))
    train.generator = torch.Generator().manual_seed(seed)
    history = fit(judge, train, reward_loss, settings, look=look(held_out, reward_loss))
    return round_trained(judge), summary(
        history, settings, begun, seed=seed, batch_size=REWARD_BATCH
    )


def judge_accuracy(judge: RewardModel, pairs: Sequence[Preference]) -> list[Row]:
    """How often a reward model agrees with pairs: of all, and of each category."""
    prompts = [pair.prompt for pair in pairs]
    chosen = rewards(judge, prompts, [pair.chosen for pair in pairs])
    rejected = rewards(judge, prompts, [pair.rejected for pair in pairs])
    rows = []
    for category in ["all", *sorted({pair.category for pair in pairs})]:
        of = [i for i, p in enumerate(pairs) if category in ("all", p.category)]
        found = PairScores.of(chosen[of], rejected[of])
        rows.append({"category": category, **vars(found)})
    longer = torch.tensor([len(p.chosen) > len(p.rejected) for p in pairs])
    for name, of in (("chosen is longer", longer), ("chosen is shorter", ~longer)):
        if of.any():
            rows.append({"category": name, **vars(PairScores.of(chosen[of], rejected[of]))})
    return rows


def baselines(train: Sequence[Preference], others: Sequence[Preference]) -> list[Row]:
    """What needs no model: the longer answer, and logistic regression on the words of answers."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    chosen, rejected = ([[getattr(p, side) for p in half] for half in (train, others)]
                        for side in ("chosen", "rejected"))  # fmt: skip
    words = CountVectorizer(ngram_range=(1, 2), binary=True).fit(chosen[0] + rejected[0])
    X = (words.transform(chosen[0]) - words.transform(rejected[0])).toarray()
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit([*X, *-X], [1] * len(X) + [0] * len(X))  # each pair both ways round
    scores = {
        "longer answer": lambda texts: [len(text) for text in texts],
        "bag of words": lambda texts: words.transform(texts) @ model.coef_[0],
    }
    rows = []
    for name, score in scores.items():
        pair = (torch.tensor(score(side[1]), dtype=torch.float) for side in (chosen, rejected))
        rows.append({"method": name, **vars(PairScores.of(*pair))})
    return rows
