"""The `course` commands of a class: `student`, `clock`, `check`, `slides`.

    uv run course student --help

As in the room `cli`: each is a function that returns the exit status, and imports what it needs.
"""

import argparse
from pathlib import Path


def add_commands(commands) -> None:
    """Add the commands to those of `course`."""
    student = commands.add_parser("student", help="notebooks with blanks instead of solutions")
    student.add_argument("chapters", nargs="*", metavar="CHAPTER", help="2, ch02, bonus; default: all")
    student.add_argument("--out", default="student", metavar="DIR", help="(default: %(default)s)")
    student.add_argument("--force", action="store_true", help="replace what is there already")
    student.set_defaults(run=run_student)


def run_student(arguments: argparse.Namespace) -> int:
    """Write student editions, and say where they are."""
    from common.student import write

    for path, blanks in write(arguments.chapters, Path(arguments.out), arguments.force):
        print(f"{path}  {blanks} blanks")
    return 0
