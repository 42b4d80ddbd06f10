"""The device, chosen once and in one place.

from common.device import pick_device
device = pick_device()
"""

import os

import torch


def pick_device(prefer: str | None = None) -> torch.device:
    """`prefer`, else $COURSE_DEVICE, else the first of cuda, mps and cpu that this machine has.

    A device is named as in PyTorch: "cpu", "mps", "cuda", "cuda:1".
    Raises ValueError, in one line, for an unknown name and for a device that is not here.
    """
    wanted = prefer or os.environ.get("COURSE_DEVICE")
    if not wanted:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if count(kind)))
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ValueError(f"no device is called '{wanted}': use cuda, cuda:1, mps or cpu") from None
    if (device.index or 0) >= count(device.type):
        here = ", ".join(kind for kind in ("cuda", "mps", "cpu") if count(kind))
        raise ValueError(
            f"device '{wanted}' is not available here: use one of {here}, "
            "or leave COURSE_DEVICE empty to have it chosen (`uv run course doctor` says more)"
        )
    return device


def count(kind: str) -> int:
    """How many devices of a kind ("cuda", "mps" or "cpu") this machine and this PyTorch have."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return int(kind == "cpu")
