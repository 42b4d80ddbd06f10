"""Instructions with answers, and pairs of a better and a worse answer: read, and checked.

    entries = read_instructions(split="train")        # the course's own
    entries = read_instructions("mine.jsonl")         # yours: one JSON object per line
    pairs = read_preferences(half="a")

Your own instructions need the fields "instruction" and "response", your own pairs "prompt",
"chosen" and "rejected"; the others have defaults. Whatever is wrong with a line is said with its
number.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from common.assets import fetch
from common.corpus import read_text

SPLITS = ("train", "validation", "test")
HALVES = ("a", "b")


@dataclass(frozen=True)
class Instruction:
    """A task, perhaps with the material it is about, and a good answer."""

    instruction: str
    response: str
    input: str = ""
    kind: str = ""  # of task, such as "arithmetic"
    checkable: bool = False  # only one short answer is right
    split: str = "train"  # one of SPLITS
    id: str = ""

    @property
    def prompt(self) -> str:
        """What a user would write."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation: a question and its answer."""
        return conversation(self.prompt, self.response)


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, of which people prefer one."""

    prompt: str
    chosen: str
    rejected: str
    why: str = ""
    category: str = ""  # what the two differ in
    half: str = "a"  # one of HALVES: what one half teaches, the other may judge
    id: str = ""

    @property
    def messages(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Two conversations: with the chosen answer, and with the rejected one."""
        return conversation(self.prompt, self.chosen), conversation(self.prompt, self.rejected)


def conversation(prompt: str, response: str, system: str | None = None) -> list[dict[str, str]]:
    """One question and its answer as messages, after a system prompt if there is one."""
    turns = [("user", prompt), ("assistant", response)]
    turns = [("system", system), *turns] if system else turns
    return [{"role": role, "content": content} for role, content in turns]


def read_instructions(
    path: str | Path | None = None, split: str | None = None
) -> list[Instruction]:
    """The course's instructions, or those of a JSON Lines file; all, or those of one split.

    Raises ValueError, in one line with the number of the file's line, for what is no JSON object,
    lacks a field, has one that is empty or of another type, repeats a task, or names no split.
    """
    path = fetch("instructions") if path is None else path
    entries = list(_read(path, Instruction))
    lines: dict[str, int] = {}
    for number, entry in entries:
        _one_of(path, number, "split", entry.split, SPLITS)
        if entry.prompt in lines:
            raise ValueError(
                f"{path}, line {number}: the task is that of line {lines[entry.prompt]}"
            )
        lines[entry.prompt] = number
    return _chosen(path, entries, "split", split, SPLITS)


def read_preferences(path: str | Path | None = None, half: str | None = None) -> list[Preference]:
    """The course's pairs, or those of a JSON Lines file; all, or one half. Raises as above."""
    path = fetch("preferences") if path is None else path
    pairs = list(_read(path, Preference))
    for number, pair in pairs:
        _one_of(path, number, "half", pair.half, HALVES)
        if pair.chosen.strip() == pair.rejected.strip():
            raise ValueError(f"{path}, line {number}: 'chosen' and 'rejected' are the same text")
    return _chosen(path, pairs, "half", half, HALVES)


# ---------------------------------------------------------------------------------------- helpers


def _read(path: str | Path, kind: type) -> Iterator[tuple[int, Any]]:
    """The number of each line and what is in it; blank lines are passed over."""
    lines: dict[str, int] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = _parse(line, kind)
            entry["id"] = entry.get("id") or str(number)
            if entry["id"] in lines:
                raise ValueError(f"the id {entry['id']!r} is that of line {lines[entry['id']]}")
        except ValueError as why:
            raise ValueError(f"{path}, line {number}: {why}") from None
        lines[entry["id"]] = number
        yield number, kind(**entry)


def _parse(line: str, kind: type) -> dict[str, Any]:
    """The fields of one line that `kind` has. Raises ValueError unless all are as they must be."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as why:
        raise ValueError(f"it is not JSON ({why}): write one object per line") from None
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object: write {…} on every line")
    if "id" in entry:
        entry["id"] = str(entry["id"])  # a number will do
    found = {field.name: entry[field.name] for field in fields(kind) if field.name in entry}
    for field in fields(kind):
        name, needed = field.name, field.default is MISSING
        if needed and name not in found:
            raise ValueError(f"the field '{name}' is missing")
        if name in found and not isinstance(found[name], field.type):
            wanted = {str: "a text", bool: "true or false"}[field.type]
            raise ValueError(f"'{name}' is {found[name]!r}, it must be {wanted}")
        if needed and not found[name].strip():
            raise ValueError(f"'{name}' is empty: fill it in, or remove the line")
    return found


def _one_of(path, number: int, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{path}, line {number}: {name} {value!r} is none of {', '.join(known)}")


def _chosen(path, entries: list, name: str, value: str | None, known: tuple[str, ...]) -> list:
    """The entries whose `name` is `value`; of which there must be one at least."""
    if value is not None and value not in known:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(known)}")
    found = [e for _, e in entries if value is None or getattr(e, name) == value]
    if not found:
        raise ValueError(f"{path} holds nothing with {name} {value!r}")
    return found
