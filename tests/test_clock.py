"""The run of show: read from headings and metadata, checked, printed."""

import re
from copy import deepcopy

import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from common.chapters import NotebookError, notebooks, read, seconds
from common.clock import clock_of, paragraph, table, wind

ALL = notebooks()


def small():
    """Three sections, 12 minutes and 30 seconds."""
    texts = ["# 9 · Small\n\nHello.", "## 9.1 One  (5 minutes)", "## 9.2 Two  (7 minutes)"]
    texts += ["## 9.3 Three  (0:30)"]
    notebook = new_notebook(cells=[new_markdown_cell(text) for text in texts])
    question = {"section": "9.1", "question": "Why?", "answer": "Because. " * 20}
    notebook.metadata["course"] = {
        "video": "0:12:40",
        "checkpoints": [{"after": "9.2", "see": "two"}],
        "questions": [question] * 3,
        "skip": [{"section": "9.2", "minutes": 4, "instead": "one sentence"}],
    }
    return notebook


# -------------------------------------------------------------------------------- the real clocks


@pytest.mark.parametrize("name", ALL)
def test_minutes_add_up_to_the_video(name):
    notebook = read(ALL[name])
    clock = clock_of(notebook, name)
    total = sum(section.seconds for section in clock.sections)
    said = re.search(
        r"\*Goes with video \d, .*?, (\d:\d\d:\d\d)\.\*|Video \d of 7, (\S+)\.",
        notebook.cells[0].source,
    )
    if said:
        assert clock.video == seconds(said[1] or said[2])
        assert abs(clock.video - total) < 60


@pytest.mark.parametrize("name", ALL)
def test_metadata_and_opening_say_what_the_headings_say(name):
    notebook = read(ALL[name])
    wound = deepcopy(notebook)
    wind(wound, name)
    assert wound == notebook, "run `.ci/notebook.py clean` on it"


@pytest.mark.parametrize("name", ALL)
def test_printed_within_a_terminal(name):
    lines = table(clock_of(read(ALL[name]), name), "14:00").splitlines()
    assert max(map(len, lines)) <= 90
    assert re.match(r"14:00 +\d+ min  \d\.1 ", lines[2])


# ------------------------------------------------------------------------------------- how it works


def test_the_table():
    printed = table(clock_of(small()), "9:58").splitlines()
    assert printed[:7] == [
        "9 · Small",
        "",
        " 9:58   5 min  9.1   One",
        "10:03   7 min  9.2   Two",
        "               by now: two",
        "10:10          9.3   Three",
        "10:10  the end. 0 exercises, 0 min, on top.",
    ]
    assert printed[-1] == "  9.2   saves 4 min: one sentence"


def test_winding_derives_and_can_be_repeated():
    notebook = small()
    wind(notebook)
    assert notebook.metadata["course"]["sections"] == [
        {"section": "9.1", "title": "One", "minutes": 5},
        {"section": "9.2", "title": "Two", "minutes": 7},
        {"section": "9.3", "title": "Three", "minutes": 0.5},
    ]
    assert notebook.cells[0].source.split() == [
        "#", "9", "·", "Small", "Hello.", *paragraph(clock_of(notebook)).split()
    ]  # fmt: skip
    assert "Checkpoints at 0:12 (after 9.2). When late, leave out 9.2" in notebook.cells[0].source
    again = deepcopy(notebook)
    again.metadata["course"]["sections"] = []
    wind(again)
    assert again == notebook


def broken(change):
    notebook = small()
    change(notebook.metadata["course"], notebook.cells)
    return notebook


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, _: c.pop("skip"), r"x has no clock \(skip missing\)"),
        (lambda c, _: c.clear(), r"\(checkpoints, questions, skip missing\)"),
        (lambda c, _: c["questions"].pop(), "has three questions, checkpoints, something to skip"),
        (lambda c, _: c["checkpoints"].clear(), "has three questions, checkpoints"),
        (
            lambda c, _: c["skip"][0].pop("minutes"),
            r"skip have \['instead', 'minutes', 'section'\]",
        ),
        (lambda c, _: c["skip"][0].update(section="9.7"), "name a section 9.7, which is not there"),
        (lambda c, _: c["checkpoints"][0].update(after="1.1"), "checkpoints name a section 1.1"),
        (lambda c, _: c["skip"][0].update(minutes=8), "9.2 is too short to save that many minutes"),
        (lambda c, _: c["skip"][0].update(minutes=0), "9.2 is too short to save that many minutes"),
        (lambda c, _: c.update(video="0:14:00"), "the sections take 0:12, the video 0:14:00"),
        (
            lambda _, cells: cells[1].update(source="## 9.1 One"),
            "the headings of 9.1 give no minutes",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(change, says):
    with pytest.raises(NotebookError, match=says) as caught:
        clock_of(broken(change), "x")
    assert "\n" not in str(caught.value)
