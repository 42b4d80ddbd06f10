"""The `course` commands of a class: `student`, `clock`, `check`, `slides`.

    uv run course student --help

As in the room `cli`: each is a function that returns the exit status, and imports what it needs.
"""

import argparse
from datetime import datetime
from pathlib import Path


def add_commands(commands) -> None:
    """Add the commands to those of `course`."""
    student = commands.add_parser("student", help="notebooks with blanks instead of solutions")
    student.add_argument(
        "chapters", nargs="*", metavar="CHAPTER", help="2, ch02, bonus; default: all"
    )
    student.add_argument("--out", default="student", metavar="DIR", help="(default: %(default)s)")
    student.add_argument("--force", action="store_true", help="replace what is there already")
    student.set_defaults(run=run_student)

    clock = commands.add_parser("clock", help="the run of show of a chapter")
    clock.add_argument("chapter", metavar="CHAPTER", help="2, ch02, bonus")
    clock.add_argument("--start", default="0:00", type=time_of_day, metavar="H:MM", help="14:00")
    clock.set_defaults(run=run_clock)

    check = commands.add_parser("check", help="which exercises of your own copy pass, with hints")
    check.add_argument("chapter", metavar="CHAPTER", help="2, or 2.3: only as far as that exercise")
    check.add_argument("--notebook", metavar="PATH", help="default: in student/, or the chapter's")
    check.add_argument(
        "--timeout", type=int, default=300, metavar="S", help="for a cell (default: %(default)s s)"
    )
    check.set_defaults(run=run_check)

    slides = commands.add_parser("slides", help="reveal.js slides in one file, with speaker notes")
    slides.add_argument("chapter", metavar="CHAPTER", help="2, ch02, bonus")
    slides.add_argument("--out", default="slides", metavar="DIR", help="(default: %(default)s)")
    slides.set_defaults(run=run_slides)


def time_of_day(text: str) -> str:
    """For argparse: "14:00" as it is. Raises ValueError for what is no time."""
    datetime.strptime(text, "%H:%M")
    return text


def run_student(arguments: argparse.Namespace) -> int:
    """Write student editions, and say where they are."""
    from common.student import write

    for path, blanks in write(arguments.chapters, Path(arguments.out), arguments.force):
        print(f"{path}  {blanks} blanks")
    return 0


def run_clock(arguments: argparse.Namespace) -> int:
    """Print when each section begins, where all should be by then, and what to leave out."""
    from common.chapters import find_notebook, read
    from common.clock import clock_of, table

    path = find_notebook(arguments.chapter)
    print(table(clock_of(read(path), path.name), arguments.start))
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    """Run the checks, and report each when it is done. 1 unless all pass."""
    from common.chapters import find_notebook, read
    from common.progress import PASSES, line, own_copy, run_checks, summary

    chapter, _, exercise = arguments.chapter.partition(".")
    until = arguments.chapter if exercise.isdecimal() else None
    path = find_notebook(arguments.notebook) if arguments.notebook else own_copy(chapter)
    notebook = read(path)
    print(f"{path}, in a fresh kernel:", flush=True)
    results = []
    for result in run_checks(notebook, path.name, path.resolve().parent, until, arguments.timeout):
        print(line(result), flush=True)
        results.append(result)
    print(summary(results))
    return int(any(result.status != PASSES for result in results))


def run_slides(arguments: argparse.Namespace) -> int:
    """Write the slides of a chapter."""
    from common.chapters import find_notebook
    from common.slides import write

    path, n = write(find_notebook(arguments.chapter), Path(arguments.out))
    print(f"{path}  {n} slides; in a browser, S opens the speaker's notes, ? lists all keys")
    return 0
