"""The comparison of all models of chapter 7, from the answers they gave.

    best_of_n(bench)         # answers of SFT, chosen by the reward model: no training at all
    compare(bench)           # answers.jsonl, scores.jsonl, compare.jsonl, and pairs to read
    verdicts(bench.records)  # who won in the blind reading, once the verdicts are written

The judge of half "b" decides who wins against SFT: no policy ever saw its pairs or its prompts.
"""

import json
import random
from collections.abc import Sequence

import torch

from common.alignment_bench import Bench
from common.alignment_models import TEMPLATE, answered, open_base, rewards, token_kl
from common.alignment_policies import LONGEST
from common.alignment_records import Records, Row, preferred, share
from common.alignment_supervised import test_answers
from common.answers import is_refusal, words
from common.chat_format import ChatFormat, template_for
from common.gpt import GPT
from common.instruction import InstructionBatches
from common.instruction_data import Preference
from common.judges import WinRate
from common.metrics import wilson_interval

N_DRAWN = 4  # of which the reward model takes the best
BEST = f"best-of-{N_DRAWN}"
TRAINED = ("sft", "dpo", "dpo-anchored", "ppo", "ppo-free")
MODELS = ("base", *TRAINED, BEST)
RIVALS = ("dpo", "ppo")  # who is read against SFT
N_READ = 25  # pairs of answers of each


def best_of_n(bench: Bench, seed: int = 0) -> None:
    """Of several answers that SFT draws, as PPO does, the one that the judge of half "a" likes."""
    pairs = bench.pairs("b")
    prompts = [pair.prompt for pair in pairs]
    with bench.unit("answers", f"{BEST}, b") as rows:
        if rows is None:
            return
        generator, model = torch.Generator().manual_seed(seed), bench.policy("sft")
        drawn = [
            bench.answer(
                model, prompts, temperature=1.0, generator=generator, max_new_tokens=LONGEST
            )
            for _ in range(N_DRAWN)
        ]
        judge = bench.judge("a")
        scores = torch.stack([rewards(judge, prompts, answers) for answers in drawn])  # (n, N)
        best = [drawn[k][i] for i, k in enumerate(scores.argmax(0).tolist())]
        rows += judged(bench, BEST, None, pairs, best)


def compare(bench: Bench) -> None:
    """Answers of every model, and what is to be known about them, a row per model."""
    best_of_n(bench)
    for name in ("dpo", "dpo-anchored", "ppo"):
        test_answers(bench, name, bench.policy(name), TEMPLATE)
    for name in ("base", *TRAINED):
        answer_prompts(bench, name)
    for name in MODELS:
        with bench.unit("compare", name) as rows:
            if rows is not None:
                rows.append(figures(bench.records, bench.pairs("b"), name))
                print(json.dumps(rows[0]), flush=True)
    prepare_reading(bench.records, bench.pairs("b"))


def answer_prompts(bench: Bench, name: str) -> None:
    """Greedy answers of a model to the prompts of half "b", and what both judges give."""
    with bench.unit("answers", f"{name}, b") as rows:
        if rows is None:
            return
        if name == "base":
            model, template = open_base(bench.source)[0].bfloat16(), template_for(bench.tokenizer)
        else:
            model, template = bench.policy(name), TEMPLATE
        pairs = bench.pairs("b")
        answers = bench.answer(model, [pair.prompt for pair in pairs], template)
        rows += judged(bench, name, model if name != "base" else None, pairs, answers)


def judged(
    bench: Bench, name: str, model: GPT | None, pairs: Sequence[Preference], answers: Sequence[str]
) -> list[Row]:
    """Answers as rows, with the rewards of both judges, and a model's distance from SFT."""
    prompts = [pair.prompt for pair in pairs]
    columns = {
        f"reward_{half}": rewards(bench.judge(half), prompts, answers).tolist() for half in "ab"
    }
    if model is not None:
        chat = ChatFormat(bench.tokenizer, TEMPLATE)
        batches = InstructionBatches(chat, answered(prompts, answers), 1)
        distances = token_kl(model, bench.policy("sft"), batches)
        columns["kl"], columns["tokens"] = zip(*distances, strict=True)
    return [
        {"model": name, "set": "b", "id": pair.id, "answer": answer}
        | {column: values[i] for column, values in columns.items()}
        for i, (pair, answer) in enumerate(zip(pairs, answers, strict=True))
    ]


# ----------------------------------------------------------- figures, from what is stored alone


