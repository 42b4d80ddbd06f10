"""Two processes take the steps that one takes with twice the accumulation; and change places."""

import os
import signal
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dataloader import CharTokenizer
from torch.testing import assert_close

from common import distributed
from common.checkpoint import Checkpoints
from common.corpus import Document
from common.dataloader import RandomBatches
from common.evaluation import evaluate_loss
from common.generation import generate
from common.gpt import GPT, GPTConfig
from common.history import History
from common.objectives import next_token_loss
from common.pretraining_data import windows_in_order
from common.shards import TokenShards, write_shards
from common.training import TrainingSettings, train

# Without biases: a key's has no gradient but rounding errors, which AdamW makes large.
CONFIG = GPTConfig(1001, context_length=8, d_model=16, n_layers=2, n_heads=2, bias=False)
STEPS = 6
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """500 random characters."""
    folder = tmp_path_factory.mktemp("corpus")
    ids = torch.randint(1000, (500,), generator=torch.Generator().manual_seed(0))
    write_shards([Document("a", "".join(map(chr, ids.tolist())))], CharTokenizer(), folder)
    return folder


def run(corpus: Path, folder: Path, steps: int, accumulation: int, sharded: bool = False) -> None:
    """Train on however many processes there are, from the last checkpoint if there is one."""
    device = distributed.start(torch.device("cpu"), timeout_s=20)
    torch.manual_seed(0)
    model = GPT(CONFIG)
    if sharded:
        distributed.shard(model, model.blocks, device, methods=["hidden"])
    shards = TokenShards(corpus)
    rank, size = distributed.rank(), distributed.world_size()
    history = train(
        model,
        RandomBatches(shards, batch_size=3, context_length=8, rank=rank, world_size=size),
        next_token_loss,
        TrainingSettings(
            steps, 1e-2, "constant", clip_norm=0.5, accumulation_steps=accumulation,
            evaluate_every=3, sample_every=3, checkpoint_every=3,
        ),
        evaluate=lambda m: evaluate_loss(m, windows_in_order(shards, 4, 8), next_token_loss, 2.0),
        sample=lambda m: str(generate(m, [[1, 2]], 10).tolist()),
        checkpoints=Checkpoints(folder, keep=9),
        resume=True,
        progress=False,
    )  # fmt: skip
    weights = {name: distributed.whole(tensor) for name, tensor in model.state_dict().items()}
    if rank == 0:
        history.save(folder / "history.json")
        save_file(weights, folder / "final.safetensors")
    distributed.stop()


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> Path:
    """What one process makes of it, with an accumulation of 2 × 2."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    run(corpus, folder, STEPS, accumulation=4)
    return folder


def assert_close_runs(folder: Path, alone: Path) -> None:
    ours, theirs = (load_file(path / "final.safetensors") for path in (folder, alone))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = (History.load(path / "history.json") for path in (folder, alone))
    for a, b in zip(ours.steps, theirs.steps, strict=True):
        assert_close(a[:4], b[:4], rtol=1e-4, atol=1e-5)
    assert ours.evaluations.keys() == theirs.evaluations.keys() == {0, 3, 6}
    for step, found in ours.evaluations.items():
        assert_close(found.loss, theirs.evaluations[step].loss, rtol=1e-4, atol=1e-5)
    assert ours.samples.keys() == theirs.samples.keys()


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_equal_one_and_change_places(sharded, corpus, alone, tmp_path):
    together = processes.ranks(2, run, corpus, tmp_path, STEPS, 2, sharded)
    assert processes.join(together) == [0, 0]
    assert_close_runs(tmp_path, alone)
    # The checkpoint of two, taken up by one.
    Checkpoints(tmp_path).latest.unlink()
    run(corpus, tmp_path, STEPS, accumulation=4)
    assert_close_runs(tmp_path, alone)
    # And the other way round.
    half = tmp_path / "half"
    run(corpus, half, STEPS // 2, accumulation=4)
    together = processes.ranks(2, run, corpus, half, STEPS, 2, sharded)
    assert processes.join(together) == [0, 0]
    assert_close_runs(half, alone)


def lose(folder: Path, how: int, timeout_s: float) -> None:
    """Rank 1 gets a signal in the middle; rank 0 writes down what it noticed, and when."""
    distributed.start(torch.device("cpu"), timeout_s)
    try:
        for step in range(5):
            distributed.total(torch.ones(3))
            if step == 2 and distributed.rank() == 1:
                os.kill(os.getpid(), how)
                time.sleep(60)
    except RuntimeError as error:
        known = distributed.is_loss_of_a_process(error)
        (folder / "noticed").write_text(f"{known}")
    os._exit(1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no such signals")
@pytest.mark.parametrize(("how", "timeout_s"), [("SIGKILL", 600), ("SIGSTOP", 2)])
def test_a_process_that_is_gone_or_silent_is_noticed(how, timeout_s, tmp_path):
    first, second = processes.ranks(2, lose, tmp_path, getattr(signal, how), timeout_s)
    assert processes.join([first], seconds=60) == [1]
    second.kill()
    assert (tmp_path / "noticed").read_text() == "True"


def wait_in_vain(folder: Path) -> None:
    """Rank 0 of two, of which the other never comes."""
    try:
        distributed.start(torch.device("cpu"), timeout_s=1)
    except RuntimeError as error:
        (folder / "noticed").write_text(f"{distributed.is_loss_of_a_process(error)}")


def test_a_process_that_never_comes_is_noticed(tmp_path):
    assert processes.join(processes.ranks(2, wait_in_vain, tmp_path, missing=1)) == [0]
    assert (tmp_path / "noticed").read_text() == "True"


def fail(rank: int) -> None:
    raise ValueError(f"raised by {rank}")


def speak(folder: Path) -> None:
    """Every way of talking to each other."""
    distributed.start(torch.device("cpu"), 20)
    rank = distributed.rank()
    assert distributed.world_size() == 2
    assert distributed.mean(torch.tensor([rank * 4.0])).tolist() == [2.0]
    assert distributed.total(torch.tensor([rank + 1.0])).tolist() == [3.0]
    assert distributed.gathered({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.from_first(lambda: f"said by {rank}") == "said by 0"
    with pytest.raises(ValueError, match="raised by 0"):
        distributed.from_first(lambda: fail(rank))
    distributed.stop()


def sample_first(folder: Path) -> None:
    """Sampling happens in inference mode, whose memory is of no use in training."""
    device = distributed.start(torch.device("cpu"), 20)
    torch.manual_seed(0)
    plain, sharded = GPT(CONFIG), GPT(CONFIG)
    sharded.load_state_dict(plain.state_dict())
    distributed.shard(sharded, sharded.blocks, device, methods=["hidden"])
    assert torch.equal(generate(sharded, [[1, 2]], 12), generate(plain, [[1, 2]], 12))
    ids = torch.arange(9)[None]
    for model in (plain, sharded):
        next_token_loss(model, ids[:, :-1], ids[:, 1:]).backward()
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert_close(a.grad, distributed.whole(b.grad))
    distributed.stop()


def test_a_sharded_model_may_be_sampled_first(tmp_path):
    assert processes.join(processes.ranks(2, sample_first, tmp_path)) == [0, 0]


def test_what_they_say_arrives(tmp_path):
    assert processes.join(processes.ranks(2, speak, tmp_path)) == [0, 0]


def test_alone_nothing_happens():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    tensor, module = torch.arange(3.0), torch.nn.Linear(2, 2)
    assert distributed.mean(tensor).tolist() == distributed.total(tensor).tolist() == [0, 1, 2]
    assert distributed.gathered(5) == [5]
    assert distributed.from_first(lambda: 7) == 7
    assert distributed.replicate(module) is module
    assert distributed.whole(tensor) is tensor
    device = torch.device("cpu")
    assert distributed.start(device) is device
    with pytest.raises(ValueError, match="start them with torchrun"):
        distributed.shard(module, [], device)


def test_other_errors_are_not_mistaken_for_the_loss_of_a_process():
    assert not distributed.is_loss_of_a_process(RuntimeError("mat1 and mat2 don't fit"))
    assert not distributed.is_loss_of_a_process(ValueError("gloo"))
