"""Our byte-pair encoding beside Hugging Face's `tokenizers` and tiktoken, on one thread.

    uv run python tests/benchmarks/bench_tokenizer.py [--rounds 5]

Figures to reach, on 4 MB of English: encoding, before any word is known, at least 3 times as fast
as `tokenizers`; training to a vocabulary of 4,096 within 2.5 times its time. What is timed is
checked first: all three give the same ids for GPT-2.

`tokenizers` is faster when it gets the text by lines, and its training uses several threads where
it may: both are measured as well, training in a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from common.assets import fetch
from common.corpus import harvest_docstrings, read_shakespeare
from common.tokenizer import BPETokenizer, gpt2_tokenizer

SINGLE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
SEVERAL = {"TOKENIZERS_PARALLELISM": "true"}
SIZE, VOCAB_SIZE = 4_000_000, 4_096


def shakespeare() -> str:
    return "".join(document.text for document in read_shakespeare())[:SIZE]


def docstrings() -> str:
    documents = islice(harvest_docstrings(), 20_000)
    return "\n\n".join(document.text for document in documents)[:SIZE]


def seconds(function: Callable, *arguments) -> float:
    """Wall-clock time of one call."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def report(title: str, times: dict[str, list[float]], megabytes: float, ours: str) -> None:
    """One line per competitor; its ratio is that of the medians, ours to theirs."""
    print(f"\n{title}")
    mine = statistics.median(times[ours])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(
            f"  {name:42} best {min(measured):6.3f} s   median {median:6.3f} s   "
            f"{megabytes / median:5.1f} MB/s   ours takes {mine / median:5.2f} of its time"
        )


def hugging_face_gpt2() -> Tokenizer:
    merges = str(fetch("gpt2-bpe-vocab"))
    tokenizer = Tokenizer(models.BPE.from_file(str(fetch("gpt2-bpe-encoder")), merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def encode_all(tokenizer: BPETokenizer | Tokenizer, lines: list[str]) -> None:
    for line in lines:
        tokenizer.encode(line)


def bench_encoding(name: str, text: str, rounds: int) -> None:
    ours, theirs, rust = BPETokenizer.gpt2(), hugging_face_gpt2(), gpt2_tokenizer()
    ids = ours.encode(text)
    assert ids == rust.encode_ordinary(text), "tiktoken gives other ids"
    assert ids == theirs.encode(text).ids, "tokenizers gives other ids"
    assert ours.decode(ids) == text
    lines = text.splitlines(keepends=True)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):  # interleaved: a busy minute hits all alike
        ours, theirs = BPETokenizer.gpt2(), hugging_face_gpt2()  # nothing cached
        took = {
            "ours, from cold": seconds(ours.encode, text),
            "tokenizers": seconds(theirs.encode, text),
            "ours, words known": seconds(ours.encode, text),
            "tiktoken": seconds(rust.encode_ordinary, text),
        }
        ours, theirs = BPETokenizer.gpt2(), hugging_face_gpt2()
        took["ours, from cold, by lines"] = seconds(encode_all, ours, lines)
        took["tokenizers, by lines"] = seconds(encode_all, theirs, lines)
        for label, duration in took.items():
            times.setdefault(label, []).append(duration)
    megabytes = len(text.encode("utf8")) / 1e6
    report(f"encoding {name}, {megabytes:.1f} MB, GPT-2", times, megabytes, "ours, from cold")


def train_theirs(chunks: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chunks, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def theirs_in_a_process(name: str, threads: dict[str, str]) -> dict[str, float]:
    """Seconds for training on one text, and on its lines."""
    environment = {k: v for k, v in os.environ.items() if k not in SINGLE} | threads
    command = [sys.executable, __file__, "--train-theirs", name]
    return json.loads(subprocess.check_output(command, env=environment))


def bench_training(name: str, text: str, rounds: int) -> None:
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        took = {"ours": seconds(BPETokenizer.train, text, VOCAB_SIZE)}
        for label, threads in ("one thread", SINGLE), ("its own threads", SEVERAL):
            for given, duration in theirs_in_a_process(name, threads).items():
                took[f"tokenizers, {label}, {given}"] = duration
        for label, duration in took.items():
            times.setdefault(label, []).append(duration)
    megabytes = len(text.encode("utf8")) / 1e6
    report(f"training on {name} to {VOCAB_SIZE:,} tokens", times, megabytes, "ours")


if __name__ == "__main__":
    texts = {"shakespeare": shakespeare, "docstrings": docstrings}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train-theirs", choices=texts, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_theirs:
        text = texts[options.train_theirs]()
        lines = text.splitlines(keepends=True)
        print(json.dumps({
            "one text": seconds(train_theirs, [text]), "by lines": seconds(train_theirs, lines)
        }))  # fmt: skip
    else:
        os.environ.update(SINGLE)  # `tokenizers` looks when it first works
        for name, read in texts.items():
            text = read()
            bench_encoding(name, text, options.rounds)
            bench_training(name, text, options.rounds)
