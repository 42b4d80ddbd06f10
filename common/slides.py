"""Slides from the same cells: reveal.js by nbconvert, in one file that needs no network.

    uv run course slides 2 --out slides        # open slides/ch02_text_data.html; S: speaker notes

What stands where follows from rules, so that a notebook is written once:

- The heading of a section begins a slide; what follows are sub-slides below it.
- On the slide: what begins in bold, a `**Question:**` wherever it stands, "Guess …", lists, tables,
  diagrams, code, outputs. All other prose is what the teacher says, and becomes speaker notes of
  the slide that is on the screen meanwhile, in the order of the notebook.
- An output that fits under its code appears there at the next key, so that a room can guess first;
  a longer one, and every picture, has the next sub-slide.
- Cells that only import, checks, and solutions are left out: of an exercise, statement and blank.
- The clock (`common.clock`) adds to the notes: when a section begins, the checkpoint at its end,
  and the questions that every class asks. A cell whose `slideshow.slide_type` is `notes` or `skip`,
  as JupyterLab's property inspector sets it, is taken at its word.

Diagrams are drawn if `uv run course fetch mermaid` was run once. Otherwise the paragraph after
each, "In words: …", stands in its place. A slide that is still too full is made smaller in the
browser until it fits 16:9.
"""

import ast
import os
import re
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

from common.assets import AssetUnavailable, fetch
from common.chapters import NotebookError, read, solution_lines, tags, title
from common.clock import OPENING, clock_of
from common.student import blank

FOLDER = Path(__file__).parent / "slide_template"
ROOM = 640  # pixels of a slide that cells may fill, as estimated below
PROSE, CODE = 39, 25  # pixels of a line
SHOWN = re.compile(r"#|\*\*|\||[-*] |\d+\. |```|> |<|    \S")  # how what is shown begins
QUESTION = re.compile(r"\*\*Question:\*\*.*", re.S)
GUESS = re.compile(
    r"(?:(?<=^)|(?<=[.?!:)] ))(?:Guess|Before you run|Draw your guess)\b[^.?!]*[.?!]"
)


def blocks(source: str) -> list[str]:
    """Markdown cut at its blank lines, but not inside ``` fences."""
    found, fenced = [[]], False
    for line in source.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        if line.strip() or fenced:
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def shown_and_said(block: str, diagrams: bool = True) -> tuple[str, str]:
    """What of a paragraph goes on the slide, and what into the notes."""
    if block.startswith(("```mermaid", "In words")) and not diagrams:
        return ("", "") if block.startswith("`") else (block, "")
    if SHOWN.match(block) and not block.startswith(OPENING):
        return block, ""
    if question := QUESTION.search(block):
        return question[0], block[: question.start()].strip()
    guesses = GUESS.findall(block.replace("\n", " "))
    return " ".join(guesses), block


