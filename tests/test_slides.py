"""Slides: what stands on them, what goes into the notes, and that a screen of 16:9 holds it all.

    uv run pytest tests/test_slides.py

What fits is measured in Chromium, slide by slide; without one on the machine that is skipped.
"""

import re

import pytest
from browser import page
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from common import slides
from common.assets import AssetUnavailable
from common.chapters import BEGIN, END, notebooks, read
from common.slides import blocks, deck_of, html, shown_and_said, write


def kinds(notebook, **options):
    """(slide type, source or text of the output) of every cell of a deck."""
    cells = deck_of(notebook, **options).cells
    text = lambda cell: cell.source or (cell.outputs[0].get("text") or "picture").strip()
    return [(cell.metadata["slideshow"]["slide_type"], text(cell)) for cell in cells]


def code(source, *texts, **metadata):
    outputs = [new_output("stream", name="stdout", text=text) for text in texts]
    return new_code_cell(source, outputs=outputs, metadata=metadata)


def notebook_of(*cells):
    return new_notebook(cells=[new_markdown_cell("# 1 · T\n\nHello."), *cells])


# ---------------------------------------------------------------------------------------- the rules


def test_markdown_is_cut_at_blank_lines_outside_fences():
    assert blocks("a\nb\n\n\nc\n```\nd\n\ne\n```\n\nf") == ["a\nb", "c\n```\nd\n\ne\n```", "f"]
    assert blocks("") == []


@pytest.mark.parametrize(
    ("block", "shown", "said"),
    [
        ("## 1.1 Title", "## 1.1 Title", ""),
        ("**Break it.** Drop it.", "**Break it.** Drop it.", ""),
        ("| a | b |", "| a | b |", ""),
        ("- one\n- two", "- one\n- two", ""),
        ("1. one", "1. one", ""),
        ("Some prose, **bold** later.", "", "Some prose, **bold** later."),
        ("Lead in. **Question:** why?\nSay!", "**Question:** why?\nSay!", "Lead in."),
        ("Long. Guess\nthe shape. More.", "Guess the shape.", "Long. Guess\nthe shape. More."),
        ("Guesswork is not it.", "", "Guesswork is not it."),
        ("**In a class.** At 0:07.", "", "**In a class.** At 0:07."),
    ],
)
def test_what_is_shown_and_what_is_said(block, shown, said):
    assert shown_and_said(block) == (shown, said)


def test_a_diagram_that_can_not_be_drawn_is_said_in_words():
    diagram, words = "```mermaid\nflowchart LR\n```", "In words: from left to right."
    assert shown_and_said(diagram) == (diagram, "")
    assert shown_and_said(words) == ("", words)
    assert shown_and_said(diagram, diagrams=False) == ("", "")
    assert shown_and_said(words, diagrams=False) == (words, "")


def test_a_deck_cell_by_cell():
    cells = [
        new_markdown_cell("## 1.1 One  (5 minutes)\n\nProse. **Question:** why?\n\nMore prose."),
        code("import os\nfrom sys import path\n_ = path.copy()"),
        code("x = 1\nprint(x)", "1\n"),
        new_markdown_cell("What that was."),
        code("import this", "Beautiful\n"),
        code("long", "line\n" * 40),
        new_code_cell("plot", outputs=[new_output("display_data", {"image/png": "AAAA"})]),
        code("bar()"),
    ]
    cells[-1].outputs = [new_output("stream", name="stderr", text="100%|██|")]
    assert kinds(notebook_of(*cells)) == [
        ("slide", "# 1 · T"),
        ("notes", "Hello."),
        ("slide", "## 1.1 One  (5 minutes)"),
        ("notes", "Prose."),
        ("-", "**Question:** why?"),
        ("notes", "More prose."),
        ("-", "x = 1\nprint(x)"),
        ("fragment", "1"),
        ("notes", "What that was."),
        ("subslide", "import this"),
        ("fragment", "Beautiful"),
        ("subslide", "long"),
        ("subslide", ("line\n" * 40).strip()),
        ("subslide", "plot"),
        ("subslide", "picture"),
        ("subslide", "bar()"),
    ]


def test_of_an_exercise_statement_and_blank():
    solution = f"def f():\n    {BEGIN}\n    return 42\n    {END}"
    cells = [
        new_markdown_cell("**Exercise 1.1** (5 minutes, ●○○). Answer."),
        code(solution, tags=["solution"]),
        code("assert f() == 42", "good\n", tags=["check"]),
    ]
    assert kinds(notebook_of(*cells))[2:] == [
        ("-", "**Exercise 1.1** (5 minutes, ●○○). Answer."),
        ("-", "def f():\n    # your code"),
    ]


def test_cells_marked_by_hand_are_taken_at_their_word():
    said = new_markdown_cell("**Only said.**", metadata={"slideshow": {"slide_type": "notes"}})
    left_out = code("secret", slideshow={"slide_type": "skip"})
    assert kinds(notebook_of(said, left_out))[2:] == [("notes", "**Only said.**")]


