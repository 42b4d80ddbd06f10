"""The options of `python -m common.pretrain`, and the training settings that they make."""

import argparse

import torch

from common.gpt import PRESETS
from common.pretraining_data import CORPORA
from common.schedule import TrainingSettings


def build_parser() -> argparse.ArgumentParser:
    """All options and their defaults."""
    parser = argparse.ArgumentParser(
        prog="python -m common.pretrain",
        description="Pretrain a GPT on text.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    corpora = " or ".join(CORPORA)
    add("--text", nargs="+", required=True, metavar="FILE", help=f"files, folders, or {corpora}")
    add("--validation", nargs="+", default=[], metavar="FILE", help="instead of a part of --text")
    add("--out", required=True, metavar="DIR", help="everything the run makes goes there")
    add("--config", default="tiny", choices=list(PRESETS), help="which model")
    add("--context-length", type=int, metavar="T", help="instead of the model's own")
    add("--tokenizer", metavar="FILE", help='tokenizer.json, or "gpt2"; else one is trained')
    add("--vocab-size", type=int, default=4096, metavar="V", help="of a tokenizer to be trained")
    add("--workers", type=int, default=0, metavar="N", help="processes that tokenize")
    add("--prepare-only", action="store_true", help="tokenize, and train another time")
    add("--steps", type=int, default=1000, metavar="N", help="updates of the weights")
    add("--batch-size", type=int, default=8, metavar="B", help="windows, per process and pass")
    add("--accumulation", type=int, default=1, metavar="N", help="passes per step")
    add("--learning-rate", type=float, default=1e-3, metavar="X", help="at its highest")
    add("--schedule", default="cosine", choices=["cosine", "wsd", "constant"])
    add("--warmup", type=int, metavar="N", help="steps; default: a twentieth of all")
    add("--decay", type=int, metavar="N", help="steps, of wsd; default: a fifth of all")
    add("--weight-decay", type=float, default=0.1, metavar="X")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of matrix products")
    add("--seed", type=int, default=0, metavar="S", help="of the weights and of the data's order")
    add("--checkpoint-every", type=int, metavar="K", help="steps; default: a tenth of all")
    add("--keep", type=int, default=3, metavar="N", help="checkpoints")
    add("--evaluate-every", type=int, metavar="K", help="steps; default: a tenth of all")
    add("--evaluate-tokens", type=int, default=100_000, metavar="N", help="at most, but at the end")
    add("--prompt", default="", help="what the samples begin with")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--device", help="cuda, mps or cpu; default: the best that there is")
    add("--threads", type=int, metavar="N", help="CPU threads per process")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds for a silent process")
    add("--fsdp", action="store_true", help="shard the model over the processes")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Numbers that nobody further down would understand. Sets the number of threads."""
    for name in ("threads", "timeout", "evaluate_tokens", "evaluate_every", "checkpoint_every"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, it must be above 0")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def settings_of(arguments: argparse.Namespace) -> TrainingSettings:
    """The settings that the command line asks for; raises ValueError for impossible ones."""
    tenth = max(arguments.steps // 10, 1)
    every = arguments.evaluate_every or tenth
    return TrainingSettings(
        n_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        schedule=arguments.schedule,
        warmup_steps=arguments.steps // 20 if arguments.warmup is None else arguments.warmup,
        decay_steps=arguments.decay,
        weight_decay=arguments.weight_decay,
        accumulation_steps=arguments.accumulation,
        dtype=arguments.dtype,
        evaluate_every=every,
        sample_every=every,
        checkpoint_every=arguments.checkpoint_every or tenth,
    )
