"""`course doctor`: the checks of the machine, and the report."""

import errno
import json
import subprocess
import sys
from collections import namedtuple
from pathlib import PurePath
from types import SimpleNamespace

import psutil
import pytest

from common import assets, doctor
from common.assets import ASSETS
from common.checks import Finding
from common.doctor import CHECKS, examine, report

Usage = namedtuple("Usage", "total used free")
GOOD = Finding("python", "ok", "3.13.0")
ODD = Finding("compiler", "warn", "none", "install one")
BAD = Finding("torch", "fail", "not installed", "`uv sync`")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -------------------------------------------------------------------------------------- the report


def test_every_check_is_registered_once():
    functions = [
        value
        for room in (doctor, doctor.checks)
        for name, value in vars(room).items()
        if name.startswith("check_")
    ]
    assert set(functions) == set(CHECKS)
    assert len(CHECKS) == len(set(CHECKS))


@pytest.mark.parametrize(
    ("findings", "status", "overall"),
    [([GOOD], 0, "ok"), ([GOOD, ODD], 0, "warn"), ([ODD, BAD, GOOD], 1, "fail")],
)
def test_status_and_json(capsys, findings, status, overall):
    assert report(findings) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(findings) + 1  # one line a finding, and the verdict
    assert ("can't run" in lines[-1]) == (status == 1)
    assert report(findings, as_json=True) == status
    answer = json.loads(capsys.readouterr().out)
    assert answer["overall"] == overall
    assert [set(found) for found in answer["findings"]] == [
        {"name", "status", "detail", "remedy"}
    ] * len(findings)


def test_the_remedy_stands_beside_the_problem(capsys):
    report([GOOD, BAD])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "ok    python  3.13.0"
    assert out[1] == "fail  torch   not installed -> `uv sync`"


def test_a_check_that_breaks_is_a_finding():
    def check_moon():
        raise ZeroDivisionError("no moon")

    def check_sun():
        return Finding("sun", "ok", "shines")

    moon, sun = examine([check_moon, check_sun])
    assert (moon.name, moon.status) == ("moon", "warn")
    assert "no moon" in moon.detail
    assert sun.status == "ok"


def test_the_whole_examination():
    """In a process of its own, as learners run it; and without PyTorch in that process."""
    code = (
        "import sys; from common.doctor import examine, report; report(examine(), as_json=True); "
        "sys.exit('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    findings = {found["name"]: found for found in json.loads(ran.stdout)["findings"]}
    assert len(findings) == len(CHECKS)
    for name in ("python", "packages", "common", "kernel", "assets", "torch"):
        assert findings[name]["status"] == "ok", findings[name]
    for found in findings.values():
        assert "could not be checked" not in found["detail"]
        assert bool(found["remedy"]) == (found["status"] != "ok")
        assert "\n" not in found["detail"] + found["remedy"]


# ------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("free", "status", "says"),
    [(8e9, "ok", ""), (3e9, "warn", "chapter 7"), (1e9, "warn", "SmolLM2 (1 GB) may not fit")],
)
def test_memory(monkeypatch, free, status, says):
    memory = SimpleNamespace(total=16e9, available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(doctor, "container_limit", lambda: None)
    finding = doctor.check_memory()
    assert finding.status == status
    assert says in finding.remedy
    assert "of 16 GB" in finding.detail


def test_memory_of_a_container(monkeypatch):
    memory = SimpleNamespace(total=64e9, available=60e9)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(doctor, "container_limit", lambda: 1_000_000_000)
    finding = doctor.check_memory()
    assert finding.status == "warn"
    assert finding.detail == "1.0 GB free of 1.0 GB"


def test_disk(monkeypatch, own_cache):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(0, 0, 5e9))
    assert doctor.check_disk().status == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Usage(0, 0, 2e8))
    finding = doctor.check_disk()
    assert finding.status == "warn"
    assert "200 MB free" in finding.detail
    assert "COURSE_CACHE" in finding.remedy


