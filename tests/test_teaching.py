"""The `course` commands of a class: what they print, and their exit status."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common import cli
from common.chapters import notebooks, save


def run(capsys, *arguments):
    """Exit status, standard output, standard error."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_student_editions_of_all_chapters(capsys, own_folder):
    status, out, err = run(capsys, "student", "--out", "mine")
    assert (status, err) == (0, "")
    written = {path.stem for path in (own_folder / "mine").rglob("*.ipynb")}
    assert written == {*notebooks()}
    assert len(out.splitlines()) == len(written)
    assert "ch01_setup.ipynb  6 blanks" in out


def test_a_student_edition_is_not_written_over_another(capsys):
    assert run(capsys, "student", "1")[0] == 0
    status, out, err = run(capsys, "student", "1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("course: ")
    assert "is there already" in err
    assert run(capsys, "student", "1", "--force")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["student", "12"], 1, "course: no chapter is called '12': there are"),
        (["student", "--out"], 2, "expected one argument"),
    ],
)
def test_wrong_usage(capsys, arguments, status, says):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (status, "")
    assert says in err


# -------------------------------------------------------------------------------------------- clock


def test_the_clock_of_a_chapter(capsys):
    status, out, err = run(capsys, "clock", "1", "--start", "14:00")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "1 · Setting up the coding environment"
    assert "\n14:07   2 min  1.4   Tensors\n" in out
    assert "\n14:21  the end. 6 exercises, 43 min, on top.\n" in out
    assert out.count("saves") == 3


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["clock"], 2, "required: CHAPTER"),
        (["clock", "9"], 1, "course: no chapter is called '9'"),
        (["clock", "1", "--start", "25:00"], 2, "invalid time_of_day value: '25:00'"),
    ],
)
def test_a_clock_that_is_not_there(capsys, arguments, status, says):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (status, "")
    assert says in err


# -------------------------------------------------------------------------------------------- check


def learners_copy(path, body):
    """A notebook with one exercise."""
    tagged = lambda source, tag: new_code_cell(source, metadata={"tags": [tag]})
    cells = [
        new_markdown_cell("**Exercise 1.1** (5 minutes, ●●○). Add."),
        tagged(f"def add(a, b):\n    {body}", "solution"),
        tagged("assert add(1, 2) == 3, 'add both'", "check"),
    ]
    save(new_notebook(cells=cells), path)
    return str(path)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("return a + b", 0, ["  1.1   passes", "1 of 1 pass."]),
        ("return a", 1, ["  1.1   no: add both", "0 of 1 pass."]),
    ],
)
def test_checks_of_a_learners_copy(capsys, own_folder, body, status, says):
    path = learners_copy(own_folder / "mine.ipynb", body)
    code, out, err = run(capsys, "check", "1", "--notebook", path)
    assert (code, err) == (status, "")
    assert out.splitlines() == [f"{path}, in a fresh kernel:", *says]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "1", "--notebook", "x.ipynb"], "course: x.ipynb: no such file"),
        (["check", "12"], "course: no chapter is called '12'"),
    ],
)
def test_what_can_not_be_checked(capsys, arguments, says):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert says in err


# ------------------------------------------------------------------------------------------- slides


def test_the_slides_of_a_chapter(capsys, own_folder):
    status, out, err = run(capsys, "slides", "2", "--out", "mine")
    assert (status, err) == (0, "")
    path, n = out.split("  ")[0], out.split("  ")[1].split()[0]
    assert (own_folder / path).stat().st_size > 300_000
    assert int(n) > 50


def test_slides_of_no_chapter(capsys, own_folder):
    status, out, err = run(capsys, "slides", "12")
    assert (status, out) == (1, "")
    assert "course: no chapter is called '12'" in err
    assert not (own_folder / "slides").exists()
