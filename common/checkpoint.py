"""A training run on disk: stopped at any moment, it goes on as if nothing had happened.

    checkpoints = Checkpoints("run/checkpoints", keep=3, config={"model": "tiny", "seed": 0})
    train(model, batches, loss_fn, settings, checkpoints=checkpoints, resume=True)

One file per checkpoint, in the safetensors format, which holds numbers and no code: the weights,
what the optimizer remembers of each, every state of chance, the place in the data, the history. On
a CPU, with as many threads, the rest of the run is the same bit for bit; on a GPU, as far as its
kernels are.

A file is complete or not there: it is written under another name, flushed to the disk and renamed.
A checksum over everything in it finds what a disk or a copy has damaged since.
"""

import errno
import json
import os
import random
import re
import shutil
import sys
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common import distributed
from common.history import History
from common.schedule import TrainingSettings

FORMAT = "training run, version 1"
SLOWEST_DISK = timedelta(minutes=30)  # for one checkpoint
Contents = tuple[dict[str, Tensor], dict]  # what is numbers, and what is JSON


@dataclass
class Run:
    """Everything that a step of training reads or changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: object  # with state_dict and load_state_dict
    settings: TrainingSettings
    history: History = field(default_factory=History)


class Checkpoints:
    """A folder with the last `keep` checkpoints of one run, named by their steps.

    config: what must be the same when the run is resumed, as JSON takes it: model, data, seed
    """

    def __init__(self, folder: str | Path, keep: int = 3, config: dict | None = None):
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint must be kept")
        self.folder, self.keep = Path(folder), keep
        self.config = json.loads(json.dumps(config))  # as it will come back

    def paths(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step_*.safetensors"))

    @property
    def latest(self) -> Path | None:
        """The last checkpoint, or None."""
        return max(self.paths(), default=None)

    def begin(self, run: Run, resume: bool) -> None:
        """Put the last checkpoint into `run` if there is one and `resume` says so.

        Raises ValueError for data that can't be resumed and for a checkpoint of another
        configuration, model or corpus; FileExistsError for a new run in the folder of an old one.
        """
        if not hasattr(run.batches, "load_state_dict"):
            raise ValueError(
                "these batches can't be resumed: they have no state_dict and load_state_dict; use "
                "common.dataloader.RandomBatches, or train without checkpoints"
            )
        path = distributed.from_first(self._newest_sound if resume else lambda: self.latest)
        if path and not resume:
            raise FileExistsError(
                f"{self.folder} holds a run ({path.stem}): resume it, or choose another folder"
            )
        if path:
            self._restore(run, path)

    def save(self, run: Run) -> None:
        """Write what `run` is now, then remove what is older than the last `keep`.

        Raises OSError, in one line, where it can't be written; older checkpoints stay untouched.
        """
        tensors, state = _contents(run, self.config)
        distributed.from_first(lambda: self._add(tensors, state), patience=SLOWEST_DISK)

    def _add(self, tensors: dict[str, Tensor], state: dict) -> None:
        path = self.folder / f"step_{state['step']:08}.safetensors"
        try:
            _write(path, tensors, state)
        except OSError as error:
            why, last = os.strerror(error.errno).lower(), self.latest or "none"
            line = f"step {state['step']} was not saved ({why}); the last good checkpoint is {last}"
            raise OSError(error.errno, f"{line}; mend that and resume", str(path)) from None
        for old in self.paths()[: -self.keep]:
            old.unlink()

    def _newest_sound(self) -> Path | None:
        """The last checkpoint that can be read; later ones get another name, and a line is said."""
        for path in reversed(self.paths()):
            try:
                _read(path)
                return path
            except (SafetensorError, ValueError, KeyError) as why:
                os.replace(path, path.with_suffix(".damaged"))
                print(
                    f"{path} is damaged ({why}): set aside, trying the one before it",
                    file=sys.stderr,
                )
        return None

    def _restore(self, run: Run, path: Path) -> None:
        tensors, state = _read(path)
        if difference := _difference(state["config"], self.config):
            raise ValueError(f"{path} belongs to another run: {difference}; resume with the same")
        try:
            run.batches.load_state_dict(state["data"])
            _restore_weights(run, tensors)
        except (ValueError, KeyError) as why:
            raise ValueError(f"{path} belongs to another run: {why}") from None
        run.history = History.restored(tensors["history"].tolist(), state)
        _restore_chance(state["chance"])
        settings = json.loads(json.dumps(asdict(run.settings)))
        if distributed.rank() == 0 and (difference := _difference(state["settings"], settings)):
            print(f"{path} was made with other settings: {difference}", file=sys.stderr)


# ---------------------------------------------------------------------------------- what a run is


def _contents(run: Run, config) -> Contents:
    """The run as tensors and JSON, the same whatever number of ranks holds it."""
    tensors, seen = {}, set()
    for name, tensor in run.model.state_dict().items():
        whole = _for_disk(tensor)
        memory = whole.untyped_storage().data_ptr()
        tensors[f"weights.{name}"] = whole.clone() if memory in seen else whole  # tied weights
        seen.add(memory)
    for name, parameter in run.model.named_parameters():
        for key, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = _for_disk(value)
    tensors["history"] = torch.tensor(run.history.steps, dtype=torch.float64).reshape(-1, 5)
    state = {
        "step": len(run.history.steps),
        "config": config,
        "settings": asdict(run.settings),
        "data": run.batches.state_dict(),
        "chance": distributed.gathered(_chance()),
        **run.history.looks(),
    }
    return tensors, state


def _for_disk(tensor: Tensor) -> Tensor:
    return distributed.whole(tensor.detach()).cpu().contiguous()


def _restore_weights(run: Run, tensors: dict[str, Tensor]) -> None:
    own = run.model.state_dict()
    saved = {n.removeprefix("weights."): t for n, t in tensors.items() if n.startswith("weights.")}
    if own.keys() != saved.keys():
        raise ValueError(f"only one of the two has {sorted(own.keys() ^ saved.keys())[0]}")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            sizes = f"{tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
            raise ValueError(f"its {name} has the shape {sizes}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(distributed.share_of(saved[name], tensor))
    for name, parameter in run.model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if found:
            step = found.pop("step").to(parameter.device, copy=True)
            moments = {key: distributed.share_of(t, parameter) for key, t in found.items()}
            run.optimizer.state[parameter] = {"step": step, **moments}


def _chance() -> dict:
    """The state of every source of chance that layers, losses and batches draw from."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  old code still draws from it
    cuda = torch.cuda.is_initialized()
    return {
        "torch": bytes(torch.get_rng_state()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state()).hex() if cuda else None,
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
    }