def test_cache_folder(monkeypatch, own_cache):
    assert doctor.check_cache() == Finding("cache", "ok", str(own_cache))
    own_cache.rmdir()
    own_cache.write_text("in the way", encoding="utf8")
    finding = doctor.check_cache()
    assert finding.status == "warn"
    assert "can't be written" in finding.detail
    assert "set COURSE_CACHE" in finding.remedy


def test_write_protected_cache_folder(monkeypatch):
    def refuse(dir):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "Permission denied" in doctor.check_cache().detail


@pytest.mark.parametrize(
    ("windows", "path", "says"),
    [
        (True, "C:\\llm", ""),
        (True, "C:\\Users\\ann\\" + "very" * 20, "260 characters"),
        (True, "C:\\Users\\Zoë\\llm", "can't read"),
        (True, "C:\\Users\\ann\\OneDrive - School\\llm", "synchronised"),
        (False, "/home/zoë/" + "very" * 20, ""),
        (False, "/Users/ann/Library/Mobile Documents/llm", "synchronised"),
        (False, "/home/ann/Dropbox/llm", "synchronised"),
    ],
)
def test_folders_that_make_trouble(monkeypatch, windows, path, says):
    monkeypatch.setattr(doctor, "PROJECT", PurePath(path))
    monkeypatch.setattr(doctor, "WINDOWS", windows)
    finding = doctor.check_paths()
    assert finding.status == ("warn" if says else "ok")
    assert says in finding.detail
    if says:
        assert ("C:\\llm" in finding.remedy) == windows


@pytest.mark.parametrize(
    ("system", "usual", "says"),
    [
        ("linux", "g++", "apt install"),
        ("darwin", "clang++", "xcode-select"),
        ("win32", "cl", "Visual Studio"),
    ],
)
def test_no_compiler(monkeypatch, system, usual, says):
    """A compiler of C alone, as minimal Linux systems have it, will not do."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == usual else "/bin/cc")
    monkeypatch.setattr(doctor.sys, "platform", system)
    finding = doctor.check_compiler()
    assert finding.status == "warn"
    assert says in finding.remedy


@pytest.mark.parametrize(("chosen", "found"), [(None, "g++"), ("", "g++"), ("clang++", "clang++")])
def test_compilers(monkeypatch, chosen, found):
    monkeypatch.delenv("CXX", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CXX", chosen)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    assert doctor.check_compiler() == Finding("compiler", "ok", f"/bin/{found}")


def test_assets_that_are_here():
    finding = doctor.check_assets()
    assert finding.status == "ok"
    here, _, online = finding.detail.partition("; ")
    for name, asset in ASSETS.items():
        assert name in (here if asset.shipped or asset.package else online)


def test_assets_without_the_offline_group(monkeypatch):
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    finding = doctor.check_assets()
    assert finding.status == "fail"
    assert "gpt2-bpe-encoder" in finding.detail
    assert "story" not in finding.detail
    assert "uv sync --group offline" in finding.remedy


def test_large_downloads_are_seen_and_not_read(own_cache, monkeypatch):
    own_cache.mkdir()
    (own_cache / "gpt2-1558m.safetensors").write_bytes(b"large")
    read = []
    monkeypatch.setattr(doctor, "locate", lambda asset: (read.append(asset.name) or True, None))
    here = doctor.check_assets().detail.partition(";")[0]
    assert "gpt2-1558m" in here
    assert "gpt2-774m" not in here
    assert set(read) == {name for name in ASSETS if not name.startswith("gpt2-") or "bpe" in name}


def test_network(monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "COURSE_MIRROR", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy:3128")
    assert doctor.check_network() == Finding("network", "ok", "HTTPS_PROXY=proxy:3128")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    finding = doctor.check_network()
    assert finding.status == "warn"
    assert "company.pem" in finding.detail
    (tmp_path / "company.pem").touch()
    assert doctor.check_network().status == "ok"
