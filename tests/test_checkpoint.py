"""A run that is killed ends as if it had not been; a bad checkpoint does no harm."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import Batches, loss_fn, make
from torch import nn

from common import checkpoint
from common.checkpoint import Checkpoints
from common.evaluation import evaluate_loss
from common.history import History
from common.training import TrainingSettings, train

STEPS = 60
SETTINGS = TrainingSettings(
    STEPS, learning_rate=1e-2, schedule="constant", warmup_steps=2, accumulation_steps=2,
    checkpoint_every=4, evaluate_every=20, sample_every=30,
)  # fmt: skip


def chancy_loss(model, inputs, targets):
    """Draws from every source of chance there is, dropout included."""
    noise = random.random() + np.random.random() + torch.rand(())  # noqa: NPY002
    return loss_fn(model, inputs + 0.01 * noise, targets)


def complete_run(folder: Path, steps: int = STEPS, resume: bool = True, **others) -> tuple:
    """Train in `folder`, from its last checkpoint if there is one: model and history."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    model = make(dropout=0.3)
    history = train(
        model,
        Batches(),
        chancy_loss,
        replace(SETTINGS, n_steps=steps, **others),
        evaluate=lambda model: evaluate_loss(model, [next(Batches())], loss_fn),
        sample=lambda model: str(torch.rand(())),
        checkpoints=Checkpoints(folder, config={"model": "tiny"}),
        resume=resume,
        progress=False,
    )
    return model, history


def write_run(folder: Path, announce: bool = False) -> None:
    """What a process does: complete the run, write the weights."""
    if announce:
        Path(folder, "started").touch()
    model, history = complete_run(folder / "checkpoints")
    save_file(model.state_dict(), folder / "final.safetensors")
    history.save(folder / "history.json")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    return complete_run(tmp_path_factory.mktemp("whole"))


def assert_same(folder: Path, uninterrupted, looked_at_too: bool = True) -> None:
    model, history = uninterrupted
    weights = load_file(folder / "final.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), f"{name} is not the same, bit for bit"
    resumed = History.load(folder / "history.json")
    assert [step[:4] for step in resumed.steps] == [step[:4] for step in history.steps]
    assert resumed.looks() == history.looks() or not looked_at_too


# --- Killed

needs_kill = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")


@needs_kill
def test_killed_at_random_moments(uninterrupted, tmp_path):
    moments, kills = random.Random(0), 0
    for attempt in range(25):
        (tmp_path / "started").unlink(missing_ok=True)
        process = processes.start(write_run, tmp_path, True)
        if attempt < 12:
            while process.is_alive() and not (tmp_path / "started").exists():
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.05))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        status = processes.join([process])[0]
        kills += status == -signal.SIGKILL
        if status == 0:
            break
    assert kills >= 3
    assert_same(tmp_path, uninterrupted)


def kill_myself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_file(tensors, path, metadata):
    whole = path.with_suffix(".whole")
    checkpoint.saved(tensors, whole, metadata)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    kill_myself()


MOMENTS = {
    "before the write": ("save_file", kill_myself),
    "in the middle of it": ("save_file", half_a_file),
    "before it is on the disk": ("os.fsync", kill_myself),
    "before it has its name": ("os.replace", kill_myself),
    "before old ones are removed": ("Path.unlink", kill_myself),
}


def write_run_and_die(folder: Path, target: str, by, when: int) -> None:
    """Die at the `when`th call of a function of the room."""
    owner, _, name = target.rpartition(".")
    owner = getattr(checkpoint, owner) if owner else checkpoint
    checkpoint.saved = original = getattr(owner, name)
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return (by if len(calls) == when else original)(*args, **kwargs)

    setattr(owner, name, counted)
    write_run(folder)


@needs_kill
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_writing_a_checkpoint(moment, uninterrupted, tmp_path):
    for when in (1, 3):
        status = processes.join(
            [processes.start(write_run_and_die, tmp_path, *MOMENTS[moment], when)]
        )
        assert status == [-signal.SIGKILL]
        assert all(checkpoint._read(path) for path in Checkpoints(tmp_path / "checkpoints").paths())
    write_run(tmp_path)
    assert_same(tmp_path, uninterrupted)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {f"step_{step:08}.safetensors" for step in (52, 56, 60)}


# --- Resumed


def test_a_finished_run_is_not_run_again(uninterrupted, tmp_path):
    complete_run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    model, history = complete_run(tmp_path)
    assert len(history.steps) == STEPS
    assert torch.equal(model[0].weight, uninterrupted[0][0].weight)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_run_may_go_on_for_longer_and_a_line_says_so(tmp_path, capsys):
    complete_run(tmp_path, 8)
    _, history = complete_run(tmp_path, 12)
    assert len(history.steps) == 12
    assert "other settings: its n_steps is 8, not 12" in capsys.readouterr().err


