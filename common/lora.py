"""LoRA: fine-tuning by a small matrix product beside each large matrix, which itself stays.

    add_lora(model, rank=8)             # frozen, with adapters: the outputs are unchanged
    ...                                 # train as ever; parameter_groups leaves out what is frozen
    save_lora(model, "mine.safetensors")
    merge_lora(model)                   # plain Linear layers again: the same outputs, no extra cost

    load_lora(model, "mine.safetensors")  # beside the same pretrained weights

A fine-tuned weight is W + (alpha / rank) B A, with A (rank, in) and B (out, rank). LoRA: Low-Rank
Adaptation of Large Language Models, Hu et al. 2021, arXiv:2106.09685. B begins at zero, so training
begins at the pretrained model; A at random, or neither would ever get a gradient.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.gguf_file import refuse

ATTENTION = ("query", "key", "value", "output")
MLP = ("gate", "up", "down")
ALL_LINEAR = ATTENTION + MLP  # what a `Block` has: GPT-2's has no gate
LORA_KEY = "lora"  # what the settings are called in a file


class LoRALinear(nn.Linear):
    """A Linear layer whose weight is frozen, plus a trained product. (..., in) -> (..., out).

    `weight` and `bias` are those of `linear`, by the same names, so that a `state_dict` only gains
    `lora_A` (rank, in) and `lora_B` (out, rank). Two thin products are cheaper than B A in full,
    and their gradients much cheaper than that of the weight.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator=None):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, alpha / rank
        new = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        bound = linear.in_features**-0.5
        A = torch.empty(rank, linear.in_features, dtype=new["dtype"])
        A.uniform_(-bound, bound, generator=generator)  # on the CPU: the same on every device
        self.lora_A = nn.Parameter(A.to(new["device"]))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **new))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A)  # (..., in) @ (in, rank) -> (..., rank)
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.lora_B) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that computes the same. Its weight is this one's memory, changed."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        self.weight += self.scale * self.lora_B @ self.lora_A  # (out, rank) @ (rank, in)
        linear.weight, linear.bias = self.weight, self.bias
        return linear

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, rank={len(self.lora_A)}, scale={self.scale:g}"


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Iterable[str] = ALL_LINEAR,
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Freeze `model` and put adapters beside its Linear layers, in place; returns it.

    targets:   which: the ends of their names, such as "query", "mlp.up" or "blocks.29.mlp.up".
               `model` may be a part of a model, such as `gpt.blocks[15:]`; only it is frozen then
    alpha:     how much adapters count, over the rank: then a learning rate suits any rank
    generator: the chance that A begins with, on the CPU; default: PyTorch's own

    Raises ValueError for a rank below 1 and for targets that no Linear layer has. Of the default
    targets, those that the model lacks are passed over: GPT-2 has no "gate".
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is {rank!r}: it must be a whole number above 0")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}: it must be above 0")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if already := next((name for name, m in layers.items() if isinstance(m, LoRALinear)), None):
        raise ValueError(f"'{already}' has an adapter already: merge_lora(model) first")
    chosen = _choose(layers, targets)
    model.requires_grad_(False)
    for name in chosen:
        _replace(model, name, LoRALinear(layers[name], rank, alpha, generator))
    return model


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every adapter to the weight beside it, in place; returns the model, without adapters.

    Nothing is unfrozen. Raises ValueError for a model that has no adapters.
    """
    for name, layer in _adapters(model).items():
        _replace(model, name, layer.merged())
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before its adapters, which have no effect inside.

    So one copy is both what learns and what it is compared with. ValueError: there are none.
    """
    layers = list(_adapters(model).values())
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield model
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def has_lora(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(module, LoRALinear) for module in model.modules())


