"""Rules for notebooks: short cells, run in order, compared on replay, gradable exercises."""

import ast
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("ch0*/*.ipynb"))
CHAPTERS = sorted(path for path in ROOT.glob("ch0*") if any(path.glob("*.ipynb")))
CLASSES_OF_COMMON = {
    node.name
    for path in (ROOT / "common").glob("*.py")
    for node in ast.parse(path.read_text(encoding="utf8")).body
    if isinstance(node, ast.ClassDef)
}


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    return json.loads(request.param.read_text(encoding="utf8"))


@pytest.fixture
def code(notebook) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_chapter_has_a_notebook_named_like_its_folder():
    assert CHAPTERS
    for chapter in CHAPTERS:
        assert (chapter / f"{chapter.name}.ipynb").exists()
        others = [p.name for p in chapter.glob("*.ipynb") if p.stem != chapter.name]
        assert all(name.startswith("bonus_") for name in others), others


def test_saved_from_one_run_top_to_bottom(code):
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run all cells in a fresh kernel, then save"


def test_no_error_output_is_stored(code):
    for cell in code:
        raised = any(output["output_type"] == "error" for output in cell["outputs"])
        assert not raised or "raises-exception" in tags(cell), source(cell)


def test_cells_are_short(code):
    lines = sorted(len(source(cell).splitlines()) for cell in code)
    assert statistics.median(lines) <= 6, f"median {statistics.median(lines)}"
    assert lines[int(0.9 * (len(lines) - 1))] <= 20, f"90%: {lines[int(0.9 * (len(lines) - 1))]}"
    assert lines[-1] <= 30, f"longest {lines[-1]}"


def test_length(notebook):
    main = any(source(cell).startswith("# ") for cell in notebook["cells"][:1])
    assert main, "the first cell opens with a title"
    assert 40 <= len(notebook["cells"]) <= 120


def test_outputs_are_compared(code):
    skipped = [cell for cell in code if tags(cell) & {"nbval-ignore-output", "nbval-skip"}]
    assert not any("nbval-skip" in tags(cell) for cell in code), "a skipped cell proves nothing"
    assert not [cell for cell in code if "NBVAL_" in source(cell)], "use tags, not comments"
    assert len(skipped) <= 0.2 * len(code), f"{len(skipped)} of {len(code)} are not compared"


def test_claims_are_asserted(code):
    assert sum("assert" in source(cell) for cell in code) >= 10


def test_outputs_hold_nothing_of_the_machine(notebook):
    text = json.dumps(notebook)
    for path in ("/root/", "/home/", "/Users/", "/tmp/", "C:\\\\Users", "/work/"):
        assert path not in text, f"a path of one machine is stored: {path}"
    assert "image/svg+xml" not in text, "SVG output differs from run to run; use PNG"


def test_metadata_is_clean(notebook):
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info", "course"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))


def test_agenda_and_headings_agree(notebook):
    headings = {}
    for cell in notebook["cells"]:
        for number, name, time in re.findall(
            r"^## (\d+\.\d+) (.+?)  \(([\d:]+).*\)$", source(cell), flags=re.M
        ):
            headings[number] = name, time
    row = r"\| (\d+\.\d+) (?:\| )?([^|]+?) \| ([\d:]+) (?=\|)"
    agenda = {
        number: (n, time) for number, n, time in re.findall(row, source(notebook["cells"][0]))
    }
    assert agenda.keys() == headings.keys()
    for number, (name, time) in agenda.items():
        assert time == headings[number][1], f"{number} takes {headings[number][1]}"
        shorter, longer = sorted((name, headings[number][0]), key=len)
        assert longer.startswith(shorter.rstrip("?")), f"{number}: '{name}' and '{longer}'"


def test_exercises_have_statement_folded_solution_and_check(notebook):
    cells = notebook["cells"]
    numbers = {n for cell in cells for n in re.findall(r"\*\*Exercise (\d+\.\d+)", source(cell))}
    solutions = [cell for cell in cells if "solution" in tags(cell)]
    checks = [cell for cell in cells if "check" in tags(cell)]
    assert len(numbers) >= 6, f"{len(numbers)} exercises"
    assert len(solutions) >= len(numbers)
    assert len(checks) >= len(numbers)
    for cell in solutions:
        text = source(cell)
        assert text.count("### BEGIN SOLUTION") == text.count("### END SOLUTION") >= 1, text
        assert cell["metadata"].get("jupyter", {}).get("source_hidden"), f"not folded: {text}"
    for cell in checks:
        assert "assert" in source(cell), "a check that can not fail is no check"
    outside = [cell for cell in cells if cell not in solutions and "### BEGIN SOL" in source(cell)]
    assert not outside, "a solution stands in a cell that is not tagged `solution`"


def test_no_class_of_common_is_defined_in_two_chapters():
    homes: dict[str, set[str]] = {}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
            for name in re.findall(r"^class (\w+)", source(cell), flags=re.M):
                homes.setdefault(name, set()).add(path.parent.name)
    twice = {name: where for name, where in homes.items() if len(where) > 1}
    assert not {name: where for name, where in twice.items() if name in CLASSES_OF_COMMON}
