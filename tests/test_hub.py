"""`course push` against a hub of our own, which plays the few endpoints that an upload needs.

huggingface_hub's code runs as it is, but for its optional transfer program (xet), which talks to
servers that can't be played in a few lines.

uv run pytest tests/test_hub.py
"""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from common import cli
from common.export import export
from common.gpt import GPT, GPTConfig
from common.tokenizer import BPETokenizer
from common.weights import Pretrained, load_pretrained, save_checkpoint

TINY = GPTConfig(280, 16, d_model=24, n_layers=2, n_heads=3)
TOKEN = "hf_ofADA"


class Hub(BaseHTTPRequestHandler):
    """A repository is a dictionary {name: bytes}. Large files come by git's LFS, small ones not."""

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(404, {"error": "not here"})

    def do_PUT(self) -> None:
        self.server.lfs[self.path.rpartition("/")[2]] = self.body()
        self.answer(200, {})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        hub.calls.append(self.path)
        if hub.refuses:
            return self.answer(*hub.refuses)
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            wanted.setdefault("private", wanted.get("visibility") == "private")  # old and new
            hub.created.append(wanted)
            return self.answer(200, {"url": f"{hub.address}/ada/{wanted['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].startswith("model.") else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        assert "/commit/" in self.path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.lfs[value["oid"]]
                assert hashlib.sha256(hub.lfs[value["oid"]]).hexdigest() == value["oid"]
        commit = {"commitUrl": f"{hub.address}/ada/x/commit/1", "commitOid": "1", "success": True}
        return self.answer(200, commit)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub at HF_ENDPOINT; TOKEN is logged in, and nobody else."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.files, server.lfs, server.created, server.calls = {}, {}, [], []
    server.refuses = None
    monkeypatch.setenv("HF_ENDPOINT", server.address + "/")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # whatever this machine is set to
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """A model, and a file that is nobody else's business."""
    tokenizer = BPETokenizer.train("ab ab abc abc hello hello", 262, ["<|endoftext|>"])
    export(Pretrained.of(GPT(TINY), tokenizer), tmp_path / "mine", "transformers")
    (tmp_path / "mine" / "passwords.txt").write_text("1234", encoding="utf8")
    (tmp_path / "mine" / "model").mkdir()
    return tmp_path / "mine"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["push", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_without_yes_it_only_shows(hub, folder, capsys):
    before = sorted(folder.iterdir())
    status, out, err = run(capsys, folder, "--repo", "ada/engine", "--license", "mit")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"to {hub.address}/ada/engine (private), ")
    size = (folder / "model.safetensors").stat().st_size
    shown = {line.split()[0]: line.split()[1:] for line in lines[1:7]}
    assert shown["model.safetensors"] == [f"{size / 1000:.0f}", "kB"]
    assert {*shown} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert "not uploaded: model, passwords.txt" in lines
    assert "README.md, made from these files:" in lines
    assert "license: mit" in lines
    assert lines[-1] == "Nothing was uploaded: the same command with --yes does it."
    assert hub.calls == []
    assert sorted(folder.iterdir()) == before


def test_with_yes_exactly_that_is_uploaded(hub, folder, capsys, tmp_path):
    status, out, _ = run(capsys, folder, "--repo", "ada/engine", "--yes", "--language", "en")
    assert status == 0
    assert out.splitlines()[-1] == f"pushed: {hub.address}/ada/engine"
    assert [(c["name"], c["organization"], c["private"]) for c in hub.created] == [
        ("engine", "ada", True)
    ]
    shown = out[out.index("---\n") : out.rindex("\n\npushed")]
    assert hub.files["README.md"].decode("utf8").strip() == shown.strip()
    assert {*hub.files} == {f.name for f in folder.iterdir()} - {"passwords.txt", "model"}
    (tmp_path / "copy").mkdir()
    for name, content in hub.files.items():
        assert (folder / name).read_bytes() == content
        (tmp_path / "copy" / name).write_bytes(content)
    assert load_pretrained(tmp_path / "copy")[0].config == TINY


def test_a_single_file_goes_with_what_belongs_to_it(hub, tmp_path, capsys):
    for name in ("final.safetensors", "earlier.safetensors"):
        save_checkpoint(GPT(TINY), tmp_path / name)
    (tmp_path / "history.csv").write_text("step,loss\n1,5.5\n2,4.5\n", encoding="utf8")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My own words\n", encoding="utf8")
    path = tmp_path / "final.safetensors"
    status, out, _ = run(capsys, path, "--repo", "ada/engine", "--yes", "--public")
    assert status == 0
    assert "README.md, as it is in the folder (without it, one is made):" in out
    assert "(public)" in out
    assert hub.created[0]["private"] is False
    assert {*hub.files} == {"final.safetensors", "history.csv", "README.md"}
    assert hub.files["README.md"].endswith(b"# My own words\n")


# ------------------------------------------------------------------------------ refused in one line


def assert_refused(capsys, reason: str, *arguments) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 1
    assert reason in err
    assert err.startswith("course: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("repo", "reason"),
    [
        ("engine", "'engine' is no repository: write owner/name"),
        ("ada/lovelace/engine", "must be in the form"),
        ("ada/my engine", "must use alphanumeric"),
        ("ada/..", "'ada/..'"),
        ("", "alphanumeric"),
    ],
)
def test_names_that_can_not_be(repo, reason, hub, folder, capsys):
    assert_refused(capsys, reason, folder, "--repo", repo, "--yes")
    assert hub.calls == []


@pytest.mark.parametrize("path", ["nowhere", "smollm2-135m"])
def test_paths_that_are_not_there(path, capsys):
    assert_refused(capsys, "no such file or folder; `uv run course convert`", path, "--repo", "a/b")


def test_a_folder_without_weights(tmp_path, capsys):
    assert_refused(capsys, "it has no .safetensors", tmp_path, "--repo", "ada/engine")


def test_no_token(hub, folder, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert_refused(capsys, "no token: run `uv run hf auth", folder, "--repo", "ada/engine", "--yes")
    assert hub.calls == []


def test_a_token_that_is_not_accepted(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_stolen")
    assert_refused(capsys, "does not accept the token", folder, "--repo", "ada/engine", "--yes")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((403, {"error": "Forbidden"}), "may not write to ada/engine: it needs the right to"),
        ((400, {"error": "the name\nis taken"}), "answered 400: "),
    ],
)
def test_what_the_hub_refuses(answer, reason, hub, folder, capsys):
    hub.refuses = answer
    assert_refused(capsys, reason, folder, "--repo", "ada/engine", "--yes")


def test_no_network(hub, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    reason = "http://127.0.0.1:9 can't be reached or used"
    assert_refused(capsys, reason, folder, "--repo", "ada/engine", "--yes")


def test_offline_mode(hub, folder, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(capsys, "offline mode", folder, "--repo", "ada/engine", "--yes")
    assert hub.calls == []


@pytest.mark.parametrize("endpoint", ["hub.example", "ftp://hub.example"])
def test_an_endpoint_that_is_no_address(endpoint, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert_refused(capsys, f"HF_ENDPOINT={endpoint} is no address", folder, "--repo", "a/b")