def lora_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all adapters by their names in `state_dict()`. ValueError: there are none."""
    pairs = {name: (layer.lora_A, layer.lora_B) for name, layer in _adapters(model).items()}
    return {
        f"{n}.lora_{x}": w for n, pair in pairs.items() for x, w in zip("AB", pair, strict=True)
    }


def lora_settings(model: nn.Module) -> dict:
    """What `add_lora` needs to make adapters of the same shapes, as JSON takes it."""
    layers = _adapters(model)
    first = next(iter(layers.values()))
    rank = len(first.lora_A)
    return {"rank": rank, "alpha": first.scale * rank, "targets": list(layers)}


# ---------------------------------------------------------------------------------------- on disk


def checksums(model: nn.Module) -> dict[str, int]:
    """A CRC-32 of every weight by its name, adapters left out. A second for 1 GB."""
    weights = {n: w for n, w in model.state_dict().items() if "lora_" not in n}
    numbers = lambda w: w.detach().float().cpu().contiguous().numpy()
    return {
        n: zlib.crc32(numbers(w), zlib.crc32(str(w.shape).encode())) for n, w in weights.items()
    }


def fingerprint(sums: Mapping[str, int]) -> str:
    """8 hexadecimal digits for `checksums`: they tell one set of weights from another."""
    return f"{zlib.crc32(json.dumps(sums, sort_keys=True).encode()):08x}"


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Write the adapters, and nothing else, to a safetensors file: all of it, or nothing.

    Raises ValueError for a model without adapters, OSError where the file can't be written.
    """
    about = {**lora_settings(model), "base": fingerprint(checksums(model))}
    write_tensors(path, lora_parameters(model), {LORA_KEY: json.dumps(about)})


def load_lora(model: nn.Module, path: str | Path) -> nn.Module:
    """Add the adapters that `save_lora` wrote to a model with the same pretrained weights.

    Raises FileNotFoundError; and WeightsFileError, in one line, for another model or other file.
    """
    metadata, tensors = read_tensors(path)
    if LORA_KEY not in metadata:
        refuse(path, "it holds no adapters", "choose a file that save_lora wrote")
    about = read_about(path, metadata[LORA_KEY], ("rank", "alpha", "targets", "base"))
    if about["base"] != fingerprint(checksums(model)):
        refuse(path, "its adapters belong to another model", "load the weights they were made for")
    try:
        add_lora(model, about["rank"], about["alpha"], about["targets"])
        fill(lora_parameters(model), tensors)
    except (ValueError, TypeError) as why:
        refuse(path, str(why))
    return model


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict) -> None:
    """A safetensors file, complete or not there. Raises OSError, in one line, where it can't be."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({n: w.detach().cpu().contiguous() for n, w in tensors.items()}, part, metadata)
        os.replace(part, path)
    except (SafetensorError, OSError) as why:
        raise OSError(f"{path} can't be written: {why}; choose another folder") from None
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file, on the CPU. Raises as `load_lora` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except SafetensorError as why:
        refuse(path, str(why), "choose a safetensors file")


def read_about(path: str | Path, text: str, needed: Iterable[str]) -> dict:
    """The JSON object in a file's metadata. Raises WeightsFileError unless it has `needed`."""
    try:
        about = json.loads(text)
        missing = [name for name in needed if name not in about]
    except (ValueError, TypeError):
        refuse(path, "what it says about itself can't be understood")
    if not isinstance(about, dict) or missing:
        refuse(path, f"it does not say its {', '.join(missing) or 'settings'}")
    return about


@torch.no_grad()
def fill(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy `saved` into `own`. Raises ValueError unless names and shapes are the same."""
    if different := sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"only one of file and model has '{different[0]}'")
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{tuple(saved[name].shape)}, the model needs {tuple(tensor.shape)}"
            raise ValueError(f"its tensor '{name}' is {shapes}")
        tensor.copy_(saved[name])


# ---------------------------------------------------------------------------------------- helpers


def _choose(layers: Mapping[str, nn.Linear], targets: Iterable[str]) -> list[str]:
    """The names of the layers that are meant, in the model's order."""
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    meant = {t: [n for n in layers if f".{n}".endswith(f".{t}")] for t in targets}
    unknown = [target for target, names in meant.items() if not names]
    chosen = {name for names in meant.values() for name in names}
    if not chosen or (unknown and targets != ALL_LINEAR):
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        wrong = ", ".join(map(str, unknown)) or "nothing"
        raise ValueError(f"no Linear layer is called {wrong}: choose among {known or 'none'}")
    return [name for name in layers if name in chosen]


def _adapters(model: nn.Module) -> dict[str, LoRALinear]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not found:
        raise ValueError("this model has no adapters: add_lora(model) makes them")
    return found


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    layer.train(model.training)
    setattr(model.get_submodule(parent), attribute, layer)
