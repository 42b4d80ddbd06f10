"""JupyterLab as a learner sees it: every chapter opens; chapters 1 to 3 run, with plots and bars.

    uv run pytest -m slow tests/test_browser.py

JupyterLab starts on this machine alone, with a token, in a copy of the notebooks and with settings
of its own, so that nothing of the repository or the user is changed. Skipped without a Chromium.
"""

import os
import secrets
import socket
import subprocess
import sys
import time

import httpx
import pytest
from browser import page
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from common.chapters import notebooks, read, save, title
from common.student import student_edition

pytestmark = pytest.mark.slow  # minutes, and a browser: the replay by nbval is what runs every time
ALL = notebooks()
RUN = ("ch01_setup", "ch02_text_data", "ch03_attention")
SETTINGS = {
    # All cells in the page, also those outside the window: they are counted below.
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    # No question whether news may be fetched.
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of all notebooks without outputs, and a small student edition."""
    root = tmp_path_factory.mktemp("course")
    for path in ALL.values():
        notebook = read(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        save(notebook, root / path.parent.name / path.name)
    exercise = [
        new_markdown_cell("**Exercise 1.1** (5 minutes, ●○○). Add."),
        new_code_cell(
            "def add(a, b):\n    ### BEGIN SOLUTION\n    return a + b\n    ### END SOLUTION",
            metadata={"tags": ["solution"]},
        ),
        new_code_cell("assert add(1, 2) == 3", metadata={"tags": ["check"]}),
    ]
    cells = [new_markdown_cell("# 1 · Blanks"), *exercise, new_code_cell("print('went on')")]
    metadata = read(ALL["ch01_setup"]).metadata
    save(student_edition(new_notebook(cells=cells, metadata=metadata)), root / "student.ipynb")
    return root


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    """JupyterLab in that folder; gives its address with the token."""
    own = tmp_path_factory.mktemp("jupyter")
    for name, text in SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.root_dir={folder}"]
    command += [
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--ServerApp.ip=127.0.0.1",
    ]
    command += [f"--IdentityProvider.token={token}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    places = {"CONFIG": "config", "RUNTIME": "runtime", "DATA": "data"}
    environment = os.environ | {f"JUPYTER_{k}_DIR": str(own / v) for k, v in places.items()}
    environment |= {f"JUPYTERLAB_{k}_DIR": str(own / k.lower()) for k in ("SETTINGS", "WORKSPACES")}
    with open(own / "log.txt", "w", encoding="utf8") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, own / "log.txt")
        yield lambda path: f"http://127.0.0.1:{port}/lab/tree/{path}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url, server, log, seconds=120):
    """Until JupyterLab answers."""
    for _ in range(10 * seconds):
        assert server.poll() is None, log.read_text(encoding="utf8")[-2000:]
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"no answer in {seconds} s: {log.read_text(encoding='utf8')[-2000:]}")


@pytest.fixture(scope="module")
def browser(lab):
    with page(1280, 900) as opened:
        opened.set_default_timeout(120_000)
        yield opened


def open_notebook(browser, address, n_cells):
    """Open a notebook and wait until all its cells are there and its kernel is ready."""
    browser.complaints.clear()
    browser.goto(address)
    browser.wait_for_function(
        f"document.querySelectorAll('.jp-Notebook .jp-Cell').length == {n_cells}"
    )
    # The indicator beside the kernel's name says idle before there is a kernel; this line does not.
    browser.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


def run_all(browser, seconds):
    """Run → Run All Cells, and wait until every cell has a number. (Folded ones show none.)"""
    browser.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    browser.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    browser.wait_for_function(
        """() => [...document.querySelectorAll(".jp-Notebook .jp-CodeCell .jp-InputPrompt")]
            .every((prompt) => /^(\\[\\d+\\]:)?$/.test(prompt.textContent.trim()))""",
        timeout=1000 * seconds,
    )


def outputs(browser, mime):
    return browser.locator(f".jp-OutputArea-output[data-mime-type='{mime}']")


def errors(browser):
    """What is shown in red: JupyterLab renders an error as stderr, with its traceback."""
    red = outputs(browser, "application/vnd.jupyter.stderr")
    return red.filter(has_text="Traceback (most recent call last)").all_inner_texts()


@pytest.mark.parametrize("name", ALL)
def test_every_chapter_opens(lab, browser, name):
    notebook = read(ALL[name])
    open_notebook(browser, lab(f"{ALL[name].parent.name}/{name}.ipynb"), len(notebook.cells))
    assert browser.locator(".jp-Notebook h1").first.inner_text().strip("¶ ") == title(notebook)
    diagrams = sum(cell.source.count("```mermaid") for cell in notebook.cells)
    drawn = browser.locator(".jp-RenderedMermaid:not(.jp-mod-warning) img")
    if diagrams:
        drawn.nth(diagrams - 1).wait_for(state="attached")
    assert drawn.count() == diagrams
    folded = sum("source_hidden" in c.metadata.get("jupyter", {}) for c in notebook.cells)
    assert (
        browser.locator(".jp-CodeCell .jp-InputPlaceholder, .jp-CodeCell .jp-Placeholder").count()
        == folded
        > 0
    )
    assert browser.complaints == []


@pytest.mark.parametrize("name", RUN)
def test_all_cells_run_with_plots_and_progress_bars(lab, browser, folder, name):
    stored = read(ALL[name])
    open_notebook(browser, lab(f"{ALL[name].parent.name}/{name}.ipynb"), len(stored.cells))
    run_all(browser, seconds=600)
    assert errors(browser) == []
    kept = [output for cell in stored.cells for output in cell.get("outputs", ())]
    plots = outputs(browser, "image/png").locator("img")
    assert plots.count() == sum("image/png" in output.get("data", {}) for output in kept) > 3
    widths = plots.evaluate_all("images => images.map((image) => image.naturalWidth)")
    assert min(widths) > 100
    bars = [o.text for o in kept if o.get("name") == "stderr" and "100%|" in o.text]
    shown = outputs(browser, "application/vnd.jupyter.stderr").filter(has_text="100%|")
    assert shown.count() >= len(bars)
    assert browser.complaints == []
    assert read(ALL[name]) == stored, "the repository's own notebook was changed"


def test_a_blank_is_shown_and_stops_nothing(lab, browser):
    open_notebook(browser, lab("student.ipynb"), 6)
    run_all(browser, seconds=60)
    (error,) = errors(browser)
    assert "NotImplementedError: Exercise 1.1 is still blank" in error
    assert browser.get_by_text("went on", exact=True).count() == 1
