"""Pretrain a GPT on text, from the command line, on one process or many.

    python -m common.pretrain --text shakespeare --out run --config tiny --steps 2000
    python -m common.pretrain --text shakespeare --out run --config tiny --steps 2000 --resume
    torchrun --nproc-per-node=8 -m common.pretrain --text FILE... --out run --config gpt2-124m ...

What is in the folder afterwards:

    final.safetensors, tokenizer.json   the model; `load_pretrained("run")` reads both
    history.json                        every step, evaluation and sample: `History.load`
    history.csv                         the same as a table, for spreadsheets and the model card
    run.json                            the command, the configuration, the data, the final figures
    checkpoints/, shards/, data.json    what --resume needs; yours to delete afterwards
"""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common import distributed
from common.assets import AssetUnavailable
from common.checkpoint import Checkpoints
from common.dataloader import RandomBatches
from common.device import pick_device
from common.evaluation import Evaluation, evaluate_loss
from common.generation import generate
from common.gpt import GPT, PRESETS, GPTConfig, count_parameters
from common.history import History
from common.losses import loss_bytes
from common.objectives import next_token_loss, objective_loss
from common.pretrain_options import build_parser, check, settings_of
from common.pretraining_data import (
    PretrainingData,
    Texts,
    open_data,
    prepare,
    windows_in_order,
)
from common.tokenizer import END_OF_TEXT, BPETokenizer
from common.tokenizer_file import write_atomically
from common.training import TrainingDiverged, TrainingSettings, train
from common.weights import HISTORY, save_checkpoint

LARGE = 512 << 20  # bytes for head and loss from which on they are taken in chunks


def main(argv: list[str] | None = None) -> int:
    """Run the command line. 0: fine; 1: it did not work, and a line says why; 2: wrong usage."""
    arguments = build_parser().parse_args(argv)
    command = ["python", "-m", "common.pretrain", *(sys.argv[1:] if argv is None else argv)]
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        pretrain(arguments, shlex.join(command))
        return 0
    except (ValueError, TrainingDiverged, AssetUnavailable) as error:
        _complain(str(error), distributed.rank() == 0)  # it is the same on all ranks
    except OSError as error:
        line = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        _complain(line, distributed.rank() == 0 or not distributed.is_everyones(error))
    except KeyboardInterrupt as error:
        _complain(f"stopped{error}{_how_to_go_on(arguments)}", distributed.rank() == 0)
    except RuntimeError as error:
        if not distributed.is_loss_of_a_process(error):
            raise
        line = f"another process is gone, or hasn't answered for {arguments.timeout:g} s"
        _complain(line + _how_to_go_on(arguments))
    finally:
        signal.signal(signal.SIGTERM, before)
    if distributed.world_size() > 1:
        os._exit(1)  # at once: a clean exit might wait for processes that are gone
    return 1


def _complain(line: str, aloud: bool = True) -> None:
    who = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
    if aloud:
        print(f"pretrain: {who}{line}", file=sys.stderr, flush=True)


def _how_to_go_on(arguments: argparse.Namespace) -> str:
    last = Checkpoints(Path(arguments.out, "checkpoints")).latest
    return f"; --resume goes on from {last.stem}" if last else ""


def _stop(signal_number, frame):
    raise KeyboardInterrupt(" by SIGTERM, which torchrun sends when a process has failed")


# --------------------------------------------------------------------------------------- the run


def pretrain(arguments: argparse.Namespace, command: str) -> None:
    """Prepare, train, evaluate, write. Raises what `main` turns into a line."""
    check(arguments)
    texts, settings = Texts(arguments.text, arguments.validation), settings_of(arguments)
    device = distributed.start(pick_device(arguments.device), arguments.timeout)
    data = open_data(distributed.from_first(lambda: _prepare(arguments, texts)))
    if not arguments.prepare_only:
        train_on(data, device, arguments, settings, command)
    distributed.stop()