def test_the_last_ones_are_kept(tmp_path):
    complete_run(tmp_path, 24)
    assert [int(path.stem[5:]) for path in Checkpoints(tmp_path).paths()] == [16, 20, 24]
    assert Checkpoints(tmp_path).latest.stem == "step_00000024"
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_it_holds_numbers_and_no_code(tmp_path):
    complete_run(tmp_path, 4)
    tensors = load_file(Checkpoints(tmp_path).latest)
    assert {name.split(".")[0] for name in tensors} == {"weights", "optimizer", "history", "state"}
    assert "optimizer.0.weight.exp_avg_sq" in tensors


def test_weights_that_are_tied_stay_tied(tmp_path):
    ends = []
    for steps in (8, 4, 8):  # at once into "whole"; then in two parts
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        folder = tmp_path / ("parts" if ends else "whole")
        settings = replace(SETTINGS, n_steps=steps)
        arguments = (model, Batches(), loss_fn, settings)
        train(*arguments, checkpoints=Checkpoints(folder), resume=True, progress=False)
        ends.append(model[1].weight)
    assert torch.equal(ends[0], ends[2])


# --- Refused, or skipped


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "something else"])
def test_a_damaged_one_is_skipped_for_the_one_before_it(damage, uninterrupted, tmp_path, capsys):
    complete_run(tmp_path / "checkpoints", 24)
    path = Checkpoints(tmp_path / "checkpoints").latest
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(
        {"truncated": content[:-1], "one bit": content, "empty": b"", "something else": b"x" * 999}[
            damage
        ]
    )
    write_run(tmp_path)
    said = capsys.readouterr().err
    assert said.count("\n") == 2, "that one is damaged, and that the settings differ"
    assert f"{path} is damaged" in said
    assert path.with_suffix(".damaged").exists()
    assert_same(tmp_path, uninterrupted)


def test_a_new_run_does_not_begin_in_the_folder_of_an_old_one(tmp_path):
    complete_run(tmp_path, 4)
    with pytest.raises(FileExistsError, match=r"holds a run .*4.: resume it, or"):
        complete_run(tmp_path, 4, resume=False)


def test_another_config_is_refused_by_name(tmp_path):
    complete_run(tmp_path, 4)
    other = Checkpoints(tmp_path, config={"model": "small"})
    with pytest.raises(ValueError, match="its model is 'tiny', not 'small'"):
        train(make(), Batches(), loss_fn, SETTINGS, checkpoints=other, resume=True, progress=False)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(6, 4)), "only one of the two has 1.bias"),
        (nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), *make()[2:4], nn.Linear(9, 4)), "shape"),
    ],
)
def test_another_model_is_refused(model, says, tmp_path):
    complete_run(tmp_path, 4)
    same = Checkpoints(tmp_path, config={"model": "tiny"})
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="belongs to another run") as refusal:
        train(model, Batches(), loss_fn, SETTINGS, checkpoints=same, resume=True, progress=False)
    assert says in str(refusal.value)
    assert all(map(torch.equal, before, model.parameters()))


def test_batches_that_cannot_be_resumed_are_refused(tmp_path):
    batches = [next(Batches())]
    with pytest.raises(ValueError, match="these batches can't be resumed"):
        train(make(), batches, loss_fn, SETTINGS, checkpoints=Checkpoints(tmp_path), progress=False)


# --- No room


def run_until_full(folder: Path, limit: int | None) -> None:
    """Exit 3 if the run stops with one line that names the last good checkpoint."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        complete_run(folder)
    except OSError as error:
        good = str(Checkpoints(folder).latest) in str(error) and "\n" not in str(error)
        os._exit(3 if good and "mend that and resume" in str(error) else 4)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_file_that_may_not_grow_stops_the_run_and_spares_the_last_one(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    complete_run(folder, 8)
    size = Checkpoints(folder).latest.stat().st_size
    assert processes.join([processes.start(run_until_full, folder, size)]) == [3]
    assert sorted(folder.iterdir()) == Checkpoints(folder).paths(), "nothing unfinished is left"
    write_run(tmp_path)
    assert_same(tmp_path, uninterrupted, looked_at_too=False)  # the first run's end was another


def test_a_full_disk_stops_the_run_and_spares_the_last_one(uninterrupted, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be made by root on Linux alone")
    try:
        assert processes.join([processes.start(run_until_full, folder, None)]) == [3]
        assert Checkpoints(folder).paths()
        subprocess.run(["mount", "-o", "remount,size=10m", str(folder)], check=True)
        write_run(tmp_path)
        assert_same(tmp_path, uninterrupted)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_json_differences_are_named():
    cases = product([{"a": {"b": 1}}, {"a": {"b": 2}}, {"a": {}}, None], repeat=2)
    found = [checkpoint._difference(theirs, ours) for theirs, ours in cases]
    assert [bool(text) for text in found] == [i % 5 != 0 for i in range(16)]
    assert found[1] == "its a.b is 1, not 2"
