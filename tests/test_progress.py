"""Checks run on a learner's own copy: what passes, what is blank, hints that give no answer."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common import progress
from common.chapters import NotebookError, notebooks, read, save
from common.progress import (
    ERROR,
    NO,
    NOT_YET,
    PASSES,
    Result,
    line,
    numbered_checks,
    own_copy,
    run_checks,
    summary,
)
from common.student import blank, student_edition

FUNCTION = "def add_{n}(a, b):\n    {body}"


def exercise(n, body):
    """Statement, learner's cell, check."""
    return [
        new_markdown_cell(f"**Exercise 1.{n}** (5 minutes, ●●○). Add."),
        new_code_cell(FUNCTION.format(n=n, body=body), metadata={"tags": ["solution"]}),
        new_code_cell(
            f"assert add_{n}(1, 2) == 3, 'both numbers count\\nand more'",
            metadata={"tags": ["check", "raises-exception"]},
        ),
    ]


def copy(*bodies, first="import os"):
    cells = [new_markdown_cell("# 1 · T"), new_code_cell(first)]
    for n, body in enumerate(bodies, 1):
        cells += exercise(n, body)
    return new_notebook(cells=[*cells, new_code_cell("raise SystemExit('after the last check')")])


def results(notebook, tmp_path, **options):
    return list(run_checks(notebook, "x.ipynb", tmp_path, **options))


def test_every_kind_of_answer_in_one_run(tmp_path):
    BLANK = "\n    ".join(blank("1.2"))
    found = results(
        copy("return a + b", BLANK, "return a", "return c", "return (", "while True: pass"),
        tmp_path, timeout=2,
    )  # fmt: skip
    assert found[:4] == [
        Result("1.1", PASSES),
        Result("1.2", NOT_YET),
        Result("1.3", NO, "both numbers count"),
        Result("1.4", ERROR, "NameError: name 'c' is not defined"),
    ]
    assert (found[4].number, found[4].status) == ("1.5", ERROR)
    assert re.match(r"SyntaxError: .*\(in cell 15\)", found[4].hint)
    assert found[5] == Result("1.6", ERROR, "TimeoutError: stopped after 2 s; does it ever end?")
    assert summary(found) == "1 of 6 pass, 1 still blank."
    assert [line(result) for result in found[:3]] == [
        "  1.1   passes",
        "  1.2   not yet",
        "  1.3   no: both numbers count",
    ]


def test_an_error_elsewhere_is_named_with_its_cell_only_where_the_check_fails(tmp_path):
    found = results(copy("return a + b", "return a + b + d", first="d = missing"), tmp_path)
    assert found == [
        Result("1.1", PASSES),
        Result("1.2", ERROR, "NameError: name 'd' is not defined"),
    ]
    notebook = copy("return a + d", first="d = missing")
    assert (
        results(notebook, tmp_path)[0].hint
        == "NameError: name 'missing' is not defined (in cell 1)"
    )


def test_as_far_as_one_exercise_in_the_notebooks_own_folder(tmp_path):
    (tmp_path / "here.txt").touch()
    notebook = copy("return a + b", "return a", first="open('here.txt').close()")
    assert results(notebook, tmp_path, until="1.1") == [Result("1.1", PASSES)]
    assert summary([Result("1.1", PASSES)]) == "1 of 1 pass."
    with pytest.raises(NotebookError, match=r"x\.ipynb has no exercise 1\.7: there are 1\.1, 1\.2"):
        results(notebook, tmp_path, until="1.7")


def test_a_kernel_that_dies_is_one_line(tmp_path):
    notebook = copy("import os; os._exit(1)")
    with pytest.raises(NotebookError, match=r"x\.ipynb, cell 4: the kernel died"):
        results(notebook, tmp_path)


def test_cells_that_a_learner_has_split_or_moved():
    one, two = exercise(1, "pass"), exercise(2, "pass")
    cells = [*one[:2], one[1], new_markdown_cell("note"), one[2], two[0], two[2], two[2], two[1]]
    cells = [type(cell)(cell, id=str(n)) for n, cell in enumerate(cells)]
    assert numbered_checks(new_notebook(cells=cells), "x") == {4: "1.1", 6: "1.2", 7: "1.2"}
    with pytest.raises(NotebookError, match="x has no exercises with checks"):
        numbered_checks(new_notebook(cells=[new_code_cell("1")]), "x")


def test_the_learners_own_copy_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "find_notebook", lambda word: notebooks()["ch01_setup"])
    assert own_copy("1") == notebooks()["ch01_setup"]
    mine = tmp_path / "student" / "ch01_setup" / "ch01_setup.ipynb"
    save(student_edition(read(notebooks()["ch01_setup"])), mine)
    assert own_copy("1") == mine


@pytest.mark.parametrize("name", notebooks())
def test_checks_of_student_editions_are_those_of_the_instructor(name):
    instructor = read(notebooks()[name])
    numbers = [*numbered_checks(instructor, name).values()]
    assert [*numbered_checks(student_edition(instructor), name).values()] == numbers
    assert len(numbers) == len(set(numbers)) >= 6
