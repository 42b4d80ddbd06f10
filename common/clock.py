"""The clock of a class: when each section begins, where all should be, what to leave out when late.

    uv run course clock 2 --start 14:00

It stands in the notebook's metadata under `course`, and `.ci/notebook.py` keeps it there:

    video        the video's length, "1:28:01"
    sections     number, title, minutes: derived from the headings, never written by hand
    checkpoints  after which section, and what everybody should see by then
    questions    the three that every class asks, with the section and a short answer
    skip         what to leave out when late, in this order: section, minutes saved, what instead

To give a notebook one, write the others as TOML (`[[checkpoints]]`, `after = "2.4"`, `see = "…"`,
and so on) and run `.ci/notebook.py clock NOTEBOOK.ipynb CLOCK.toml`: it derives the sections,
checks all of it, and puts a line for learners at the end of the opening cell.
"""

import textwrap
from dataclasses import dataclass

from common.chapters import NotebookError, Section, exercises, seconds, sections, title

FIELDS = {
    "checkpoints": {"after", "see"},
    "questions": {"section", "question", "answer"},
    "skip": {"section", "minutes", "instead"},
}
OPENING = "**In a class.** "  # how the paragraph in the opening cell begins


@dataclass(frozen=True)
class Clock:
    """The metadata of a notebook, checked, with the sections as its headings have them."""

    title: str
    video: int | None  # seconds; None for a talk that has no video
    sections: list[Section]
    checkpoints: list[dict]
    questions: list[dict]
    skip: list[dict]
    exercises: list[int]  # minutes of each

    def begins(self, number: str) -> int:
        """Seconds from the start to the beginning of a section."""
        before = self.sections[: [s.number for s in self.sections].index(number)]
        return sum(section.seconds for section in before)


def clock_of(notebook, name: str = "notebook") -> Clock:
    """The clock of a notebook. Raises NotebookError, in one line, for what does not fit."""
    stored = notebook.metadata.get("course", {})
    if missing := {*FIELDS} - stored.keys():
        raise NotebookError(f"{name} has no clock ({', '.join(sorted(missing))} missing)")
    found = sections(notebook)
    length = {section.number: section.seconds for section in found}
    if untimed := [number for number, time in length.items() if not time]:
        raise NotebookError(f"{name}: the headings of {', '.join(untimed)} give no minutes")
    for field, keys in FIELDS.items():
        for entry in stored[field]:
            if entry.keys() != keys:
                raise NotebookError(f"{name}: {field} have {sorted(keys)}, not {sorted(entry)}")
            if (number := entry.get("after", entry.get("section"))) not in length:
                raise NotebookError(f"{name}: {field} name a section {number}, which is not there")
    for entry in stored["skip"]:
        if not 0 < 60 * entry["minutes"] <= length[entry["section"]]:
            raise NotebookError(
                f"{name}: {entry['section']} is too short to save that many minutes"
            )
    if len(stored["questions"]) != 3 or not stored["checkpoints"] or not stored["skip"]:
        raise NotebookError(f"{name}: a clock has three questions, checkpoints, something to skip")
    video = seconds(stored["video"]) if "video" in stored else None
    total = sum(length.values())
    if video and abs(video - total) >= 60:
        raise NotebookError(
            f"{name}: the sections take {_time(total)}, the video {stored['video']}"
        )
    minutes = [exercise.minutes for exercise in exercises(notebook, name)]
    return Clock(title(notebook), video, found, *(stored[field] for field in FIELDS), minutes)


def wind(notebook, name: str = "notebook") -> None:
    """Derive, in place, what follows from the rest: the metadata's sections, the opening's line."""
    clock = clock_of(notebook, name)
    notebook.metadata["course"]["sections"] = [
        {"section": s.number, "title": s.title, "minutes": _minutes(s.seconds)}
        for s in clock.sections
    ]
    opening = notebook.cells[0]
    paragraphs = [p for p in opening.source.split("\n\n") if not p.startswith(OPENING)]
    opening.source = "\n\n".join([*paragraphs, paragraph(clock)])


def paragraph(clock: Clock) -> str:
    """The opening's line about the clock."""
    ends = {s.number: _time(clock.begins(s.number) + s.seconds) for s in clock.sections}
    where = [f"{ends[c['after']]} (after {c['after']})" for c in clock.checkpoints]
    leave = [entry["section"] for entry in clock.skip]
    chapter = clock.sections[0].number.partition(".")[0]
    text = f"{OPENING}Checkpoints at {_and(where)}. "
    text += f"When late, leave out {_and(leave)}, in this order. "
    text += (
        f"`uv run course clock {'bonus' if chapter == '8' else chapter}` prints the run of show."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def table(clock: Clock, start: str = "0:00") -> str:
    """The clock as text, the first section beginning at `start`, "H:MM"."""
    zero = seconds(f"{start}:00")
    lines = [clock.title, ""]
    for section in clock.sections:
        begin = zero + clock.begins(section.number)
        minutes = f"{section.seconds / 60:.0f} min" if section.seconds >= 60 else "      "
        lines.append(f"{_time(begin):>5}  {minutes:>6}  {section.number:5} {section.title}")
        for checkpoint in clock.checkpoints:
            if checkpoint["after"] == section.number:
                lines.append(_fold(f"by now: {checkpoint['see']}", 15))
    total = sum(section.seconds for section in clock.sections)
    n = len(clock.exercises)
    lines.append(
        f"{_time(zero + total):>5}  the end. {n} exercises, {sum(clock.exercises)} min, on top."
    )
    lines += ["", "Every class asks"]
    for entry in clock.questions:
        lines += [
            _fold(f"{entry['section']:5} {entry['question']}", 2, 8),
            _fold(entry["answer"], 8),
        ]
    lines += ["", "Late? Run the cells, and instead of explaining them, in this order:"]
    for entry in clock.skip:
        text = f"{entry['section']:5} saves {entry['minutes']} min: {entry['instead']}"
        lines.append(_fold(text, 2, 8))
    return "\n".join(lines)


def _time(seconds: int) -> str:
    """H:MM, rounded down."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02}"


def _minutes(seconds: int) -> int | float:
    return seconds // 60 if seconds % 60 == 0 else round(seconds / 60, 2)


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _fold(text: str, indent: int, then: int | None = None) -> str:
    later = " " * (indent if then is None else then)
    return textwrap.fill(text, 90, initial_indent=" " * indent, subsequent_indent=later)
