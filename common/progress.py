"""How far a learner has come: the checks of all exercises, run on their own copy of a notebook.

    uv run course check 2            # student/ch02_text_data/…, or the chapter's own notebook
    uv run course check 2.3          # only as far as that exercise
    uv run course check 2 --notebook mine.ipynb

A check says itself what is wrong: its assertion's message is the hint, and all that is shown of it.

All cells up to the last check are run, in their order, in a fresh kernel: there is no safe way to
leave some out. (A cell can be needed for what it changes, not only for what it defines. Following
every name that a check could depend on, one ends up with 59 of 70 cells in chapter 5, 60 of 63 in
chapter 3.) Results are reported as soon as they are known.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL

from common.chapters import EXERCISE, NotebookError, find_notebook, tags
from common.checks import PROJECT

PASSES, NOT_YET, NO, ERROR = "passes", "not yet", "no", "error"


@dataclass(frozen=True)
class Result:
    """What one check said."""

    number: str
    status: str  # passes; not yet: still blank; no: the check complains; error: something else
    hint: str = ""  # one line


def own_copy(chapter: str) -> Path:
    """The notebook that a learner works on: in the folder `student`, if there, or the chapter's."""
    path = find_notebook(chapter)
    if path.resolve().parent.parent == PROJECT:
        for folder in (Path.cwd(), PROJECT):
            copy = folder / "student" / path.parent.name / path.name
            if copy.is_file():
                return copy
    return path


def numbered_checks(notebook, name: str) -> dict[int, str]:
    """Index of every check cell, and the number of the exercise that it belongs to.

    Looser than `common.chapters.exercises`: learners split cells and move things about. Raises
    NotebookError if there is no check at all.
    """
    found, number = {}, None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            number = [match[1] for match in EXERCISE.finditer(cell.source)][-1:] or number
        elif "check" in tags(cell) and number:
            found[index] = number[0]
    if not found:
        raise NotebookError(f"{name} has no exercises with checks: is it a notebook of the course?")
    return found


def run_checks(
    notebook, name: str, folder: Path, until: str | None = None, timeout: int = 300
) -> Iterator[Result]:
    """Run a notebook in a fresh kernel, in `folder`; yields a Result after every check.

    Goes as far as exercise `until`; `timeout` is in seconds for a cell. Raises NotebookError if the
    kernel can't be started or dies, and for an exercise that is not there.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    checks = numbered_checks(notebook, name)
    if until and until not in checks.values():
        raise NotebookError(
            f"{name} has no exercise {until}: there are {', '.join(checks.values())}"
        )
    last = max(index for index, number in checks.items() if until in (None, number))
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        allow_errors=True,
        interrupt_on_timeout=True,
        resources={"metadata": {"path": str(folder)}},
    )
    earlier = ""  # what went wrong since the last check
    index = 0
    try:
        with client.setup_kernel(stderr=DEVNULL):  # its own log; cells print through messages
            for index, cell in enumerate(notebook.cells[: last + 1]):
                complaint = _run(client, cell, index, timeout)
                if index in checks:
                    yield _result(checks[index], complaint, earlier)
                    earlier = ""
                elif complaint and not earlier:
                    earlier = f"{complaint} (in cell {index})"
    except DeadKernelError:
        raise NotebookError(
            f"{name}, cell {index}: the kernel died; is there enough memory?"
        ) from None


def _run(client, cell, index: int, timeout: int) -> str:
    """Run one cell; returns "NameOfError: first line of its message", or nothing."""
    if cell.cell_type != "code":
        return ""
    client.execute_cell(cell, index)
    for output in cell.outputs:
        if output.output_type == "error":
            if output.ename == "KeyboardInterrupt":
                return f"TimeoutError: stopped after {timeout} s; does it ever end?"
            return f"{output.ename}: {output.evalue.strip().partition(chr(10))[0]}"
    return ""


def _result(number: str, complaint: str, earlier: str) -> Result:
    """The check's complaint, and what went wrong in a cell before it, as one result."""
    if not complaint:
        return Result(number, PASSES)
    for said in (earlier, complaint):
        if re.match(r"NotImplementedError: Exercise \S+ is still blank", said):
            return Result(number, NOT_YET)
    if complaint.startswith("AssertionError: ") and not earlier:
        return Result(number, NO, complaint.removeprefix("AssertionError: "))
    return Result(number, ERROR, earlier or complaint)


def line(result: Result) -> str:
    """A result as it is printed."""
    return f"  {result.number:5} {result.status}{': ' + result.hint if result.hint else ''}"


def summary(results: list[Result]) -> str:
    """How many pass, of how many that were run."""
    passed, blank = (sum(r.status == status for r in results) for status in (PASSES, NOT_YET))
    blanks = f", {blank} still blank" if blank else ""
    return f"{passed} of {len(results)} pass{blanks}."
