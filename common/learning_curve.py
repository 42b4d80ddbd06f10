"""Many runs of `common.classification`, a line each in a table: accuracy against labelled messages.

    python -m common.learning_curve --out results.csv          # what chapter 6 shows; see --list
    python -m common.learning_curve --out mine.csv --methods head tfidf --labelled 16 64 --seeds 2

Stopped at any moment, it goes on: what the table holds is not run again. All runs of one seed are
judged by the same messages, and a smaller set to learn from is part of a larger, so what frozen
blocks make of a message is computed once per seed. The largest set comes first, and its `seconds`
are those of a run on its own; the smaller ones profit from it.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.assets import AssetUnavailable
from common.classification import BASELINES, load_base, tfidf_scores
from common.classifier import Classifier, trained_parameters
from common.classifier_training import RECIPES, fine_tune, score
from common.corpus import read_text
from common.messages import SPAM_LABELS, Message, Split, distinct, divide, read_messages
from common.metrics import Scores
from common.tokenizer_file import write_atomically

SIZES = (16, 32, 64, 128, 256, 512)
N_TEST = 300


class Run(NamedTuple):
    """One row's first columns: what was run. Two rows never share all of them."""

    method: str  # of `RECIPES` or `BASELINES`
    weights: str  # "pretrained" or "random"; "none" for a baseline
    pool: str  # of `POOLS`; "none" for a baseline
    seed: int
    labelled: int


class Result(NamedTuple):
    """The other columns: what came out, on `n` messages, half of them spam."""

    n: int
    missed: int  # spam that was called ham
    false_alarms: int  # ham that was called spam
    roc_auc: float
    calibration_error: float
    trained_parameters: int
    seconds: float

    @classmethod
    def of(cls, scores: Scores, trained: int, seconds: float) -> "Result":
        """Of the scores of a classifier for ham and spam."""
        (_, alarms), (missed, _) = scores.confusion
        auc, error = round(scores.roc_auc, 5), round(scores.calibration_error, 5)
        return cls(scores.n, missed, alarms, auc, error, trained, round(seconds, 1))


@dataclass(frozen=True)
class Curve:
    """One method on several numbers of labelled messages, `n_seeds` times each."""

    method: str
    weights: str = "none"
    pool: str = "none"
    sizes: tuple[int, ...] = SIZES
    n_seeds: int = 8


PLAN = (  # the cheap ones first; those that take minutes each, with few seeds
    *(Curve(method) for method in BASELINES),
    *(Curve("head", weights, "mean", n_seeds=5) for weights in ("pretrained", "random")),
    Curve("head", "pretrained", "last", (512,), 2),
    *(Curve("last-block", weights, "mean", (512,), 1) for weights in ("pretrained", "random")),
    Curve("all", "pretrained", "mean", (512,), 1),
    Curve("lora", "pretrained", "mean", (512,), 2),
    Curve("lora", "pretrained", "last", (512,), 3),
    *(Curve("lora", "pretrained", pool, (64,), 1) for pool in ("mean", "last")),
)


def planned(plan: Iterable[Curve] = PLAN) -> list[Run]:
    """All runs of a plan, the largest set of each seed first."""
    return [
        Run(curve.method, curve.weights, curve.pool, seed, size)
        for curve in plan
        for seed in range(curve.n_seeds)
        for size in sorted(curve.sizes, reverse=True)
    ]


def results(runs: Iterable[Run], messages: Sequence[Message]) -> Iterator[tuple[Run, Result]]:
    """Do the runs, one after the other, on `distinct` messages.

    Neighbours that differ in `labelled` alone share their frozen states. Raises ValueError for an
    unknown method or pool, and for more messages than there are.
    """
    for (method, weights, pool, seed), group in groupby(runs, key=lambda run: run[:-1]):
        sizes = [run.labelled for run in group]
        measure = baseline(method) if method in BASELINES else model(method, weights, pool, seed)
        for size in sizes:
            split = divide(messages, size, seed, N_TEST)
            yield Run(method, weights, pool, seed, size), measure(split)


def baseline(method: str) -> Callable[[Split], Result]:
    """What measures TF-IDF on a split."""

    def measure(split: Split) -> Result:
        begun = perf_counter()
        scores = tfidf_scores(split, SPAM_LABELS, method)
        return Result.of(scores, 0, perf_counter() - begun)

    return measure


