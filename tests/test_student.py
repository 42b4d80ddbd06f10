"""The student edition: blanks where solutions were, and nothing else is changed or broken.

uv run pytest tests/test_student.py             every notebook by its text, the first by running
uv run pytest tests/test_student.py -m slow     every notebook by running it, with empty blanks
"""

import json
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common.chapters import BEGIN, END, NotebookError, exercises, notebooks, read, tags
from common.student import blank, leaning, student_edition, write

ALL = notebooks()
ROOT = ALL["ch01_setup"].parents[1]


def exercise(number="1.1", lines=("return a + b",), name="add", after=()):
    body = [f"def {name}(a, b):", *(f"    {line}" for line in (BEGIN, *lines, END, *after))]
    return [
        new_markdown_cell(f"**Exercise {number}** (5 minutes, ●●○). Add."),
        new_code_cell("\n".join(body), metadata={"tags": ["solution"], "jupyter": {"x": 1}}),
        new_code_cell(
            f"assert {name}(1, 2) == 3, 'add both'\nprint('all good')", metadata={"tags": ["check"]}
        ),
    ]


def small_notebook(*cells):
    opening = new_markdown_cell("# 1 · Small")
    return new_notebook(cells=[opening, *exercise(), *cells])


def regions(source):
    """What stands between the markers, markers included."""
    return re.findall(rf"^[ ]*{BEGIN}\n.*?{END}$", source, flags=re.M | re.S)


def fill_in(student, instructor):
    """The student edition with the instructor's lines in its blanks, without its note."""
    filled = deepcopy(student)
    filled.cells = [cell for cell in filled.cells if cell.id != "student-edition"]
    for cell, original in zip(filled.cells, instructor.cells, strict=True):
        for region in regions(original.source):
            cell.source = re.sub(
                r"^ *# your code, in place of the next line\n *raise NotImplementedError\(.*\)$",
                region.replace("\\", r"\\"), cell.source, count=1, flags=re.M,
            )  # fmt: skip
    return filled


def run(notebook):
    """Execute all cells; returns {cell: error} for those that raised."""
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return {
        index: output
        for index, cell in enumerate(notebook.cells)
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    }


# --------------------------------------------------------------------------- all notebooks, by text


@cache
def original(name):
    return read(ALL[name])


@pytest.fixture(params=ALL)
def instructor(request):
    return original(request.param)


def test_filling_in_gives_the_instructors_sources_back(instructor):
    filled = fill_in(student_edition(instructor), instructor)
    assert [c.source for c in filled.cells] == [c.source for c in instructor.cells]


def test_no_line_of_a_solution_is_left_and_every_blank_says_its_number(instructor):
    found = exercises(instructor)
    edition = student_edition(instructor)
    text = "\n".join(cell.source for cell in edition.cells)
    assert BEGIN not in text
    assert END not in text
    said = re.findall(r"Exercise (\S+) is still blank", text)
    assert [*dict.fromkeys(said)] == [e.number for e in found]
    assert len(said) == sum(cell.source.count(BEGIN) for cell in instructor.cells)
    for exercise in found:
        cell = edition.cells[exercise.solution + 1]  # the note comes before
        for line in "\n".join(regions(instructor.cells[exercise.solution].source)).splitlines():
            assert line not in cell.source.splitlines(), f"{exercise.number}: {line}"
        compile(cell.source, "cell", "exec")


def test_only_exercises_differ_and_everything_is_open_and_empty(instructor):
    before = nbformat.writes(instructor)
    found, edition = exercises(instructor), student_edition(instructor)
    assert nbformat.writes(instructor) == before, "the instructor's notebook was changed"
    changed = {e.solution for e in found}
    checks = {e.check for e in found}
    originals = [*enumerate(instructor.cells)]
    originals.insert(1, (None, edition.cells[1]))
    for (index, original), cell in zip(originals, edition.cells, strict=True):
        assert (cell.source == original.source) == (index not in changed)
        assert "jupyter" not in cell.metadata, "a folded cell"
        assert ("raises-exception" in tags(cell)) == (
            index in checks or "raises-exception" in tags(original)
        )
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
    assert "course" not in edition.metadata
    nbformat.validate(edition)


def test_nothing_leans_on_an_exercise(instructor):
    assert leaning(instructor, exercises(instructor)) == []


# ------------------------------------------------------------------------------------- by execution


def test_runs_into_exactly_the_blanks_and_filled_in_into_none():
    notebook = small_notebook(new_code_cell("after = 1"), *exercise("1.2", after=("return 3",)))
    edition = student_edition(notebook)
    errors = run(edition)
    assert {index: (e.ename, e.evalue) for index, e in errors.items()} == {
        4: ("NotImplementedError", "Exercise 1.1 is still blank"),
        8: ("NotImplementedError", "Exercise 1.2 is still blank"),
    }
    assert all(cell.execution_count for cell in edition.cells if cell.cell_type == "code")
    assert run(fill_in(student_edition(notebook), notebook)) == {}


def test_a_wrong_answer_is_shown_and_stops_nothing():
    edition = student_edition(small_notebook(new_code_cell("print('on')")))
    edition.cells[3].source = "def add(a, b):\n    return a"
    assert [(e.ename, e.evalue) for e in run(edition).values()] == [("AssertionError", "add both")]
    assert edition.cells[-1].outputs[0].text == "on\n"