def train_on(
    data: PretrainingData,
    device: torch.device,
    arguments: argparse.Namespace,
    settings: TrainingSettings,
    command: str,
) -> None:
    """All of a run that comes after its data."""
    rank, size, seed = distributed.rank(), distributed.world_size(), arguments.seed
    config, batch_size = config_of(arguments, data), arguments.batch_size
    loss_fn, about_loss = choose_loss(config, batch_size)
    _say(f"model: {arguments.config}, {sum(count_parameters(config).values()):,} parameters")
    _say(f"data: {len(data.train):,} tokens to train on, {len(data.validation):,} held out")
    _say(f"loss: {about_loss}")
    model = build_model(config, seed, device, arguments.fsdp)
    context = {"batch_size": batch_size, "context_length": config.context_length}
    evaluate = evaluator(data, loss_fn, **context)
    identity = {
        "model": asdict(config),
        "data": data.identity,
        "seed": seed,
        "windows_per_step": batch_size * arguments.accumulation * size,
    }
    history = train(
        model,
        RandomBatches(data.train, **context, seed=seed, rank=rank, world_size=size),
        loss_fn,
        settings,
        evaluate=lambda model: evaluate(model, arguments.evaluate_tokens),
        sample=sampler_of(data.tokenizer, arguments.prompt, seed),
        checkpoints=Checkpoints(Path(arguments.out, "checkpoints"), arguments.keep, identity),
        resume=arguments.resume,
        progress=sys.stderr.isatty(),
        report=_say,
    )
    final = evaluate(model)
    _say(f"final, on all of the validation text: {final}")
    about = {"command": command, **identity, "settings": asdict(settings), "final": asdict(final)}
    whole = whole_model(model, config, arguments.fsdp)
    if rank == 0:
        write_results(Path(arguments.out), whole, history, about)


def write_results(folder: Path, model: nn.Module, history: History, about: dict) -> None:
    """The weights last: where they are, the rest is, too."""
    history.save(folder / "history.json")
    write_atomically(folder / HISTORY, history.to_frame().to_csv(float_format="%.6g"))
    write_atomically(folder / "run.json", json.dumps(about, indent=1) + "\n")
    save_checkpoint(model, folder / "final.safetensors")


def _say(line: str) -> None:
    if distributed.rank() == 0:
        print(line, flush=True)


def _prepare(arguments: argparse.Namespace, texts: Texts) -> Path:
    tokenizer = arguments.tokenizer
    if tokenizer:
        is_gpt2 = tokenizer == "gpt2"
        tokenizer = BPETokenizer.gpt2() if is_gpt2 else BPETokenizer.load(tokenizer)
    return prepare(
        arguments.out,
        texts,
        tokenizer=tokenizer,
        vocab_size=arguments.vocab_size,
        workers=arguments.workers,
    )


def config_of(arguments: argparse.Namespace, data: PretrainingData) -> GPTConfig:
    """The preset, with the tokenizer's vocabulary and the context that was asked for."""
    preset = PRESETS[arguments.config]
    context_length = arguments.context_length
    return replace(
        preset,
        vocab_size=data.tokenizer.vocab_size,
        context_length=preset.context_length if context_length is None else context_length,
    )


def build_model(config: GPTConfig, seed: int, device: torch.device, sharded: bool) -> nn.Module:
    """The same random weights on all ranks; then each draws its own chance."""
    torch.manual_seed(seed)
    model = GPT(config)
    torch.manual_seed(seed + distributed.rank())
    if sharded:  # part by part: the whole need not fit on the device
        return distributed.shard(model, model.blocks, device, methods=["hidden"])
    return model.to(device)


def whole_model(model: nn.Module, config: GPTConfig, sharded: bool) -> nn.Module:
    """The model with all its weights, on rank 0; every rank must ask."""
    if not sharded:
        return model
    weights = {n: distributed.whole(tensor).cpu() for n, tensor in model.state_dict().items()}
    gathered = GPT(config)
    gathered.load_state_dict(weights)
    return gathered


# ------------------------------------------------------------------------- losses and looking at it


def choose_loss(config: GPTConfig, batch_size: int) -> tuple[Callable[..., Tensor], str]:
    """The loss function for a model and a batch, and why: what would be large goes in chunks."""
    plain = loss_bytes(config, batch_size, config.context_length)
    if plain < LARGE:
        return objective_loss, f"cross-entropy of all logits at once, which takes {plain >> 20} MB"
    return next_token_loss, f"cross-entropy in chunks; at once, it would take {plain >> 20} MB"


def evaluator(data: PretrainingData, loss_fn, batch_size: int, context_length: int):
    """evaluate(model, max_tokens=None) -> Evaluation, on the validation text; ranks share it."""

    def evaluate(model: nn.Module, max_tokens: int | None = None) -> Evaluation:
        batches = windows_in_order(data.validation, batch_size, context_length, max_tokens)
        return evaluate_loss(
            model, batches, loss_fn, data.bytes_per_token, data.characters_per_token
        )

    return evaluate


def sampler_of(tokenizer: BPETokenizer, prompt: str, seed: int) -> Callable[[nn.Module], str]:
    """sample(model) -> text: 60 tokens after the end of another text and `prompt`."""
    ids = [[tokenizer.special_tokens[END_OF_TEXT], *tokenizer.encode(prompt)]]

    def sample(model: nn.Module) -> str:
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        written = generate(model, ids, 60, temperature=0.8, top_p=0.95, generator=generator)
        return tokenizer.decode(written[0, 1:].tolist())

    return sample


if __name__ == "__main__":
    sys.exit(main())