class Deck:
    """Collects cells, each with its place: slide, subslide, fragment, - (goes on), notes."""

    def __init__(self, diagrams: bool):
        self.diagrams = diagrams  # can they be drawn?
        self.cells: list = []
        self.used = ROOM  # pixels of the current sub-slide; full, so that the first cell begins one
        self.shows = ""  # what it shows last: prose, code, output

    def add(self, cell, kind: str, height: float, begin: str = "") -> None:
        """Put a cell on the current sub-slide if there is room, or on a new one."""
        follows = {"prose": "prose", "code": "prose", "output": "code"}[kind] == self.shows
        if begin or not follows or self.used + height > ROOM:
            place, self.used = begin or "subslide", 0.0
        else:
            place = "fragment" if kind == "output" else "-"
        cell.metadata["slideshow"] = {"slide_type": place}
        self.used, self.shows = self.used + height, kind
        self.cells.append(cell)

    def say(self, text: str) -> None:
        """Add to the notes of the current sub-slide."""
        from nbformat.v4 import new_markdown_cell

        if text:
            cell = new_markdown_cell(text, metadata={"slideshow": {"slide_type": "notes"}})
            self.cells.append(cell)

    def markdown(self, source: str) -> None:
        """Show and say what a markdown cell holds."""
        from nbformat.v4 import new_markdown_cell

        for block in blocks(source):
            shown, said = shown_and_said(block, self.diagrams)
            self.say(said)
            if shown:
                begin = "slide" if re.match("##? ", block) else ""
                cell = new_markdown_cell(shown)
                self.add(cell, "prose", height_of_prose(shown), begin)

    def code(self, source: str) -> None:
        """Show a cell's code."""
        from nbformat.v4 import new_code_cell

        self.add(new_code_cell(source), "code", CODE * (source.count("\n") + 1) + 34)

    def output(self, output) -> None:
        """Show one of a cell's outputs."""
        from nbformat.v4 import new_code_cell

        output = deepcopy(output)
        cell = new_code_cell("", outputs=[output], metadata={"transient": {"remove_source": True}})
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        lines = sum(1 + len(line) // 100 for line in text.splitlines())
        picture = "image/png" in output.get("data", {})
        if picture:
            output["metadata"] = {"image/png": {"alt": "what the code before this draws"}}
        self.add(cell, "output", ROOM if picture else CODE * lines + 24)


def height_of_prose(block: str) -> float:
    """Pixels that a block of Markdown takes, about."""
    if block.startswith("#"):
        return 70
    if block.startswith("```"):
        return 300 if block.startswith("```mermaid") else 28 * block.count("\n")
    wide = 110 if block.startswith("|") else 82
    return PROSE * sum(1 + len(line) // wide for line in block.splitlines()) + 14


# ----------------------------------------------------------------------------------------- the deck


def deck_of(notebook, name: str = "notebook", diagrams: bool = True):
    """A notebook of slides from a notebook of the course. Raises NotebookError, with the cell."""
    from nbformat.v4 import new_notebook

    deck, number = Deck(diagrams), None
    starts, ends = _clock_notes(notebook, name)
    for index, cell in enumerate(notebook.cells):
        if index in ends:
            deck.say(ends[index])
        place = cell.metadata.get("slideshow", {}).get("slide_type")
        if place == "skip" or "check" in tags(cell) or _only_imports(cell):
            continue
        if place == "notes":
            deck.say(cell.source)
        elif cell.cell_type == "markdown":
            number = (re.findall(r"\*\*Exercise (\d+\.\d+)\*\*", cell.source) or [number])[-1]
            deck.markdown(cell.source)
        elif "solution" in tags(cell):
            deck.code(_with_blank(cell, number, name, index))
        elif cell.cell_type == "code":
            deck.code(cell.source)
            for output in cell.outputs:
                if output.get("name") != "stderr":
                    deck.output(output)
        if index in starts:
            deck.say(starts[index])
    deck.say(ends.get(len(notebook.cells), ""))
    return new_notebook(cells=deck.cells, metadata=notebook.metadata)


def _clock_notes(notebook, name: str) -> tuple[dict[int, str], dict[int, str]]:
    """{cell: what the clock says when a section begins}, and the same for when it ends."""
    if "course" not in notebook.metadata:
        return {}, {}
    clock, starts, ends = clock_of(notebook, name), {}, {}
    for section in clock.sections:
        begin = clock.begins(section.number)
        minutes = round(section.seconds / 60)
        starts[section.start] = f"**{begin // 3600}:{begin // 60 % 60:02}, {minutes} minutes.**"
        lines = [f"By now: {c['see']}" for c in clock.checkpoints if c["after"] == section.number]
        for entry in clock.questions:
            if entry["section"] == section.number:
                lines.append(f"*{entry['question']}* {entry['answer']}")
        for entry in clock.skip:
            if entry["section"] == section.number:
                saved = f"Late? Saves {entry['minutes']} minutes: {entry['instead']}."
                starts[section.start] += f" {saved}"
        ends[section.stop] = "\n\n".join(lines)
    return starts, ends


def _only_imports(cell) -> bool:
    """A code cell that shows nothing, and does no more than import and set up."""
    if cell.cell_type != "code" or cell.outputs or not re.match("import|from", cell.source):
        return False
    done = [ast.unparse(node) for node in ast.parse(cell.source).body]
    return all(re.match(r"import|from|_ = |\w[\w.]*\(", statement) for statement in done)


def _with_blank(cell, number: str, name: str, index: int) -> str:
    """The source of a solution cell, with a blank for each solution."""
    lines = cell.source.splitlines()
    for begin, end in reversed(solution_lines(cell, name, index)):
        indent = " " * (len(lines[begin]) - len(lines[begin].lstrip()))
        lines[begin : end + 1] = [indent + blank(number)[0].partition(",")[0]]
    return "\n".join(lines)


def html(notebook, name: str = "notebook") -> tuple[str, int]:
    """The slides of a notebook as one HTML page, and how many there are.

    Raises AssetUnavailable without reveal.js.
    """
    from nbconvert import SlidesExporter

    scripts = _scripts()
    slides = deck_of(notebook, name, diagrams=bool(scripts["mermaid_js"]))
    exporter = SlidesExporter(
        extra_template_basedirs=[str(FOLDER.parent)],
        template_name=FOLDER.name,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    page, _ = exporter.from_notebook_node(slides, {"course": {"title": title(notebook), **scripts}})
    begin = ("slide", "subslide")
    return page, sum(cell.metadata["slideshow"]["slide_type"] in begin for cell in slides.cells)


def _scripts() -> dict[str, str]:
    """Everything that goes into the page beside the cells."""
    spec = find_spec("sphinx_revealjs")  # taken for its copy of reveal.js, never imported
    if spec is None:
        raise AssetUnavailable(
            "the slides need reveal.js: `uv sync --group offline` installs the package with it"
        )
    reveal = Path(next(iter(spec.submodule_search_locations)), "_static", "revealjs")
    files = {
        "reveal_css": reveal / "dist" / "reveal.css",
        "reveal_js": reveal / "dist" / "reveal.js",
        "notes_js": reveal / "plugin" / "notes" / "notes.js",
        "css": FOLDER / "slides.css",
        "js": FOLDER / "slides.js",
    }
    texts = {key: file.read_text(encoding="utf8") for key, file in files.items()}
    try:
        texts["mermaid_js"] = fetch("mermaid").read_text(encoding="utf8")
    except AssetUnavailable:
        texts["mermaid_js"] = ""
    return {key: text.replace("</script", r"<\/script") for key, text in texts.items()}


def write(source: Path, out: Path) -> tuple[Path, int]:
    """Write the slides of a notebook into a folder; returns the file, and how many there are."""
    page, n = html(read(source), source.name)
    target = out / f"{source.stem}.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".html.tmp")
        temporary.write_text(page, encoding="utf8")
        os.replace(temporary, target)
    except OSError as error:
        raise NotebookError(f"{target} can't be written ({error.strerror})") from None
    return target, n
