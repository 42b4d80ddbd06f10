"""Assets: what is promised is there, what is damaged is refused, nothing calls home."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common import assets as room
from common.assets import ASSETS, AssetUnavailable, cache_dir, fetch, folder_archive, locate, origin
from common.download import DownloadError

BY_DEFAULT = [asset.name for asset in ASSETS.values() if asset.shipped or asset.package]
ONLINE = [name for name in ASSETS if name not in BY_DEFAULT]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """A machine where touching the network fails the test."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network was touched: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ----------------------------------------------------------------------------------- the catalogue


def test_the_agreed_names_exist():
    assert {"story", "gpt2-bpe-encoder", "gpt2-bpe-vocab", "smollm2-135m", "sms-spam"} <= set(
        ASSETS
    )
    assert {"shakespeare", "sms-spam-full", "tiny-shakespeare"} <= set(ASSETS)
    assert {f"gpt2-{size}" for size in ("124m", "355m", "774m", "1558m")} <= set(ASSETS)


@pytest.mark.parametrize("asset", ASSETS.values(), ids=str)
def test_every_asset_is_fully_described(asset):
    assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
    assert asset.size > 0
    assert asset.licence
    assert asset.about
    assert asset.shipped or asset.package or asset.url
    assert not (asset.shipped and asset.package)
    if asset.name in ONLINE:
        assert asset.instead


@pytest.mark.parametrize("attribute", ["filename", "remote_name", "sha256"])
def test_no_two_assets_share(attribute):
    assert len({getattr(asset, attribute) for asset in ASSETS.values()}) == len(ASSETS)


def test_addresses_name_a_revision():
    for asset in ASSETS.values():
        if re.search("huggingface|github", asset.url):
            assert re.search("/[0-9a-f]{40}/", asset.url), f"{asset.url} may change"


@pytest.mark.parametrize("asset", [a for a in ASSETS.values() if a.shipped], ids=lambda a: a.name)
def test_files_of_the_repository_are_as_recorded(asset):
    content = asset.local.read_bytes()
    found = f"{len(content):_}", hashlib.sha256(content).hexdigest()
    recorded = f"{asset.size:_}", asset.sha256
    assert found == recorded, f"if the change is meant, common/assets.py needs {found}"
    assert asset.filename.endswith(".safetensors") or b"\r" not in content


def test_every_file_of_the_repository_is_recorded():
    recorded = {asset.filename for asset in ASSETS.values() if asset.shipped}
    files = (file for file in room.DATA.rglob("*") if file.is_file() and file.suffix != ".md")
    assert {file.relative_to(room.DATA).as_posix() for file in files} == recorded


# ------------------------------------------------------------------------------------- what is here


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_what_notebooks_use_is_here_without_a_network(offline, own_cache, name):
    path = fetch(name)
    assert path.is_dir() == ASSETS[name].is_folder
    assert path == fetch(name, download=True)  # nothing to download
    assert not own_cache.exists()


def test_shakespeare_is_38_plays():
    assert len(list(fetch("shakespeare").glob("*/*.md"))) == 38


