"""The command: what it writes, how it goes on after `kill -9`, and one line for what is wrong."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from common.checkpoint import Checkpoints
from common.gpt import PRESETS
from common.history import History
from common.model_card import CardFacts, model_card
from common.objectives import next_token_loss, objective_loss
from common.pretrain import choose_loss, main
from common.pretraining_data import open_data
from common.weights import load_pretrained, open_pretrained

STORY = (Path(__file__).parents[1] / "common" / "data" / "story.txt").read_text(encoding="utf8")
SMALL = shlex.split(
    "--vocab-size 300 --context-length 16 --batch-size 2 --steps 8 --checkpoint-every 2 "
    "--evaluate-every 4 --threads 1 --device cpu"
)


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text(STORY[:4000], encoding="utf8")
    return str(path)


def command(story: str, out: Path, *others: str) -> list[str]:
    return ["--text", story, "--out", str(out), *SMALL, *others]


@pytest.fixture(scope="module")
def finished(story, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(story, out)) == 0
    return out


# --- What it writes


def test_the_final_weights_are_a_model_and_the_figures_are_its_own(finished):
    model, _ = load_pretrained(finished / "final.safetensors")
    data, about = open_data(finished), json.loads((finished / "run.json").read_text())
    assert model.config.vocab_size == data.tokenizer.vocab_size == 300
    stream = torch.cat(
        [torch.from_numpy(array.astype("int64")) for array in data.validation.arrays]
    )
    nats, T = 0.0, model.config.context_length
    with torch.no_grad():
        for start in range(0, len(stream) - 1, T):
            ids = stream[start : start + T + 1]
            nats += F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum").item()
    assert about["final"]["loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    bits = about["final"]["loss"] / torch.log(torch.tensor(2.0)).item()
    assert about["final"]["bits_per_byte"] == pytest.approx(bits / data.bytes_per_token, rel=1e-5)
    assert about["windows_per_step"] == 2
    assert "--text" in about["command"]


def test_the_history_is_all_there(finished):
    history = History.load(finished / "history.json")
    assert len(history.steps) == 8
    assert list(history.evaluations) == list(history.samples) == [0, 4, 8]
    assert history.evaluations[8].loss < history.evaluations[0].loss


def test_its_model_card_says_what_was_measured(finished):
    weights = finished / "final.safetensors"
    card = model_card(weights, open_pretrained(weights), "you/mine", CardFacts())
    history = History.load(finished / "history.json")
    assert f"- Steps: {len(history.steps)}\n" in card
    best = history.evaluations[len(history.steps)].bits_per_byte
    assert f"to {best:.3f}" in card


def test_one_line_per_evaluation_and_no_bar_where_nobody_looks(story, tmp_path, capsys):
    assert main(command(story, tmp_path / "run")) == 0
    shown = capsys.readouterr()
    assert shown.out.count("bits per byte") == 4, "three and the final one"
    assert shown.err == ""


def test_data_may_be_prepared_first(story, finished, tmp_path):
    out = tmp_path / "run"
    assert main(command(story, out, "--prepare-only")) == 0
    assert {path.name for path in out.iterdir()} == {"data.json", "shards", "tokenizer.json"}
    assert open_data(out).identity == open_data(finished).identity


def test_the_loss_is_chosen_by_what_it_would_hold():
    assert choose_loss(PRESETS["tiny"], 8)[0] is objective_loss
    assert choose_loss(PRESETS["gpt2-124m"], 8)[0] is next_token_loss


# --- Killed

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGKILL")


def run_main(arguments: list[str], stderr: Path) -> None:
    """A process that is the command."""
    with stderr.open("w") as file, redirect_stderr(file):
        status = main(arguments)
        file.flush()
    os._exit(status)


def wait_for(found, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


@needs_signals
@pytest.mark.parametrize("step", [2, 4])
def test_killed_and_resumed_it_writes_the_same_weights(step, story, finished, tmp_path):
    out = tmp_path / "run"
    process = processes.start(run_main, command(story, out, "--resume"), tmp_path / "stderr")
    wait_for(lambda: len(Checkpoints(out / "checkpoints").paths()) >= step // 2)
    os.kill(process.pid, signal.SIGKILL)
    assert processes.join([process]) == [-signal.SIGKILL]
    assert main(command(story, out, "--resume")) == 0
    assert (out / "final.safetensors").read_bytes() == (finished / "final.safetensors").read_bytes()


# --- Two processes


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "common.pretrain"]
    return subprocess.run(
        [sys.executable, *launcher, *arguments], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_torchrun_equals_one_process_with_accumulation(story, tmp_path):
    ran = torchrun(*command(story, tmp_path / "two"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("final, on all") == 1, "rank 0 alone prints"
    assert main(command(story, tmp_path / "one", "--accumulation", "2")) == 0
    two, one = (load_file(tmp_path / name / "final.safetensors") for name in ("two", "one"))
    for name in one:
        if "key.bias" not in name:  # it has no gradient but rounding errors
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
    # What two have begun, one can finish.
    (tmp_path / "two" / "final.safetensors").unlink()
    Checkpoints(tmp_path / "two" / "checkpoints").latest.unlink()
    assert main(command(story, tmp_path / "two", "--accumulation", "2", "--resume")) == 0
    resumed = load_file(tmp_path / "two" / "final.safetensors")
    torch.testing.assert_close(resumed["final_norm.weight"], two["final_norm.weight"])


def test_a_sharded_model_ends_as_a_whole_one(story, tmp_path):
    arguments = command(story, tmp_path / "two", "--fsdp")
    pair = processes.ranks(2, run_main_as_rank, arguments, tmp_path)
    assert processes.join(pair) == [0, 0]
    assert main(command(story, tmp_path / "one", "--accumulation", "2")) == 0
    (two, _), (one, _) = (load_pretrained(tmp_path / name) for name in ("two", "one"))
    torch.testing.assert_close(two.head.weight, one.head.weight, rtol=1e-3, atol=2e-5)
    final = [json.loads((tmp_path / n / "run.json").read_text())["final"] for n in ("two", "one")]
    assert final[0] == pytest.approx(final[1], rel=1e-4)


@needs_signals
def test_a_rank_that_is_killed_stops_the_other_with_one_line(story, tmp_path):
    out = tmp_path / "run"
    arguments = command(story, out, "--steps", "100000", "--checkpoint-every", "2")
    pair = processes.ranks(2, run_main_as_rank, arguments, tmp_path)
    wait_for(lambda: Checkpoints(out / "checkpoints").paths())
    os.kill(pair[1].pid, signal.SIGKILL)
    assert processes.join(pair) == [1, -signal.SIGKILL]
    said = (tmp_path / "stderr0").read_text().strip()
    last = Checkpoints(out / "checkpoints").latest
    assert said.splitlines()[-1].startswith("pretrain: rank 0: another process is gone")
    assert said.endswith(f"--resume goes on from {last.stem}")


def run_main_as_rank(arguments: list[str], folder: Path, limit: int | None = None) -> None:
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_main(arguments, folder / f"stderr{os.environ['RANK']}")


def test_a_rank_that_never_comes_stops_the_other_with_one_line(story, finished, tmp_path):
    shutil.copytree(finished, out := tmp_path / "run")
    before = [path.read_bytes() for path in Checkpoints(out / "checkpoints").paths()]
    arguments = command(story, out, "--resume", "--timeout", "1")
    only = processes.ranks(2, run_main_as_rank, arguments, tmp_path, missing=1)
    assert processes.join(only) == [1]
    said = (tmp_path / "stderr0").read_text()
    assert said.startswith("pretrain: another process is gone, or hasn't answered for 1 s")
    assert said.endswith("; --resume goes on from step_00000008\n")
    assert said.count("\n") == 1
    assert [path.read_bytes() for path in Checkpoints(out / "checkpoints").paths()] == before


@needs_signals
def test_a_full_disk_stops_both_and_rank_0_says_why(story, tmp_path):
    arguments = command(story, tmp_path / "run")
    pair = processes.ranks(2, run_main_as_rank, arguments, tmp_path, 1_000_000)
    assert processes.join(pair) == [1, 1]
    said = (tmp_path / "stderr0").read_text()
    assert "step 2 was not saved (file too large); the last good checkpoint is none" in said
    assert said.count("\n") == 1
    assert (tmp_path / "stderr1").read_text() == ""


@needs_signals
def test_asked_to_stop_it_says_how_to_go_on(story, tmp_path):
    out = tmp_path / "run"
    arguments = command(story, out, "--steps", "100000")
    process = processes.start(run_main, arguments, tmp_path / "stderr")
    wait_for(lambda: Checkpoints(out / "checkpoints").paths())
    process.terminate()
    assert processes.join([process]) == [1]
    said = (tmp_path / "stderr").read_text()
    assert said.startswith("pretrain: stopped by SIGTERM")
    assert "--resume goes on from step_" in said


# --- What is wrong


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A finished run that may be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def complaint(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("pretrain: ")
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], "holds a run (step_00000008): resume it, or choose another folder"),
        (["--resume", "--config", "small"], "its model.d_model is 128, not 256"),
        (["--resume", "--context-length", "8"], "its model.context_length is 16, not 8"),
        (["--resume", "--seed", "1"], "its seed is 0, not 1"),
        (["--resume", "--batch-size", "4"], "its windows_per_step is 2, not 4"),
        (["--resume", "--vocab-size", "301"], "the data of another vocabulary size"),
        (["--resume", "--text", __file__], "holds the data of another text"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--steps", "0"], "n_steps is 0"),
        (["--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--resume", "--context-length", "100000"], "needs at least 100,001"),
        (["--resume", "--fsdp"], "start them with torchrun"),
        (["--tokenizer", __file__], "damaged, or no tokenizer"),
        (["--device", "abacus"], "no device is called 'abacus'"),
        (["--keep", "0"], "keep is 0"),
        (["--threads", "-1"], "--threads is -1, it must be above 0"),
        (["--timeout", "0"], "--timeout is 0.0, it must be above 0"),
        (["--context-length", "0"], "context_length is 0"),
    ],
)
def test_nonsense_stops_with_one_line(others, says, story, copy, capsys):
    before = (copy / "final.safetensors").stat().st_mtime_ns
    assert says in complaint(command(story, copy, *others), capsys)
    assert (copy / "final.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_an_empty_or_foreign_text_stops_with_one_line(content, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert "text.txt" in complaint(command(str(path), tmp_path / "run"), capsys)


def test_spoiled_data_stops_with_one_line(story, copy, capsys):
    shard = copy / "shards" / "train" / "shard_00000.bin"
    content = shard.read_bytes()
    for spoiled in (b"", content[:-2]):
        shard.write_bytes(spoiled)
        assert "truncated or changed" in complaint(command(story, copy, "--resume"), capsys)
    shard.write_bytes(content)
    tokenizer = open_data(copy).tokenizer
    type(tokenizer)(tokenizer.merges[:-1], tokenizer.special_tokens.keys()).save(
        copy / "tokenizer.json"
    )
    assert "was written with another tokenizer" in complaint(
        command(story, copy, "--resume"), capsys
    )


def test_a_loss_that_explodes_stops_with_one_line(story, tmp_path, capsys):
    said = complaint(
        command(story, tmp_path / "run", "--learning-rate", "1e20", "--steps", "30"), capsys
    )
    assert "windows_seen" in said
    assert not (tmp_path / "run" / "final.safetensors").exists()
