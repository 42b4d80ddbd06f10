"""The notebooks of the course: which there are, their sections, their exercises.

    notebook = read(find_notebook("2"))        # also "ch02", "ch02_text_data", "bonus", a path
    for exercise in exercises(notebook): print(exercise.number, exercise.minutes)

An exercise is a statement ("**Exercise 2.1** (5 minutes, ●○○)"), a cell tagged `solution` with
`### BEGIN SOLUTION` and `### END SOLUTION` around the lines that a learner writes, and a cell
tagged `check` whose assertions say what is wrong. The markers are those of nbgrader.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from common.checks import PROJECT

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
HEADING = re.compile(
    r"## (?P<number>\d+\.\d+) (?P<title>.+?)(?:  \((?P<time>[\d:]+)( minutes?.*)?\))?"
)
EXERCISE = re.compile(r"\*\*Exercise (\d+\.\d+)\*\* \((\d+) minutes?, ([●○]+)\)")


class NotebookError(Exception):
    """A notebook is not as it should be. The message is one line: where, what, what to do."""


@dataclass(frozen=True)
class Section:
    """A part of a notebook, under a heading such as `## 2.4 Byte pairs  (15 minutes)`."""

    number: str
    title: str
    seconds: int | None  # of the video; None where the heading gives no time
    start: int  # index of the cell with the heading
    stop: int  # index after its last cell


@dataclass(frozen=True)
class Exercise:
    """What belongs to one exercise: indices of its cells."""

    number: str
    minutes: int
    difficulty: str  # ●○○ to ●●●
    statement: int
    solution: int
    check: int


# --------------------------------------------------------------------------------- finding, reading


def notebooks(root: Path = PROJECT) -> dict[str, Path]:
    """All notebooks under `root` by name, in the order of the chapters."""
    return {path.stem: path for path in sorted(root.glob("ch0*/*.ipynb"))}


def find_notebook(word: str, root: Path = PROJECT) -> Path:
    """The notebook that `word` means: "2", "ch02", its name, "bonus", or the path of a file.

    Raises NotebookError, with what there is, if none or more than one is meant.
    """
    if word.endswith(".ipynb"):
        if not Path(word).is_file():
            raise NotebookError(f"{word}: no such file")
        return Path(word)
    known = notebooks(root)
    if word in known:
        return known[word]
    start = f"ch{int(word):02}_" if word.isdecimal() else word
    meant = [path for name, path in known.items() if start and name.startswith(start)]
    if len(meant) == 1:
        return meant[0]
    near = get_close_matches(word, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise NotebookError(f"no chapter is called '{word}': {hint}")


def read(path: Path):
    """The notebook in a file, as nbformat's object. Raises NotebookError if it holds none."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise NotebookError(f"{path} can't be read ({error.strerror})") from None
    except (ValueError, TypeError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotebookError(f"{path} is no notebook ({reason})") from None


def save(notebook, path: Path) -> None:
    """Write a notebook in one step, after validation."""
    import nbformat

    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf8", newline="\n")
    os.replace(temporary, path)


def tags(cell) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", ()))


def title(notebook) -> str:
    """The notebook's title, from its first line: "2 · Working with text data"."""
    return notebook.cells[0].source.partition("\n")[0].removeprefix("# ")


def seconds(time: str) -> int:
    """Seconds in "12" minutes, "0:40" (minutes, seconds) or "1:28:01" (hours, too)."""
    parts = [int(part) for part in time.split(":")]
    parts = [0, *parts, 0][-3:] if len(parts) == 1 else [0, *parts][-3:]
    return 3600 * parts[0] + 60 * parts[1] + parts[2]


# ------------------------------------------------------------------------------ sections, exercises


def sections(notebook) -> list[Section]:
    """The sections of a notebook, from its headings; the last one ends where `## What …` begins."""
    found = []
    for index, cell in enumerate(notebook.cells):
        for line in cell.source.splitlines() if cell.cell_type == "markdown" else ():
            if match := HEADING.fullmatch(line):
                found.append((index, match))
    ends = [*(index for index, _ in found[1:]), len(notebook.cells)]
    return [
        Section(m["number"], m["title"], seconds(m["time"]) if m["time"] else None, start, stop)
        for (start, m), stop in zip(found, ends, strict=True)
    ]


def exercises(notebook, name: str = "notebook") -> list[Exercise]:
    """The exercises of a notebook, in order.

    Raises NotebookError, with the cell, where a statement has no solution cell and no check, or the
    other way round, and where a marker is unbalanced.
    """
    found, open_one = [], None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for match in EXERCISE.finditer(cell.source):
                if open_one:
                    raise NotebookError(f"{name}, cell {index}: {_unfinished(open_one)}")
                open_one = {"number": match[1], "minutes": int(match[2]), "difficulty": match[3]}
                open_one["statement"] = index
            continue
        for kind in ("solution", "check"):
            if kind in tags(cell):
                if not open_one or kind in open_one:
                    raise NotebookError(f"{name}, cell {index}: a {kind} without an exercise")
                open_one[kind] = index
        solution_lines(cell, name, index)
        if open_one and {"solution", "check"} <= open_one.keys():
            found.append(Exercise(**open_one))
            open_one = None
    if open_one:
        raise NotebookError(f"{name}: {_unfinished(open_one)}")
    return found


def _unfinished(one: dict) -> str:
    missing = [kind for kind in ("solution", "check") if kind not in one]
    return f"Exercise {one['number']} has no cell tagged {' and none tagged '.join(missing)}"


def solution_lines(cell, name: str, index: int) -> list[tuple[int, int]]:
    """(line of BEGIN, line of END) for each solution in a cell, from 0.

    Raises NotebookError for a marker without its partner, and in a cell not tagged `solution`.
    """
    marks = [(n, line.strip()) for n, line in enumerate(cell.source.splitlines())]
    marks = [(n, line) for n, line in marks if "BEGIN SOLUTION" in line or "END SOLUTION" in line]
    expected = [BEGIN, END] * (len(marks) // 2 + 1)
    where = f"{name}, cell {index}"
    for (n, line), wanted in zip(marks, expected, strict=False):
        if line != wanted:
            raise NotebookError(f"{where}, line {n + 1}: '{wanted}' belongs here, not '{line}'")
    if len(marks) % 2:
        raise NotebookError(f"{where}: '{BEGIN}' on line {marks[-1][0] + 1} has no '{END}'")
    if bool(marks) != ("solution" in tags(cell)):
        what = "solution markers, but no tag `solution`" if marks else f"no '{BEGIN}'"
        raise NotebookError(f"{where} has {what}")
    return [(first[0], last[0]) for first, last in list(pairwise(marks))[::2]]