def test_a_blank_outside_a_function_stops_nothing():
    cells = exercise()
    cells[1].source = f"{BEGIN}\nadd = sum\n{END}"
    cells[2].source = "assert add([1, 2]) == 3"
    edition = student_edition(new_notebook(cells=[new_markdown_cell("# 1 · T"), *cells]))
    raised = [(index, error.ename) for index, error in run(edition).items()]
    assert raised == [(3, "NotImplementedError"), (4, "NameError")]


def blanks_replayed(name: str, folder) -> None:
    """Replay a student edition, blanks and all, and compare with what the instructor's printed."""
    instructor = read(ALL[name])
    edition = student_edition(instructor, name)
    del edition.cells[1]
    checks = {e.check: e.number for e in exercises(instructor)}
    for index, (cell, original) in enumerate(zip(edition.cells, instructor.cells, strict=True)):
        if index in checks:
            assert_blank = f"Exercise {checks[index]} is still blank"
            cell.outputs = [
                nbformat.v4.new_output("error", ename="NotImplementedError", evalue=assert_blank)
            ]
        elif cell.cell_type == "code":
            cell.outputs = deepcopy(original.outputs)
        if cell.cell_type == "code":
            cell.execution_count = 1
    path = folder / ALL[name].parent.name / f"{name}.ipynb"
    path.parent.mkdir()
    nbformat.write(edition, path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "--confcutdir", str(ROOT)]
    command += ["-p", "conftest", f"--nbval-sanitize-with={ROOT / 'tests' / 'sanitize.cfg'}"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf8")
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_the_first_chapter_runs_with_all_its_blanks(tmp_path):
    blanks_replayed("ch01_setup", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name != "ch01_setup"])
def test_every_chapter_runs_with_all_its_blanks(name, tmp_path):
    blanks_replayed(name, tmp_path)


# --------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("later", "leans"),
    [
        ("print(add(1, 2))", ["add"]),
        ("def later():\n    return [add(i, 1) for i in range(3)]", ["add"]),
        ("add = add", ["add"]),
        ("add += 1", ["add"]),
        ("add = max\nadd(1, 2)", []),
        ("for add in range(3):\n    print(add)", []),
        ("import add\nadd.x", []),
        ("with open('x') as add:\n    add.read()", []),
        ("def add():\n    return add()", []),
        ("%matplotlib inline\nother.add", []),
        ("class A:\n    size = add(1, 2)", ["add"]),
        ("f'{add(1, 2)}'", ["add"]),
    ],
)
def test_what_leans_on_an_exercise_is_found(later, leans):
    notebook = small_notebook(new_code_cell(later))
    found = leaning(notebook, exercises(notebook))
    assert found == [(4, name, "1.1") for name in leans]
    if leans:
        with pytest.raises(NotebookError, match=r"x, cell 4 uses `add`, which only Exercise 1\.1 "):
            student_edition(notebook, "x")


def test_what_is_defined_again_leans_no_longer_and_imports_of_checks_do_not_count():
    notebook = small_notebook(new_code_cell("add = max"), new_code_cell("add(1, 2), product()"))
    notebook.cells[3].source = "from math import prod as product\n" + notebook.cells[3].source
    assert leaning(notebook, exercises(notebook)) == []


def test_writes_in_the_courses_folders_and_never_over_work(tmp_path):
    assert [(path.relative_to(tmp_path).as_posix(), n) for path, n in write(["1"], tmp_path)] == [
        ("ch01_setup/ch01_setup.ipynb", 6)
    ]
    (path,) = tmp_path.rglob("*.ipynb")
    assert read(path) == student_edition(read(ALL["ch01_setup"]))
    path.write_text("work of a week", encoding="utf8")
    with pytest.raises(NotebookError, match="is there already, perhaps with somebody's work"):
        write(["2", "1"], tmp_path)
    assert path.read_text(encoding="utf8") == "work of a week"
    assert [*tmp_path.rglob("*.ipynb")] == [path], "one was written before the other was refused"
    write(["1"], tmp_path, force=True)
    assert read(path).cells[1].id == "student-edition"


def test_never_over_the_instructors_notebook():
    before = ALL["ch01_setup"].read_bytes()
    with pytest.raises(NotebookError, match="is the instructor's notebook"):
        write(["1"], ROOT, force=True)
    assert ALL["ch01_setup"].read_bytes() == before


def test_an_unbalanced_marker_writes_nothing(tmp_path):
    notebook = json.loads(ALL["ch01_setup"].read_text(encoding="utf8"))
    for cell in notebook["cells"]:
        cell["source"] = [line for line in cell["source"] if END not in line]
    broken = tmp_path / "ch01_setup" / "ch01_setup.ipynb"
    broken.parent.mkdir()
    broken.write_text(json.dumps(notebook), encoding="utf8")
    with pytest.raises(NotebookError, match=r"ch01_setup\.ipynb, cell \d+: .* has no '### END"):
        write([str(broken), "2"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_blank_is_what_the_issue_of_a_learner_starts_with():
    assert blank("2.1")[0].startswith("# your code")
