"""A room's mirror: what it offers, what it refuses, and that learners get the very same files."""

import os
import re
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import assets, mirror
from common.assets import ASSETS, AssetUnavailable, fetch, folder_archive
from common.mirror import MirrorError, names_at, own_address, serve

HERE = [name for name, asset in ASSETS.items() if asset.shipped or asset.package]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """`course fetch --serve` in a process of its own; gives its address."""
    cache = tmp_path_factory.mktemp("teacher")
    command = [sys.executable, "-m", "common.cli", "fetch", "--serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1"],
        env=os.environ | {"COURSE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf8",
    )
    process.announcement = ""
    for line in process.stdout:
        process.announcement += line
        if line.startswith("Ctrl-C"):
            break
    process.address = re.search(r"http://127.0.0.1:\d+", process.announcement)[0]
    yield process
    process.terminate()
    process.communicate(timeout=10)


@pytest.fixture(scope="module")
def client(teacher):
    with httpx.Client(base_url=teacher.address, trust_env=False) as client:
        yield client


@pytest.fixture
def learner(teacher, monkeypatch, tmp_path):
    """A learner without the offline packages, in the same room."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setenv("COURSE_MIRROR", teacher.address)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a company's proxy that is no help here
    monkeypatch.setattr(assets, "find_spec", lambda name: None)
    return tmp_path


def test_announces_what_to_type(teacher):
    assert f"COURSE_MIRROR={teacher.address} uv run course fetch --all" in teacher.announcement
    assert f'$env:COURSE_MIRROR="{teacher.address}"; uv run' in teacher.announcement
    assert re.search("Not here, so not offered: .*gpt2-1558m", teacher.announcement)


@pytest.mark.parametrize("name", [name for name in HERE if ASSETS[name].package])
def test_learners_get_the_very_same_file(learner, name):
    path = fetch(name, download=True)
    assert path.is_relative_to(learner)
    assert assets.digest(path) == ASSETS[name].sha256
    assert fetch(name) == path


def test_what_the_mirror_does_not_have(learner):
    with pytest.raises(AssetUnavailable, match=r"answered 404 Not offered here; without it, fetch"):
        fetch("gpt2-124m", download=True)


def test_lists_what_it_has(teacher):
    assert names_at(teacher.address) == set(HERE)
    assert names_at(teacher.address.removeprefix("http://")) == set(HERE)


ELSEWHERE = """
    /assets.py  /../assets.py  /%2e%2e/assets.py  //etc/passwd  /etc/passwd  /C:/Windows/win.ini
    /..%2f..%2fpyproject.toml  /shakespeare  /story  /gpt2-124m  /gpt2-124m.safetensors
"""


@pytest.mark.parametrize("path", ELSEWHERE.split())
def test_nothing_else_can_be_reached(teacher, path):
    host = teacher.address.removeprefix("http://")
    with socket.create_connection(host.split(":"), timeout=10) as wire:  # clients tidy paths up
        wire.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        assert wire.makefile("rb").readline() == b"HTTP/1.1 404 Not offered here\r\n"


@pytest.fixture(scope="module")
def story():
    return fetch("story").read_bytes()


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 25_000), length=st.none() | st.integers(1, 25_000))
def test_ranges_are_slices(client, story, first, length):
    last = "" if length is None else first + length - 1
    answer = client.get("/story.txt", headers={"Range": f"bytes={first}-{last}"})
    expected = story[first:] if length is None else story[first : first + length]
    if first >= len(story):
        assert answer.status_code == 416
        assert answer.headers["Content-Range"] == f"bytes */{len(story)}"
    else:
        assert answer.content == expected
        assert answer.status_code == (200 if len(expected) == len(story) else 206)
        if answer.status_code == 206:
            end = first + len(expected) - 1
            assert answer.headers["Content-Range"] == f"bytes {first}-{end}/{len(story)}"


@pytest.mark.parametrize(
    "asked", ["bytes=5-2", "bytes=-5", "bytes=0-1,4-5", "lines=1-2", "bytes=x-"]
)
def test_unclear_ranges_get_everything_or_nothing(client, story, asked):
    answer = client.get("/story.txt", headers={"Range": asked})
    assert (answer.status_code, answer.content) in ((200, story), (416, b""))


def test_if_range(client, story):
    etag = client.get("/story.txt").headers["ETag"]
    headers = {"Range": "bytes=5-", "If-Range": etag}
    assert client.get("/story.txt", headers=headers).content == story[5:]
    headers["If-Range"] = '"another version"'
    assert client.get("/story.txt", headers=headers).content == story


def test_head_and_archive(client):
    answer = client.head("/shakespeare.tar")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["Content-Length"]) == ASSETS["shakespeare"].size
    assert client.get("/shakespeare.tar").content == folder_archive(fetch("shakespeare"))


def test_a_file_damaged_while_serving_is_not_offered(monkeypatch, tmp_path):
    (tmp_path / "story.txt").write_bytes(fetch("story").read_bytes())
    monkeypatch.setattr(assets, "DATA", tmp_path)
    with mirror.Server(("127.0.0.1", 0), mirror.Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/story.txt"
        assert httpx.get(url, trust_env=False).status_code == 200
        (tmp_path / "story.txt").write_bytes(b"Once upon a time")
        assert httpx.get(url, trust_env=False).status_code == 404
        server.shutdown()


def test_a_port_in_use(teacher):
    port = int(teacher.address.rpartition(":")[2])
    with pytest.raises(MirrorError, match=f"can't listen on port {port} .*try another --port"):
        serve("127.0.0.1", port)
    with pytest.raises(MirrorError, match="can't listen on port 99999"):
        serve("127.0.0.1", 99_999)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://[", "ftp://x"])
def test_a_mirror_that_does_not_answer(address):
    with pytest.raises(
        MirrorError, match=r"COURSE_MIRROR=.* does not answer .*Unset COURSE_MIRROR"
    ):
        names_at(address)


def test_own_address_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+\.\d+", own_address())