def figures(records: Records, pairs: Sequence[Preference], name: str) -> Row:
    """All there is to say about a model: its row of the table.

    Win rates are against SFT by the judge that no policy was trained on; refusals by
    `is_refusal`; KL is to SFT, in nats per token of the model's own answers; minutes of training
    begin at SFT.
    """
    rows, sft = (records.rows("answers", unit=f"{who}, b") for who in (name, "sft"))
    answers, those = ([row["answer"] for row in side] for side in (rows, sft))
    wins = preferred(*([row["reward_b"] for row in side] for side in (rows, sft)), answers, those)
    refused = {
        category: share([
            is_refusal(answer) for pair, answer in zip(pairs, answers, strict=True)
            if pair.category == category
        ])
        for category in ("refuse", "over_refusal")
    }  # fmt: skip
    kl = mean(rows, "kl") / mean(rows, "tokens") if "kl" in rows[0] else None
    exact = records.rows("scores", unit=f"{name}, test", kind="checkable")
    return {
        "model": name,
        "exact": exact[0]["exact"] if exact else None,
        "exact_interval": exact[0]["exact_interval"] if exact else None,
        "win_rate": wins.share,
        "win_interval": wins.interval,
        "n": wins.n,
        "same_text": sum(a == b for a, b in zip(answers, those, strict=True)) / wins.n,
        "reward_a": mean(rows, "reward_a"),
        "reward_b": mean(rows, "reward_b"),
        "refused_unsafe": refused["refuse"],
        "refused_harmless": refused["over_refusal"],
        "kl_per_token": kl,
        "words": sum(len(words(answer)) for answer in answers) / wins.n,
        "minutes": minutes(records, name),
    }


def mean(rows: Sequence[Row], column: str) -> float:
    """The mean of a column."""
    return sum(row[column] for row in rows) / len(rows)


def minutes(records: Records, name: str) -> float:
    """What the training took after SFT, or for SFT itself; with the judge where one was needed."""
    seconds = lambda stage, **wanted: sum(
        row.get("seconds", 0) for row in records.rows(stage, **wanted)
    )
    judge = seconds("reward", unit="judge-a", kept=True)
    spent = {
        "sft": lambda: seconds("sft"),
        "dpo": lambda: seconds("dpo", unit="dpo"),
        "dpo-anchored": lambda: seconds("dpo", unit="dpo-anchored"),
        "ppo": lambda: judge + seconds("ppo", unit="ppo"),
        "ppo-free": lambda: judge + seconds("ppo", unit="ppo-free"),
        BEST: lambda: judge,
    }
    return spent[name]() / 60 if name in spent else 0.0


# ------------------------------------------------------------------------------ the blind reading


def prepare_reading(records: Records, pairs: Sequence[Preference], seed: int = 0) -> None:
    """Write pairs of answers that differ, in random order, and who is who in another file."""
    if records.path("reading_pairs").exists():
        return
    generator, shown = random.Random(seed), []
    answers = {
        name: {row["id"]: row["answer"] for row in records.rows("answers", unit=f"{name}, b")}
        for name in ("sft", *RIVALS)
    }
    prompts = {pair.id: pair.prompt for pair in pairs}
    for rival in RIVALS:
        differ = [i for i in prompts if answers[rival][i] != answers["sft"][i]]
        for i in generator.sample(differ, min(N_READ, len(differ))):
            shown.append((i, generator.sample(("sft", rival), 2)))
    generator.shuffle(shown)
    read, key = [], []
    for number, (i, order) in enumerate(shown, 1):
        said = {side: answers[name][i] for side, name in zip("AB", order, strict=True)}
        read.append({"number": number, "prompt": prompts[i], **said})
        key.append({"number": number, "id": i, **dict(zip("AB", order, strict=True))})
    records.add("reading_pairs", read)
    records.add("reading_key", key)


def verdicts(records: Records) -> dict[str, WinRate]:
    """How often the reader preferred each rival to SFT; a tie is half. Empty without verdicts."""
    said = {row["number"]: row["verdict"] for row in records.rows("reading_verdicts")}
    points: dict[str, list[float]] = {rival: [] for rival in RIVALS}
    for row in records.rows("reading_key"):
        if row["number"] in said:
            verdict = said[row["number"]]
            rival = row["A"] if row["A"] != "sft" else row["B"]
            points[rival].append(0.5 if verdict == "tie" else float(row[verdict] == rival))
    return {
        rival: WinRate(len(p), sum(p) / len(p), wilson_interval(round(sum(p)), len(p)))
        for rival, p in points.items()
        if p
    }