def test_the_clock_speaks_in_the_notes():
    notebook = read(notebooks()["ch02_text_data"])
    notes = [text for kind, text in kinds(notebook) if kind == "notes"]
    assert "**0:18, 15 minutes.**" in notes
    assert any(text.startswith("By now: the same fingerprint on every screen") for text in notes)
    assert any("*How large should a vocabulary be?* Every entry costs" in text for text in notes)
    assert any("Late? Saves 6 minutes: the three habits" in text for text in notes)


@pytest.mark.parametrize("name", notebooks())
def test_nothing_of_a_solution_is_shown_or_said(name):
    notebook = read(notebooks()[name])
    text = "\n".join(cell.source for cell in deck_of(notebook, name).cells)
    for cell in notebook.cells:
        for region in re.findall(rf"{BEGIN}\n(.*?)\n *{END}", cell.source, flags=re.S):
            assert region not in text
    assert text.count("# your code") == sum(c.source.count(BEGIN) for c in notebook.cells)


# ----------------------------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser():
    with page(1280, 720) as opened:
        opened.requests = []
        opened.on("request", lambda request: opened.requests.append(request.url))
        yield opened


def show(browser, path):
    browser.complaints.clear()
    browser.requests.clear()
    browser.goto(path.as_uri())
    browser.wait_for_function("window.deck && deck.isReady()")


OUTSIDE = """() => {
const PARTS = ".fit, .fit :is(h1, h2, h3, p, li, td, pre, .highlight, img, svg)";
return deck.getSlides().map((slide, n) => {
    const {h, v} = deck.getIndices(slide);
    deck.slide(h, v, 99);
    const outside = [...slide.querySelectorAll(PARTS)].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width && box.height
            && (box.left < -1 || box.top < -1 || box.right > 1281 || box.bottom > 721);
    });
    const text = slide.innerText.trim();
    const seen = text.length + slide.querySelectorAll("img, svg").length;
    return {n, outside: outside.map((element) => element.outerHTML.slice(0, 80)), seen,
            scale: Number(slide.dataset.scale)};
}); }"""


@pytest.mark.parametrize("name", notebooks())
def test_no_cell_leaves_a_screen_of_16_9(browser, tmp_path, name):
    path, n = write(notebooks()[name], tmp_path)
    show(browser, path)
    measured = browser.evaluate(OUTSIDE)
    assert len(measured) == n
    for slide in measured:
        assert not slide["outside"], f"slide {slide['n']}: {slide['outside'][:3]}"
        assert slide["seen"], f"slide {slide['n']} is empty"
        assert slide["scale"] >= 0.6, f"slide {slide['n']} is too small to be read"
    assert browser.complaints == []
    network = [url for url in browser.requests if not url.startswith(("file:", "data:"))]
    assert network == [], "the slides ask the network"


def test_what_is_too_full_would_be_found(browser, tmp_path, monkeypatch):
    """The measurement itself: without the rule that shrinks, a full slide leaves the screen."""
    full = notebook_of(new_markdown_cell("**Bold**" + " and more words" * 300))
    for fits in (True, False):
        text, _ = html(full)
        text = text if fits else text.replace("const HEIGHT = 720", "const HEIGHT = 72000")
        (tmp_path / "full.html").write_text(text, encoding="utf8")
        show(browser, tmp_path / "full.html")
        outside = [slide["outside"] for slide in browser.evaluate(OUTSIDE)]
        assert bool(outside[1]) != fits


def test_an_output_waits_for_the_next_key(browser, tmp_path):
    (tmp_path / "x.html").write_text(html(notebook_of(code("1 + 1", "2\n")))[0], encoding="utf8")
    show(browser, tmp_path / "x.html")
    visibility = "getComputedStyle(document.querySelector('section.present .fragment')).visibility"
    assert browser.evaluate(visibility) == "hidden"
    browser.keyboard.press("Space")
    browser.wait_for_function(f"{visibility} == 'visible'")


def test_notes_open_in_a_window_of_their_own(browser, tmp_path):
    notebook = notebook_of(new_markdown_cell("## 1.1 One\n\nWhat the teacher says."))
    (tmp_path / "x.html").write_text(html(notebook)[0], encoding="utf8")
    show(browser, tmp_path / "x.html")
    browser.keyboard.press("Space")
    with browser.expect_popup() as window:
        browser.keyboard.press("s")
    notes = window.value.locator(".speaker-controls-notes", has_text="What the teacher says.")
    notes.wait_for(timeout=20_000)
    window.value.close()


# ---------------------------------------------------------------------------------------- the file


def test_one_file_with_everything_in_it(tmp_path):
    path, n = write(notebooks()["ch01_setup"], tmp_path / "deep")
    assert path == tmp_path / "deep" / "ch01_setup.html"
    assert n > 40
    text = re.sub("<script>.*?</script>", "", path.read_text(encoding="utf8"), flags=re.S)
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?!data:)[^"]+"', text)
    assert [file.name for file in path.parent.iterdir()] == ["ch01_setup.html"]


def test_without_reveal_js_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(slides, "find_spec", lambda name: None)
    with pytest.raises(AssetUnavailable, match="`uv sync --group offline` installs"):
        html(notebook_of())
