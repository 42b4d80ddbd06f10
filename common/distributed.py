"""One training run on several processes: copies that share their gradients, or one sharded model.

    torchrun --nproc-per-node=2 -m common.pretrain --text shakespeare --out run

torchrun starts the processes and tells each its rank; `start` makes them find each other. From then
on `common.training.train` does what it does on one process, on all of them at once: every rank
takes other windows of the text, and the gradients are averaged before each step (Li et al. 2020,
arXiv:2006.15704). `shard` is for models that one device can't hold: each rank keeps a part of every
weight, its gradient and what AdamW remembers of it (Rajbhandari et al. 2020, arXiv:1910.02054).

Without other processes, everything here does nothing, so that nobody has to ask.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=24)  # while rank 0 prepares what all need


def start(device: torch.device, timeout_s: float = 300.0) -> torch.device:
    """Meet the other processes, if torchrun has started any; returns this one's device.

    timeout_s: how long to wait for a process that has stopped answering, in seconds
    """
    if "WORLD_SIZE" not in os.environ:
        return device
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return device


def stop() -> None:
    """Leave the other processes. Not after an error: there, it might wait for them."""
    if _running():
        dist.destroy_process_group()


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0. Rank 0 alone writes and prints."""
    return dist.get_rank() if _running() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _running() else 1


# ------------------------------------------------------------------------------- words between them


def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all ranks."""
    return total(tensor) / world_size()


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks."""
    if not _running():
        return tensor
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # where it can be sent from
    summed = tensor.to(device, copy=True)
    dist.all_reduce(summed)
    return summed.to(tensor.device)


def from_first(make: Callable[[], object], patience: timedelta = PATIENCE):
    """What `make()` returns or raises on rank 0, on all ranks; they wait for it with `patience`."""
    if not _running():
        return make()
    patient = dist.new_group(backend="gloo", timeout=patience)
    box = [None, None]  # what is returned, what is raised
    if rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            error.by_first = True
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=patient, device=torch.device("cpu"))
    dist.destroy_process_group(patient)
    if box[1] is not None:
        raise box[1]
    return box[0]


def is_everyones(error: BaseException) -> bool:
    """Whether an error is what rank 0 raised in `from_first`, and so the same on all ranks."""
    return getattr(error, "by_first", False)


def gathered(thing) -> list:
    """What every rank has to say, in order of their ranks; on all ranks."""
    things = [thing] * world_size()
    if _running():
        dist.all_gather_object(things, thing)
    return things


def is_loss_of_a_process(error: BaseException) -> bool:
    """Whether an error says that another process has gone, or hasn't answered in time."""
    known = isinstance(error, getattr(dist, "DistError", ()))
    return known or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


# --------------------------------------------------------------------------- copies of one model


def replicate(objective: nn.Module) -> nn.Module:
    """A module whose gradients are averaged over all ranks while they are computed.

    objective: called with a batch, it returns the loss; its parameters must be equal on all ranks
    """
    sharded = any(hasattr(parameter, "placements") for parameter in objective.parameters())
    if world_size() == 1 or sharded:
        return objective
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(objective, gradient_as_bucket_view=True)


def gradients_shared(objective: nn.Module, now: bool) -> AbstractContextManager:
    """A context for one batch: whether its backward pass ends with sharing the gradients.

    All but the last of several batches that make one step can keep theirs to themselves.
    """
    if world_size() == 1:
        return nullcontext()
    for module in objective.modules():
        if hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(now)
            return nullcontext()
    return nullcontext() if now or not hasattr(objective, "no_sync") else objective.no_sync()


# ------------------------------------------------------------------------------ one model, in parts


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    device: torch.device,
    methods: Iterable[str] = (),
) -> nn.Module:
    """Spread a model over the devices of all ranks, in place: PyTorch's `fully_shard` (FSDP2).

    blocks:  parts that are gathered whole one after the other, when it is their turn
    device:  where this rank keeps its share; the model itself may be too large for it
    methods: names of methods, other than `forward`, by which the model is called from outside

    Raises ValueError without other processes.
    """
    if not _running():
        raise ValueError("a model is sharded over processes: start them with torchrun")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world_size(),))
    blocks = list(blocks)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in methods:
        register_fsdp_forward_method(model, name)
    for part in (model, *blocks):
        # Gathered once now: memory that is made in inference mode can't be trained with later.
        part.unshard()
        part.reshard()
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part. Every rank must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, on the device and laid out over ranks as `like` is."""
    tensor = tensor.to(like.device, copy=True)
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)
