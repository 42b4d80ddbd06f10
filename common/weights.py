"""Pretrained weights from GGUF, from safetensors of GPT-2 and Llama, from our own checkpoints.

    model, tokenizer = load_pretrained("smollm2-135m")  # carried by a package: no network
    model, tokenizer = load_pretrained("path/to/a/folder/or/file")
    opened = open_pretrained("smollm2-135m")  # the same, checked, and not read yet
    save_checkpoint(model, "mine.safetensors")

Strict: every tensor of the file is used, every parameter of the model filled, every shape as it
should be, or the file is refused in one line. Sparing: the model is made without memory (PyTorch's
"meta" device) and handed one tensor at a time, so that nothing is initialised only to be
overwritten, and the weights never exist twice.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from common.assets import ASSETS, fetch
from common.configurations import ABSURD
from common.gguf_file import WeightsFileError, refuse
from common.gpt import GPT, PRESETS, GPTConfig
from common.sources import Source, open_source
from common.token_formats import NO_ROLES, Roles
from common.tokenizer import BPETokenizer
from common.weight_files import CONFIG_KEY

HISTORY = "history.csv"  # what `common.pretrain` leaves beside its weights
NAMES = [name for name in ASSETS if name in PRESETS or name == "course-small"]


def load_pretrained(
    source: str | Path, *, config: GPTConfig | None = None
) -> tuple[GPT, BPETokenizer | None]:
    """A model with trained weights, float32, on the CPU, in evaluation mode; and its tokenizer.

    source: "course-small" (our own, 5.8M parameters, Shakespeare), "smollm2-135m", "gpt2-124m",
            "gpt2-355m", "gpt2-774m" or "gpt2-1558m"; else a file, GGUF or safetensors; else a
            folder as Hugging Face's `save_pretrained` or `export` writes it
    config: for files that do not say it themselves

    The tokenizer is None where the source has none, or none of the kind `BPETokenizer`.
    Raises AssetUnavailable for a name that is not on this machine, FileNotFoundError for a path
    that isn't, and WeightsFileError for a file that can't be used: each in one line.
    """
    opened = open_pretrained(source, config=config)
    with _unfilled():
        model = GPT(opened.config)
    # The largest first: what is read of the file comes on top of the weights already there.
    names = sorted(opened.shapes, key=lambda name: -prod(opened.shapes[name]))
    model.load_state_dict({name: opened.read(name) for name in names}, assign=True)
    return model.eval(), opened.tokenizer


@dataclass(frozen=True)
class Pretrained:
    """Trained weights by the names of our `GPT`, read one at a time; and what belongs to them."""

    config: GPTConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]  # contiguous, on the CPU
    tokenizer: BPETokenizer | None = None
    roles: Roles = NO_ROLES
    history: str | None = None  # of the training: a table, where it was kept beside the weights

    @classmethod
    def of(
        cls, model: GPT, tokenizer: BPETokenizer | None = None, roles: Roles | None = None
    ) -> "Pretrained":
        """A model in memory, seen in the same way. Without `roles`, those of GPT-2's habit."""
        weights = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        read = lambda name: weights[name].detach().cpu().contiguous()
        return cls(model.config, shapes, read, tokenizer, roles or Roles.usual(tokenizer))


def open_pretrained(source: str | Path, *, config: GPTConfig | None = None) -> Pretrained:
    """What `load_pretrained` would load, checked in the same way, before the weights are read.

    So a model can be looked at, or written in another format, in the memory of its largest tensor.
    """
    path = Path(source)
    if str(source) in NAMES:
        path, config = fetch(str(source)), PRESETS.get(str(source))
    elif not path.exists():
        names = ", ".join(NAMES)
        raise FileNotFoundError(f"{path}: no such file or folder, and none of the names {names}")
    with _named(path):
        opened = open_source(path, config)
        shapes, stored = _check(opened)
    read_stored = lru_cache(maxsize=1)(opened.read)  # query, key and value may lie in one tensor

    def read(name: str) -> Tensor:
        with _named(path):
            tensor = read_stored(stored[name])
            return opened.layout.convert(name, tensor, opened.config.head_dim, opened.is_view)

    beside = (path if path.is_dir() else path.parent) / HISTORY
    history = beside.read_text(encoding="utf8", errors="replace") if beside.is_file() else None
    return Pretrained(opened.config, shapes, read, opened.tokenizer, opened.roles, history)


def save_checkpoint(model: GPT, path: Path | str) -> None:
    """Write a model's weights and configuration to one safetensors file, all of it or nothing.

    `load_pretrained(path)` reads it back. Raises OSError if the file can't be written; what was
    there before is then untouched.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(weights, part, {CONFIG_KEY: json.dumps(asdict(model.config))})
        os.replace(part, path)
    except SafetensorError as why:
        raise OSError(f"{path} can't be written: {why}") from None
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------- checks


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file is said in one line that begins with its path."""
    try:
        yield
    except WeightsFileError:
        raise
    except (ValueError, SafetensorError) as why:
        refuse(path, str(why))


def _check(source: Source) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of the model's parameters, and what the file calls them. All must fit."""
    config, layout, shapes = source.config, source.layout, source.shapes
    sizes = (config.vocab_size, config.context_length, config.d_model, config.d_ff)
    if config.n_layers > len(shapes) or max(sizes) >= ABSURD:  # building it would take long
        raise ValueError("its configuration is absurd, or belongs to another file")
    with _unfilled():
        blank = {name: tuple(x.shape) for name, x in GPT(config).state_dict().items()}
    stored = {name: layout.stored_name(name) for name in blank}
    _check_names(stored, shapes, optional=layout.stored_name("head.weight"))
    for name, shape in blank.items():
        expected, found = layout.stored_shape(name, shape), shapes[stored[name]]
        if found != expected:
            raise ValueError(f"its tensor '{stored[name]}' is {found}, the model needs {expected}")
    if config.tie_embeddings:
        _check_tied_head(source)
    return blank, stored


def _check_names(stored: dict[str, str | None], shapes: dict, optional: str) -> None:
    """Every parameter is in the file, and nothing else is, but for the head that may be tied."""
    missing = [theirs or ours for ours, theirs in stored.items() if theirs not in shapes]
    unused = sorted(set(shapes) - set(stored.values()) - {optional})
    for what, names in (("lacks", missing), ("has what this model has not:", unused)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"it {what} {', '.join(names[:3])}{more}")


def _check_tied_head(source: Source) -> None:
    """Some files hold the token embedding a second time, as the head that it is tied to."""
    embedding, head = (
        source.layout.stored_name(f"{x}.weight") for x in ("token_embedding", "head")
    )
    if head in source.shapes and not torch.equal(source.read(head), source.read(embedding)):
        raise ValueError("its head is said to be tied to the token embedding, but differs from it")


@contextmanager
def _unfilled() -> Iterator[None]:
    """A model made in here has names and shapes, and no memory."""
    with torch.device("meta"), _SkipFilling():
        yield


class _SkipFilling(TorchFunctionMode):
    """Skips filling tensors at random. On "meta" there is nothing to fill, and yet PyTorch would
    import 900 of its modules to draw the first random number there, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)
