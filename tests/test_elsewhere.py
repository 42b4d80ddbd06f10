"""The course on other people's machines, as far as that can be tested on this one.

What is tested: the first cell for hosted Jupyter clones, goes where it should, asks for the right
packages and makes `common` importable (with a `uv` that only writes down what it was asked for);
the dev container and the workflows are well-formed, and every command and asset in them exists.
What is not: a container being built, Colab itself, GitHub's runners, downloads from their origins.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from common.assets import ASSETS
from common.cli import build_parser

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf8"))
CELL = ROOT / ".devcontainer" / "colab.py"
WORKFLOWS = {path.stem: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def steps(name: str) -> list[str]:
    """All shell commands of a workflow."""
    workflow = yaml.safe_load(WORKFLOWS[name].read_text(encoding="utf8"))
    jobs = workflow["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


COMMANDS = {name: steps(name) for name in WORKFLOWS}
COMMANDS["container"] = CONTAINER["postCreateCommand"].split(" && ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_ours_is_one(name):
    for command in COMMANDS[name]:
        if "<<" in command:
            ast.parse(re.search(r"<<'END'\n(.*)\nEND", command, flags=re.S)[1])
            continue
        words = shlex.split(command, comments=True)
        if "course" in words:
            arguments = build_parser().parse_args(words[words.index("course") + 1 :])
            assert {*getattr(arguments, "names", [])} <= ASSETS.keys()
        for path in re.findall(r"tests/\w+\.py", command):
            assert (ROOT / path).exists()
        for path, test in re.findall(r"(tests/\w+\.py)::(\w+)", command):
            assert f"def {test}(" in (ROOT / path).read_text(encoding="utf8")


def test_the_container_has_a_python_that_the_course_runs_on():
    version = CONTAINER["image"].rpartition(":")[2]
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(version)
    settings = CONTAINER["customizations"]["vscode"]["settings"]
    assert settings["python.defaultInterpreterPath"].endswith("/.venv/bin/python")


def test_the_scheduled_workflow_takes_the_newest_and_downloads_for_real():
    commands = COMMANDS["newest"]
    assert "uv sync --upgrade" in commands
    fetched = next(command for command in commands if "course fetch" in command)
    there = {name for name, asset in ASSETS.items() if asset.url and asset.size < 1e9}
    assert there <= {*fetched.split()}


# ----------------------------------------------------------------------------------- hosted Jupyter

NOTES = """
import json, os, pathlib, sys
with open({log!r}, "a", encoding="utf8") as log:
    log.write(json.dumps([os.getcwd(), sys.argv[1:]]) + "\\n")
"""


@pytest.fixture
def hosted(tmp_path):
    """A folder, an environment in which pip and uv only take notes, and a repository to clone."""
    origin, modules, log = tmp_path / "origin", tmp_path / "modules", tmp_path / "log"
    (origin / "common").mkdir(parents=True)
    (origin / "common" / "__init__.py").write_text("here = __file__\n", encoding="utf8")
    git = ["git", "-C", str(origin), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    modules.mkdir()
    for name in ("pip", "uv"):
        (modules / f"{name}.py").write_text(NOTES.format(log=str(log)), encoding="utf8")
    home = tmp_path / "content"
    home.mkdir()
    return home, os.environ | {"PYTHONPATH": str(modules)}, origin, log


def run_cell(hosted, repository, *more):
    home, environment, _, _ = hosted
    text = CELL.read_text(encoding="utf8").replace(
        'REPOSITORY = ""', f"REPOSITORY = {repository!r}"
    )
    code = "\n".join([text, "import common", "print(os.getcwd(), common.here, sep='\\n')", *more])
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=home, env=environment, capture_output=True, text=True, encoding="utf8",
    )  # fmt: skip


def test_the_first_cell_on_colab(hosted):
    home, _, origin, log = hosted
    course = home.resolve() / "course"
    ran = run_cell(hosted, origin.as_uri())
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [str(course), str(course / "common" / "__init__.py")]
    notes = [json.loads(line) for line in log.read_text(encoding="utf8").splitlines()]
    assert [where for where, _ in notes] == [str(course)] * 2
    assert notes[0][1] == ["install", "--quiet", "uv"]
    words = notes[1][1]
    assert words[:2] == ["pip", "install"]
    assert words[words.index("--python") + 1] == sys.executable
    assert words[words.index("--editable") + 1] == "."
    assert words[words.index("--group") + 1] in PROJECT["dependency-groups"]


def test_run_twice_it_clones_once(hosted):
    home, _, origin, _ = hosted
    assert run_cell(hosted, origin.as_uri()).returncode == 0
    (home / "course" / "work").write_text("of mine", encoding="utf8")
    assert run_cell(hosted, "").returncode == 0
    assert (home / "course" / "work").read_text(encoding="utf8") == "of mine"


def test_without_an_address_it_says_so(hosted):
    ran = run_cell(hosted, "")
    assert ran.returncode == 1
    assert "put the address of the repository between the quotes" in ran.stderr
