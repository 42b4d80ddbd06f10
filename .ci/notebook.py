"""Build, clean and look at notebooks. They are written as text and committed executed.

    uv run jupytext --to py:percent NOTEBOOK.ipynb -o TEXT.py             text to edit
    uv run python .ci/notebook.py build TEXT.py NOTEBOOK.ipynb            execute it, tidy, save
    uv run python .ci/notebook.py clean NOTEBOOK.ipynb                    tidy what Jupyter saved
    uv run python .ci/notebook.py html NOTEBOOK.ipynb -o FOLDER           a page to read
    uv run python .ci/notebook.py clock NOTEBOOK.ipynb CLOCK.toml         its run of show

`build` executes in a fresh kernel, in the notebook's own folder, and replaces the target only when
every cell ran. `clean` keeps what a reader or the replay needs (sources, outputs, tags) and drops
what differs from machine to machine.
"""

import argparse
import os
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor

from common.clock import wind

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Tidy `notebook` in place: numbered ids, minimal metadata, joined streams."""
    course = notebook.metadata.get("course")
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    if course:
        notebook.metadata["course"] = course
        wind(notebook)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03}"
        kept = {k: cell.metadata[k] for k in ("tags", "slideshow", "jupyter") if k in cell.metadata}
        cell.metadata = kept
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for output in cell.outputs:
                output.pop("metadata", None) if output.output_type == "stream" else None
    return notebook


def merge_streams(outputs: list) -> list:
    """Join neighbouring outputs of one stream; of a progress bar keep what the screen ends with."""
    merged: list = []
    for output in outputs:
        if output.output_type == "stream" and merged and merged[-1].get("name") == output.name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    for output in merged:
        if output.output_type == "stream" and output.name == "stderr":
            lines = output.text.split("\n")
            output.text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines)
    blank = lambda output: output.get("name") == "stderr" and not output.text.strip()
    return [output for output in merged if not blank(output)]  # a bar that has left


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write `notebook` to `path` in one step."""
    nbformat.validate(notebook)
    temporary = path.with_suffix(".ipynb.tmp")
    temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf8", newline="\n")
    os.replace(temporary, path)


def build(source: Path, target: Path, timeout: int) -> None:
    """Execute the percent script `source` into the notebook `target`; stop where a cell fails."""
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = KERNEL
    if target.exists() and "course" in (stored := nbformat.read(target, as_version=4).metadata):
        notebook.metadata.setdefault("course", stored["course"])  # text carries no clock
    folder = {"metadata": {"path": str(target.resolve().parent)}}
    try:
        ExecutePreprocessor(timeout=timeout).preprocess(notebook, folder)
    except CellExecutionError as error:
        sys.exit(f"{source}: a cell failed, {target} is untouched\n{error}")
    save(clean(notebook), target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument("source", type=Path)
    command.add_argument("target", type=Path)
    command.add_argument("--timeout", type=int, default=300, help="seconds a cell may take")
    command = commands.add_parser("clean")
    command.add_argument("notebook", type=Path, nargs="+")
    command = commands.add_parser("html")
    command.add_argument("notebook", type=Path)
    command.add_argument("-o", "--out", type=Path, default=Path("."))
    command = commands.add_parser("clock")
    command.add_argument("notebook", type=Path)
    command.add_argument("clock", type=Path)
    args = parser.parse_args()
    if args.command == "build":
        build(args.source, args.target, args.timeout)
    elif args.command == "clean":
        for path in args.notebook:
            save(clean(nbformat.read(path, as_version=4)), path)
    elif args.command == "clock":
        notebook = nbformat.read(args.notebook, as_version=4)
        notebook.metadata["course"] = tomllib.loads(args.clock.read_text(encoding="utf8"))
        save(clean(notebook), args.notebook)
    else:
        body, _ = HTMLExporter().from_filename(str(args.notebook))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.notebook.stem}.html").write_text(body, encoding="utf8")


if __name__ == "__main__":
    main()