def _restore_chance(states: list[dict]) -> None:
    """A rank that was not there when the states were taken keeps what it has."""
    if distributed.rank() >= len(states):
        return
    state = states[distributed.rank()]
    tensor = lambda text: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002


def _difference(theirs, ours, name: str = "") -> str:
    """The first place where two JSON values differ, in words; empty where they don't."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*theirs, *(key for key in ours if key not in theirs)]:
            if found := _difference(theirs.get(key), ours.get(key), f"{name}.{key}".lstrip(".")):
                return found
        return ""
    return "" if theirs == ours else f"its {name or 'config'} is {theirs!r}, not {ours!r}"


# ------------------------------------------------------------------------------------- files


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all names and bytes."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def _write(path: Path, tensors: dict[str, Tensor], state: dict) -> None:
    """All of it, on the disk, under its name; or an OSError, and nothing new."""
    encoded = bytearray(json.dumps(state).encode("utf8"))
    tensors = {**tensors, "state": torch.frombuffer(encoded, dtype=torch.uint8)}
    unfinished = path.parent / ".part"  # a folder: safetensors has temporary files of its own
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        part = unfinished / path.name
        save_file(tensors, part, {"format": FORMAT, "crc32": _checksum(tensors)})
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except SafetensorError as why:  # around the operating system's error, with its number
        found = re.search(r"os error (\d+)", str(why))
        raise OSError(int(found[1]) if found else errno.EIO, str(why)) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    with suppress(OSError):  # Windows can't, and needn't: the new name itself reaches the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> Contents:
    """What `_write` wrote. Raises SafetensorError or ValueError for a file that is damaged."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("format") != FORMAT:
        raise ValueError(f'it does not say "{FORMAT}"')
    if metadata.get("crc32") != _checksum(tensors):
        raise ValueError("its checksum is wrong")
    return tensors, json.loads(bytes(tensors.pop("state").numpy()))