def model(method: str, weights: str, pool: str, seed: int) -> Callable[[Split], Result]:
    """What measures a model on splits that differ in what is learned from alone."""
    if method not in RECIPES:
        raise ValueError(f"no method is called {method!r}: {', '.join([*RECIPES, *BASELINES])}")
    gpt, tokenizer = load_base("smollm2-135m", weights == "random", seed)
    memory: dict[str, torch.Tensor] = {}

    def measure(split: Split) -> Result:
        begun = perf_counter()
        torch.manual_seed(seed)
        classifier = Classifier(copy.deepcopy(gpt), tokenizer, SPAM_LABELS, pool=pool)
        recipe = RECIPES[method]
        fine_tune(classifier, split.train, recipe, seed=seed, memory=memory, progress=False)
        scores = score(classifier, split.test, memory)
        trained = sum(p.numel() for p in trained_parameters(classifier).values())
        return Result.of(scores, trained, perf_counter() - begun)

    return measure


# -------------------------------------------------------------------------------------- the table


def read_results(path: str | Path) -> dict[Run, Result]:
    """The table of a file. Raises ValueError, in one line, for a file that is none."""
    header, *lines = read_text(path).splitlines()
    if header.split(",") != [*Run._fields, *Result._fields]:
        raise ValueError(f"{path} is no table of results: choose another file, or remove it")
    table, n = {}, len(Run._fields)
    for number, line in enumerate(lines, 2):
        try:
            a, b = line.split(",")[:n], line.split(",")[n:]
            run = Run._make(kind(x) for kind, x in zip(kinds(Run), a, strict=True))
            table[run] = Result._make(kind(x) for kind, x in zip(kinds(Result), b, strict=True))
        except ValueError:
            raise ValueError(f"{path}, line {number}: not a result; remove the line") from None
    return table


def kinds(row: type) -> list[type]:
    """The types of a NamedTuple's fields."""
    return list(row.__annotations__.values())


def write_results(path: str | Path, table: dict[Run, Result]) -> None:
    """A table to a CSV file, complete or as it was."""
    lines = [[*Run._fields, *Result._fields], *([*run, *result] for run, result in table.items())]
    write_atomically(Path(path), "".join(",".join(map(str, line)) + "\n" for line in lines))


def to_frame(table: dict[Run, Result]):
    """A pandas table, a row per run, with the accuracy."""
    import pandas as pd  # here, because it takes half a second

    frame = pd.DataFrame([[*run, *result] for run, result in table.items()])
    frame.columns = [*Run._fields, *Result._fields]
    return frame.assign(accuracy=1 - (frame.missed + frame.false_alarms) / frame.n)


def curves(frame):
    """Mean accuracy over seeds, its lowest and highest, and half its 95% interval (Student's t).

    From `to_frame`; one row per method, weights, pool and number of labelled messages. The interval
    is of the mean over all splits and seeds; nan for one seed. Test sets of different seeds overlap
    (there is not so much spam), so it is a little too narrow.
    """
    from scipy.stats import t

    by = ["method", "weights", "pool", "labelled"]
    table = frame.groupby(by).accuracy.agg(["mean", "min", "max", "sem", "count"])
    half = table["sem"] * t.ppf(0.975, (table["count"] - 1).where(table["count"] > 1))
    return table.assign(half=half).drop(columns="sem")


# ------------------------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: fine; 1: it did not work, and a line says why; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m common.learning_curve", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the table, which grows; CSV")
    add("--methods", nargs="+", metavar="M", choices=[*RECIPES, *BASELINES], help="only these")
    add("--labelled", nargs="+", type=int, metavar="N", help="only these numbers of messages")
    add("--seeds", type=int, metavar="N", help="only the first N")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--list", action="store_true", help="what is left to do; nothing is run")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(max(arguments.threads, 1))
    try:
        return run(arguments)
    except (ValueError, OSError, AssetUnavailable) as error:
        print(f"learning_curve: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Do what is left of the plan, and save after every run."""
    path = Path(arguments.out)
    table = read_results(path) if path.exists() else {}
    wanted = [run for run in planned() if chosen(run, arguments)]
    left = [run for run in wanted if run not in table]
    if arguments.list:
        print(*(" ".join(map(str, run)) for run in left), sep="\n")
        return 0
    if left:
        write_results(path, table)  # says at once where it can't be written
        messages = distinct(read_messages())
        for done, result in tqdm(results(left, messages), total=len(left)):
            table[done] = result
            write_results(path, table)
    found = {run: table[run] for run in wanted}
    if not found:
        raise ValueError("nothing is planned for that: see --list")
    print(curves(to_frame(found)).round(3).to_string())
    return 0


def chosen(run: Run, arguments: argparse.Namespace) -> bool:
    """Is the run among those that the command line asks for?"""
    methods, sizes, n_seeds = arguments.methods, arguments.labelled, arguments.seeds
    return (
        (not methods or run.method in methods)
        and (not sizes or run.labelled in sizes)
        and (n_seeds is None or run.seed < n_seeds)
    )


if __name__ == "__main__":
    sys.exit(main())