def test_packages_are_found_without_importing_them():
    packages = {asset.package.partition("/")[0] for asset in ASSETS.values() if asset.package}
    code = f"""
import sys
from common.assets import fetch
for name in {BY_DEFAULT}:
    fetch(name)
heavy = {{"torch", "numpy", "httpx", "tqdm", *{sorted(packages)}}}
print(sorted(heavy & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    assert len(packages) == 4


@pytest.mark.parametrize("name", ONLINE)
def test_what_is_online_is_not_fetched_unasked(offline, name):
    with pytest.raises(AssetUnavailable) as caught:
        fetch(name)
    message = str(caught.value)
    assert f"`uv run course fetch {name}` downloads" in message
    assert "; without it, " in message
    assert "\n" not in message


def test_unknown_names_get_the_nearest(offline):
    with pytest.raises(AssetUnavailable, match="did you mean 'gpt2-124m'"):
        fetch("gpt2-124M")
    with pytest.raises(AssetUnavailable, match=r"there are story, .*gpt2-1558m"):
        fetch("moby-dick", download=True)


# --------------------------------------------------------------------------------- what is damaged


def test_the_cache_comes_first(own_cache):
    original = fetch("gpt2-bpe-vocab")
    copy = put(own_cache / "vocab.bpe", original.read_bytes())
    assert fetch("gpt2-bpe-vocab") == copy


@pytest.mark.parametrize("damage", ["flip a bit", "cut", "empty", "folder"])
def test_a_damaged_copy_is_passed_over(own_cache, damage):
    original = fetch("gpt2-bpe-vocab")
    content = bytearray(original.read_bytes())
    if damage == "flip a bit":
        content[1000] ^= 1
    copy = own_cache / "vocab.bpe"
    if damage == "folder":
        copy.mkdir(parents=True)
    else:
        put(copy, {"cut": content[:-1], "empty": b""}.get(damage, content))
    assert fetch("gpt2-bpe-vocab") == original


def test_tampering_is_noticed_in_a_running_process(own_cache):
    original = fetch("gpt2-bpe-vocab")
    copy = put(own_cache / "vocab.bpe", original.read_bytes())
    assert fetch("gpt2-bpe-vocab") == copy
    with copy.open("r+b") as file:
        file.write(b"x")
    os.utime(copy, ns=(1, 1))  # the clock of a file system may be too coarse for a test
    assert fetch("gpt2-bpe-vocab") == original


def test_a_damaged_file_and_no_other(monkeypatch, own_cache):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    put(own_cache / "vocab.bpe", b"?")
    with pytest.raises(AssetUnavailable, match=r"vocab.bpe is not 'gpt2-bpe-vocab' as it should"):
        fetch("gpt2-bpe-vocab")


def test_a_changed_file_of_the_repository(monkeypatch, tmp_path):
    put(tmp_path / "story.txt", b"Once upon a time")
    monkeypatch.setattr(room, "DATA", tmp_path)
    with pytest.raises(AssetUnavailable, match=r"git checkout -- common/data/story.txt"):
        fetch("story")


def test_a_folder_with_a_changed_missing_or_added_file(own_cache):
    original = fetch("shakespeare")
    copy = own_cache / "shakespeare"
    shutil.copytree(original, copy)
    assert fetch("shakespeare") == copy
    play = copy / "tragedies" / "hamlet.md"
    text = play.read_bytes()
    for change in (
        lambda: play.write_bytes(text.replace(b"Denmark", b"Finland")),
        lambda: play.unlink(),
        lambda: put(copy / "tragedies" / "macbeth2.md", text),
    ):
        change()
        assert fetch("shakespeare") == original
        shutil.copytree(original, copy, dirs_exist_ok=True)
    (copy / "tragedies" / "macbeth2.md").unlink()
    assert fetch("shakespeare") == copy


def test_without_the_offline_group(monkeypatch, offline):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    for name in (asset.name for asset in ASSETS.values() if asset.package):
        with pytest.raises(AssetUnavailable, match="uv sync --group offline"):
            fetch(name)
    assert fetch("story")


# ------------------------------------------------------------------------------------- downloading


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """Replace the network: `sent[address]` is what a download brings. Return what was asked for."""
    asked, sent = [], {}

    def download(url, target, size, sha256, use_proxy):
        asked.append((url, use_proxy))
        if url not in sent:
            raise DownloadError("host answered 404")
        put(target, sent[url])

    monkeypatch.setattr(room, "download_file", download)
    return asked, sent


def test_download_is_explicit_and_once(downloads, own_cache, monkeypatch):
    asked, sent = downloads
    content = b"5,574 messages"
    small = replace(ASSETS["sms-spam-full"], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(ASSETS, "sms-spam-full", small)
    sent[small.url] = content
    path = fetch("sms-spam-full", download=True)
    assert path == own_cache / "sms+spam+collection.zip"
    assert path == fetch("sms-spam-full", download=True) == fetch("sms-spam-full")
    assert asked == [(small.url, True)]


def test_a_failed_download_names_the_alternative(downloads):
    with pytest.raises(AssetUnavailable, match=r"404; without it, fetch\('smollm2-135m'\)"):
        fetch("gpt2-124m", download=True)


def test_what_has_no_origin(downloads, monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(AssetUnavailable, match="is not on this machine: `uv sync --group offline`"):
        fetch("sms-spam", download=True)
    assert downloads[0] == []


@pytest.mark.parametrize(
    "mirror", ["http://10.0.0.5:8000", "http://10.0.0.5:8000/", "10.0.0.5:8000"]
)
def test_the_mirror_replaces_every_origin(downloads, monkeypatch, mirror):
    monkeypatch.setenv("COURSE_MIRROR", mirror)
    with pytest.raises(AssetUnavailable):
        fetch("gpt2-124m", download=True)
    assert downloads[0] == [("http://10.0.0.5:8000/gpt2-124m.safetensors", False)]


def test_a_folder_travels_as_an_archive(downloads, monkeypatch, own_cache):
    _, sent = downloads
    original = fetch("shakespeare")
    monkeypatch.setenv("COURSE_MIRROR", "http://teacher")
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    sent["http://teacher/shakespeare.tar"] = folder_archive(original)
    put(own_cache / "shakespeare" / "tragedies" / "hamlet.md", b"damaged")
    path = fetch("shakespeare", download=True)
    assert path == own_cache / "shakespeare"
    assert [file.name for file in own_cache.iterdir()] == ["shakespeare"]
    assert folder_archive(path) == folder_archive(original)


def test_the_hub_may_be_another(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert origin(ASSETS["gpt2-124m"]).startswith("https://hub.example/openai-community/gpt2/")
    assert origin(ASSETS["sms-spam-full"]).startswith("https://archive.ics.uci.edu/")


# --------------------------------------------------------------------------------- the cache folder


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("COURSE_CACHE", "~/course")
    assert cache_dir() == Path.home() / "course"
    monkeypatch.setenv("COURSE_CACHE", "")
    assert cache_dir().name == "llm-by-coding"
    assert cache_dir().is_absolute()


def test_looking_creates_nothing(own_cache):
    for asset in ASSETS.values():
        locate(asset)
    assert not own_cache.exists()
