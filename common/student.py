"""The student edition: the same notebooks, with blanks where the solutions of the exercises stand.

    uv run course student --out student          # every chapter
    uv run course student 2 3 --out student

Between the markers `# your code` is left, and a line that raises NotImplementedError: the check
below runs into exactly that until the learner has written something. Outputs are cleared, folded
cells are open. All else is the instructor's, cell for cell; only a note on how to work with blanks
comes after the opening.

A blank breaks nothing but its own check. No other cell may use what an exercise defines (`leaning`
finds one that does; what is needed later is imported from `common`), and checks are tagged
`raises-exception`, at which Jupyter shows the error and goes on. So whoever is late clicks on the
section that the class is in and chooses *Run All Above Selected Cell*.

The markers are nbgrader's, so the notebooks can be graded by it. Its preprocessor ClearSolutions is
not used: with nbgrader come a second notebook server, a database and its migrations, in all 14
packages more than the course has, and it lets an END without its BEGIN pass. What both are built on
is nbconvert's `Preprocessor`, which is here with JupyterLab.
"""

import ast
import symtable
from copy import deepcopy
from pathlib import Path

from common.chapters import (
    Exercise,
    NotebookError,
    exercises,
    find_notebook,
    notebooks,
    read,
    save,
    solution_lines,
)

NOTE = """\
**This is the student edition.** In {n} cells, under `# your code`, the lines are yours to write.
The check below each says what is not right yet, and `uv run course check {chapter}` how far you
are.

**Stuck, late, or back after a break?** No other cell needs an exercise. Click on the heading of the
section you want to go on with, and choose *Run → Run All Above Selected Cell*: the checks of blanks
report them, everything else runs."""


def blank(number: str) -> list[str]:
    """The lines that a learner replaces."""
    return [
        "# your code, in place of the next line",
        f'raise NotImplementedError("Exercise {number} is still blank")',
    ]


def student_edition(notebook, name: str = "notebook"):
    """A copy of an instructor's notebook, with blanks. Raises NotebookError, with the cell."""
    from nbconvert.preprocessors import ClearOutputPreprocessor
    from nbformat.v4 import new_markdown_cell

    edition, found = deepcopy(notebook), exercises(notebook, name)
    if leans := leaning(notebook, found):
        index, used, number = leans[0]
        raise NotebookError(
            f"{name}, cell {index} uses `{used}`, which only Exercise {number} defines: with a "
            "blank there it fails; import it from `common`, or define it before"
        )
    edition.metadata.pop("course", None)  # the instructor's clock
    for exercise in found:
        _empty(edition.cells[exercise.solution], exercise.number, name, exercise.solution)
        _mark(edition.cells[exercise.check])
    edition, _ = ClearOutputPreprocessor().preprocess(edition, {})
    for cell in edition.cells:
        cell.metadata.pop("jupyter", None)
    if found:
        chapter = found[0].number.partition(".")[0]
        note = new_markdown_cell(NOTE.format(n=len(found), chapter=chapter), id="student-edition")
        edition.cells.insert(1, note)
    return edition


def _empty(cell, number: str, name: str, index: int) -> None:
    """Put a blank in the place of each solution."""
    lines = cell.source.splitlines()
    for begin, end in reversed(solution_lines(cell, name, index)):
        indent = lines[begin][: len(lines[begin]) - len(lines[begin].lstrip())]
        lines[begin : end + 1] = [indent + line for line in blank(number)]
        if not indent:
            _mark(cell)  # outside a function, the blank itself is what raises
    cell.source = "\n".join(lines)


def _mark(cell) -> None:
    """An error in this cell is shown and stops nothing, in Jupyter as in nbclient."""
    cell.metadata["tags"] = [*cell.metadata.get("tags", ()), "raises-exception"]


def write(words: list[str], out: Path, force: bool = False) -> list[tuple[Path, int]]:
    """Write the student editions of `words` (all, if empty) under `out`, in the course's folders.

    Returns the files and how many blanks each has. Raises NotebookError before anything is written
    if a notebook can't be made, and where a learner's work may be overwritten: `force` replaces it,
    but never the notebook that the edition is made from.
    """
    sources = [find_notebook(word) for word in words] or [*notebooks().values()]
    editions = {}
    for source in sources:
        target = out / source.resolve().parent.name / source.name
        if target.exists() and target.resolve() == source.resolve():
            raise NotebookError(f"{target} is the instructor's notebook: name another folder")
        if target.exists() and not force:
            raise NotebookError(
                f"{target} is there already, perhaps with somebody's work in it: name another "
                "folder, or replace it by --force"
            )
        notebook = read(source)
        editions[target] = student_edition(notebook, source.name), len(exercises(notebook))
    for target, (edition, _) in editions.items():
        try:
            save(edition, target)
        except OSError as error:
            raise NotebookError(f"{target} can't be written ({error.strerror})") from None
    return [(target, n) for target, (_, n) in editions.items()]


# ------------------------------------------------------------------------ what leans on an exercise


def leaning(notebook, found: list[Exercise]) -> list[tuple[int, str, str]]:
    """(cell, name, exercise) where a cell outside the exercises uses what only they define.

    Imports in a check don't count: they run whatever is blank. What is inside of objects can't be
    seen here; the replay of the student edition is for that.
    """
    owner = {e.solution: e.number for e in found} | {e.check: e.number for e in found}
    defined_by: dict[str, str] = {}  # a name, and the exercise that was the last to bind it
    leans = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        needs, binds, imports = _names(_as_python(cell.source))
        if index in owner:
            defined_by |= dict.fromkeys(binds - imports, owner[index])
        else:
            leans += [(index, name, defined_by[name]) for name in sorted(needs & {*defined_by})]
            binds |= imports
            defined_by = {name: n for name, n in defined_by.items() if name not in binds}
    return leans


def _as_python(source: str) -> str:
    """A cell without IPython's own syntax (%magics, !commands)."""
    from IPython.core.inputtransformer2 import TransformerManager

    return TransformerManager().transform_cell(source)


def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Names that a cell needs from before, those that it binds, and the imported ones of these."""
    needs, binds, imports = set(), set(), set()
    for statement in ast.parse(source).body:
        table = symtable.symtable(ast.unparse(statement), "cell", "exec")
        symbols = table.get_symbols()
        new = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
        new |= {s.get_name() for s in symbols if s.is_namespace()}
        used = {s.get_name() for s in symbols if s.is_referenced()} | _globals_inside(table)
        used |= new if isinstance(statement, ast.AugAssign) else set()
        # `for x in ...: print(x)` binds x before it uses it, `x = f(x)` after.
        binds_first = not isinstance(statement, (ast.Assign, ast.AugAssign, ast.Expr))
        needs |= used - binds - (new if binds_first else set())
        imports |= {s.get_name() for s in symbols if s.is_imported()}
        binds |= new
    return needs, binds, imports


def _globals_inside(table: symtable.SymbolTable) -> set[str]:
    """Names of the cell that its functions, classes and comprehensions use."""
    names = set()
    for child in table.get_children():
        names |= {s.get_name() for s in child.get_symbols() if s.is_global()}
        names |= _globals_inside(child)
    return names
