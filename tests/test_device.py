"""One place chooses the device; what is not here is refused in one line."""

import pytest
import torch

from common import device as room
from common.device import pick_device


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with so many GPUs of a kind."""

    def pretend(cuda=0, mps=0):
        counts = {"cuda": cuda, "mps": mps, "cpu": 1}
        monkeypatch.setattr(room, "count", lambda kind: counts.get(kind, 0))

    monkeypatch.delenv("COURSE_DEVICE", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("has", "chosen"),
    [({}, "cpu"), ({"mps": 1}, "mps"), ({"cuda": 2}, "cuda"), ({"cuda": 1, "mps": 1}, "cuda")],
)
def test_the_best_device_is_chosen(machine, has, chosen):
    machine(**has)
    assert pick_device() == torch.device(chosen)


def test_the_argument_beats_the_environment_beats_the_choice(machine, monkeypatch):
    machine(cuda=2, mps=1)
    monkeypatch.setenv("COURSE_DEVICE", "mps")
    assert pick_device() == torch.device("mps")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("COURSE_DEVICE", "")
    assert pick_device() == torch.device("cuda")


@pytest.mark.parametrize("name", ["mps", "cuda:1", "meta", "xpu"])
def test_what_is_not_here_is_refused(machine, name):
    machine(cuda=1)
    with pytest.raises(ValueError, match=rf"'{name}' is not available here: use one of cuda, cpu"):
        pick_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "0"])
def test_what_is_no_device_is_refused(machine, monkeypatch, name):
    machine()
    monkeypatch.setenv("COURSE_DEVICE", name)
    with pytest.raises(ValueError, match="no device is called") as caught:
        pick_device()
    assert "\n" not in str(caught.value)


def test_what_it_counts_can_be_used():
    assert room.count("cpu") == 1
    for kind in ("cuda", "mps", "cpu"):
        for index in range(room.count(kind)):
            assert torch.ones(2, device=torch.device(kind, index)).sum() == 2
