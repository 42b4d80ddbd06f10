"""Notebooks found by what people type, their sections and exercises; one line where they err."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common.chapters import (
    BEGIN,
    END,
    NotebookError,
    exercises,
    find_notebook,
    notebooks,
    read,
    save,
    seconds,
    sections,
    solution_lines,
    title,
)

ALL = notebooks()


def statement(number="1.1"):
    return new_markdown_cell(f"**Exercise {number}** (5 minutes, ●●○). Add.")


def solution(text=f"def add(a, b):\n    {BEGIN}\n    return a + b\n    {END}"):
    return new_code_cell(text, metadata={"tags": ["solution"]})


def check():
    return new_code_cell("assert add(1, 2) == 3", metadata={"tags": ["check"]})


# ----------------------------------------------------------------------------------------- finding


@pytest.mark.parametrize("name", ALL)
def test_every_notebook_is_found_by_its_name_and_its_path(name):
    assert find_notebook(name) == find_notebook(str(ALL[name])) == ALL[name]
    assert title(read(ALL[name]))[0] in "1234567B"


def test_a_number_or_a_beginning_will_do():
    assert find_notebook("2").stem == find_notebook("02").stem == find_notebook("ch02").stem
    assert find_notebook("2").stem == "ch02_text_data"
    assert find_notebook("bonus").stem == "bonus_since_gpt2"


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("9", "no chapter is called '9': there are .*ch01_setup"),
        ("ch", "no chapter is called 'ch'"),
        ("", "no chapter is called ''"),
        ("ch02_txt_data", "did you mean ch02_text_data?"),
        ("nowhere.ipynb", "nowhere.ipynb: no such file"),
    ],
)
def test_what_is_not_there(word, says):
    with pytest.raises(NotebookError, match=says) as caught:
        find_notebook(word)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": 1}', "not json", '{"nbformat": 99}'])
def test_a_file_that_is_no_notebook_is_one_line(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text, encoding="utf8")
    with pytest.raises(NotebookError, match=r"x\.ipynb is no notebook \(") as caught:
        read(tmp_path / "x.ipynb")
    assert "\n" not in str(caught.value)
    with pytest.raises(NotebookError, match="can't be read"):
        read(tmp_path)


def test_saved_in_one_step_and_read_again(tmp_path):
    notebook = new_notebook(cells=[statement(), solution(), check()])
    save(notebook, tmp_path / "deep" / "x.ipynb")
    assert read(tmp_path / "deep" / "x.ipynb") == notebook
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.ipynb"]


# ------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("time", "expected"), [("12", 720), ("0:40", 40), ("1:28:01", 5281), ("0:21:01", 1261)]
)
def test_times(time, expected):
    assert seconds(time) == expected


def test_sections_follow_the_headings():
    texts = ["# 1 · T", "## 1.1 One  (3 minutes of the video)\n\nText.", "x", "## What is 1.5"]
    texts += ["## 1.2 Two\n\n### 1.3 no", "## 1.10 Ten  (0:40 minutes)"]
    notebook = new_notebook(cells=[new_markdown_cell(text) for text in texts])
    found = [(s.number, s.title, s.seconds, s.start, s.stop) for s in sections(notebook)]
    assert found == [
        ("1.1", "One", 180, 1, 4),
        ("1.2", "Two", None, 4, 5),
        ("1.10", "Ten", 40, 5, 6),
    ]


@pytest.mark.parametrize("name", ALL)
def test_exercises_are_numbered_in_order_and_report_under_their_number(name):
    notebook = read(ALL[name])
    found = exercises(notebook, name)
    chapter = found[0].number.partition(".")[0]
    assert [e.number for e in found] == [f"{chapter}.{n}" for n in range(1, len(found) + 1)]
    for exercise in found:
        assert exercise.statement < exercise.solution < exercise.check
        text = notebook.cells[exercise.check].source
        assert re.findall(r"Exercise (\d+\.\d+)", text) == [exercise.number]


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ([statement(), solution()], "Exercise 1.1 has no cell tagged check"),
        ([statement()], "Exercise 1.1 has no cell tagged solution and none tagged check"),
        ([statement(), statement("1.2")], "cell 1: Exercise 1.1 has no cell tagged solution"),
        ([solution(), check()], "cell 0: a solution without an exercise"),
        ([statement(), check(), check()], "cell 2: a check without an exercise"),
        ([new_code_cell(f"{BEGIN}\n{END}")], "cell 0 has solution markers, but no tag `solution`"),
        ([statement(), solution("x = 1"), check()], "cell 1 has no '### BEGIN SOLUTION'"),
        ([statement(), solution(BEGIN), check()], "'### BEGIN SOLUTION' on line 1 has no '### END"),
        ([statement(), solution(f"x\n{END}")], "cell 1, line 2: '### BEGIN SOLUTION' belongs here"),
        (
            [statement(), solution(f"{BEGIN}\n{BEGIN}\n{END}")],
            "line 2: '### END SOLUTION' belongs here, not '### BEGIN SOLUTION'",
        ),
        (
            [statement(), solution(f"{BEGIN}\n{END}\n{END}")],
            "line 3: '### BEGIN SOLUTION' belongs here",
        ),
        ([statement(), solution(f"#{BEGIN}\n{END}")], "not '#### BEGIN SOLUTION'"),
    ],
)
def test_what_is_unbalanced_is_named_with_its_cell(cells, says):
    with pytest.raises(NotebookError, match=re.escape(says)) as caught:
        exercises(new_notebook(cells=cells), "x.ipynb")
    assert str(caught.value).startswith("x.ipynb")
    assert "\n" not in str(caught.value)


def test_lines_of_solutions():
    cell = solution(f"{BEGIN}\na\n{END}\nb\n  {BEGIN}\n  {END}")
    assert solution_lines(cell, "x.ipynb", 0) == [(0, 2), (4, 5)]
    assert solution_lines(new_code_cell("a"), "x.ipynb", 0) == []
