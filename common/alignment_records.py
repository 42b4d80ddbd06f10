"""What the runs of chapter 7 leave: JSON lines, and the figures that follow from stored answers.

    records = Records("ch07_instruction_finetune/results")
    records.rows("sft", unit="answers")           # dictionaries, in the order they were written
    records.add("sft", rows)                      # all of them, or none
    preferred(rewards, others, answers, those)    # 61.5% (55.6 to 67.0) of 270

Rows have a `unit`: what was done in one go. A unit whose rows are there is not done again.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.answers import AnswerScores
from common.instruction_data import Instruction
from common.judges import WinRate
from common.metrics import wilson_interval
from common.tokenizer_file import write_atomically

Row = dict[str, Any]


class Records:
    """A folder of JSON Lines files, which only grow.

    Raises OSError, in one line, where the folder can't be made; ValueError for a damaged line.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """The file of that name."""
        return self.folder / f"{name}.jsonl"

    def rows(self, name: str, **wanted) -> list[Row]:
        """The rows of a file whose fields are as wanted; none where there is no file."""
        path, found = self.path(name), []
        if not path.exists():
            return []
        for number, line in enumerate(path.read_text(encoding="utf8").split("\n"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path}, line {number} is damaged: remove the line") from None
            if all(row.get(key) == value for key, value in wanted.items()):
                found.append(row)
        return found

    def add(self, name: str, rows: Iterable[Row]) -> None:
        """Append rows; floats are kept to 5 significant digits."""
        path = self.path(name)
        before = path.read_text(encoding="utf8") if path.exists() else ""
        lines = [json.dumps(short(row), ensure_ascii=False) + "\n" for row in rows]
        write_atomically(path, before + "".join(lines))


def short(value: Any) -> Any:
    """The same with every float at 5 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: short(x) for key, x in value.items()}
    return [short(x) for x in value] if isinstance(value, list | tuple) else value


def scores_by_kind(answers: Sequence[str], entries: Sequence[Instruction]) -> dict[str, Row]:
    """`AnswerScores` as dictionaries: "checkable", "free", and each kind that can be checked."""
    pairs = list(zip(answers, entries, strict=True))
    groups = {
        "checkable": [p for p in pairs if p[1].checkable],
        "free": [p for p in pairs if not p[1].checkable],
    }
    for kind in sorted({e.kind for _, e in pairs if e.checkable}):
        groups[kind] = [p for p in groups["checkable"] if p[1].kind == kind]
    return {
        name: vars(AnswerScores.of([a for a, _ in group], [e.response for _, e in group]))
        for name, group in groups.items()
        if group
    }


def preferred(
    rewards: Sequence[float], others: Sequence[float], answers: Sequence[str], those: Sequence[str]
) -> WinRate:
    """How often the first answers earn more than the second; the same words are a tie, a half."""
    wins = sum(
        0.5 if a.strip() == b.strip() or x == y else float(x > y)
        for x, y, a, b in zip(rewards, others, answers, those, strict=True)
    )
    n = len(rewards)
    return WinRate(n, wins / n, wilson_interval(round(wins), n))


def share(hits: Sequence[bool]) -> Row:
    """How many are true: n, share, and its 95% interval (Wilson 1927)."""
    n, found = len(hits), sum(hits)
    return {"n": n, "share": found / n, "interval": wilson_interval(found, n)}
