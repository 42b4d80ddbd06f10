"""The front page keeps its word: commands that exist, pictures and quotations from the notebooks,
and a Korean version with the same sections, commands, figures and links.

    uv run pytest tests/test_readme.py
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from common import classification, cli, pretrain_options

ROOT = Path(__file__).parents[1]
README, KOREAN = (
    (ROOT / name).read_text(encoding="utf8") for name in ("README.md", "README.ko.md")
)
PARSERS = {
    "uv run course": cli.build_parser(),
    "python -m common.pretrain": pretrain_options.build_parser(),
    "-m common.pretrain": pretrain_options.build_parser(),  # after torchrun and its own options
    "python -m common.classification": classification.build_parser(),
}


def load_pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / ".ci" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load_pictures()


def code(page: str) -> list[str]:
    """What can be typed: lines of code blocks and code in the text, without comments, in order."""
    blocks = re.findall(r"^    (?! )(.+(?:(?<=\\)\n.+)*)", page, flags=re.M)
    lines = [re.sub(r"\\\n\s*", "", line).split(" # ")[0].strip() for line in blocks]
    return [*lines, *re.findall(r"`([^`\n]+)`", page)]


def commands(page: str) -> list[str]:
    return [line for line in code(page) if line.startswith(("uv ", "python", "torchrun", "pipx"))]


def links(page: str) -> list[str]:
    """Targets, in order; of a place on the same page only that it is one."""
    found = re.findall(r"\]\(([^)\s]+)\)", page)
    return ["#" if target[0] == "#" else target for target in found]


def slug(heading: str) -> str:
    """How code hosts name the place of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_command_would_be_understood(capsys):
    seen = 0
    for line in commands(README):
        for name, parser in PARSERS.items():
            if (at := line.find(name + " ")) >= 0:
                words = shlex.split(line[at + len(name) :].replace("...", ""))
                try:
                    parser.parse_args(words)
                except SystemExit:
                    pytest.fail(f"README: {line}\n{capsys.readouterr().err}")
                seen += 1
                break
    assert seen > 20


@pytest.mark.parametrize("page", [README, KOREAN], ids=["English", "Korean"])
def test_places_on_the_page_exist(page):
    places = {slug(heading) for heading in re.findall(r"^#+ (.+)$", page, flags=re.M)}
    wanted = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert wanted
    assert wanted <= places, wanted - places


def test_korean_has_the_same_sections_commands_figures_and_links():
    levels = [re.findall(r"^(#+) ", page, flags=re.M) for page in (README, KOREAN)]
    assert levels[0] == levels[1], "sections differ"
    missing = sorted(set(commands(README)) ^ set(commands(KOREAN)))
    assert not missing, f"only in one of README.md and README.ko.md: {missing}"
    other = {"README.md", "README.ko.md", "README.md#what-is-where"}
    here, there = ([link for link in links(page) if link not in other] for page in (README, KOREAN))
    assert here == there, f"links differ: {set(here) ^ set(there)}"
    rows = [len(re.findall(r"^\|", page, flags=re.M)) for page in (README, KOREAN)]
    assert rows[0] == rows[1], "a table has more rows in one of README.md and README.ko.md"
    scripts = [re.findall(r"`(bench_\w+\.py)` \|$", page, flags=re.M) for page in (README, KOREAN)]
    assert scripts[0] == scripts[1], "figures differ"
    assert "](README.ko.md)" in README
    assert "](README.md)" in KOREAN


def test_quotations_are_in_the_notebooks():
    quoted = re.search(r"^    chapter 1, untrained(?:.+\n)+?(?=\n)", README, flags=re.M).group(0)
    texts = [re.split(r"  +", line.strip())[1] for line in quoted.splitlines()]
    assert len(texts) >= 4
    cells = [
        cell
        for path in ROOT.glob("ch0*/*.ipynb")
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]
    ]
    outputs = [output.get("text", "") for cell in cells for output in cell.get("outputs", [])]
    stored = "".join(map("".join, [*(cell["source"] for cell in cells), *outputs]))
    for text in texts:
        assert text in stored, f"no notebook writes: {text}"
        assert text in KOREAN


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_notebooks_hold_and_are_small(name):
    assert not pictures.is_stale(name), f"{name}: run `uv run python .ci/pictures.py`"
    assert (pictures.FOLDER / name).stat().st_size < 120_000
    for page in (README, KOREAN):
        assert re.search(rf"!\[[^\]]{{40,}}\]\(\.github/pictures/{name}\)", page), "no description"


def test_another_picture_would_be_noticed():
    rows, learning = (pictures.drawn(ROOT / n, p) for n, p in list(pictures.PICTURES.values())[2:4])
    assert pictures.difference(rows, rows) == 0
    assert pictures.difference(rows, learning) > 4
