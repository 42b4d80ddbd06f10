"""Is the room ready? What each laptop's doctor found, sent to the instructor, in one table.

    uv run course fetch --serve                             # the instructor, who keeps it running
    uv run course doctor --send http://192.168.1.5:8000     # each learner; or COURSE_MIRROR is set
    uv run course doctor --room                             # the instructor, on the same machine

A report holds a name (the host's, unless --name gives another), and of each finding its name and
its status; what is wrong and the remedy only where something is, without the user's name and home
folder. It is kept in memory until the server stops, and only the machine that serves may read it.

Whoever is in the network can send, so nothing that is sent is trusted: a report is small, has the
expected fields and no others, holds only printable characters, and there is room for so many.
"""

import getpass
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PATH = "/doctor"
LARGEST = 16_384  # bytes of a report
MOST = 200  # laptops
STATUSES = ("ok", "warn", "fail")
LENGTHS = {
    "name": 40,
    "status": 4,
    "detail": 400,
    "remedy": 400,
}  # characters of a finding's fields
MOST_FINDINGS = 40


class ReportError(Exception):
    """A report is not accepted, or can't be sent. The message is one line."""


# ------------------------------------------------------------------------------ one laptop's report


def report_of(findings: Iterable, name: str = "") -> dict:
    """What a laptop sends, from the doctor's findings. `name`: a nickname; the host's if empty."""
    kept = []
    for finding in findings:
        entry = {"name": finding.name, "status": finding.status}
        if finding.status != "ok":
            for part in ("detail", "remedy"):
                entry[part] = _anonymous(getattr(finding, part))[: LENGTHS[part]]
        kept.append(entry)
    name = _printable(name or socket.gethostname().partition(".")[0])[: LENGTHS["name"]]
    return {"name": name or "nameless", "findings": kept}


def _anonymous(text: str) -> str:
    """Without the home folder and the name of the user."""
    text = text.replace(str(Path.home()), "~")
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without one
        user = ""
    if len(user) > 2:
        text = re.sub(rf"\b{re.escape(user)}\b", "USER", text, flags=re.IGNORECASE)
    return _printable(text)


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).strip()


def parse_report(body: bytes) -> dict:
    """A report that came over the network. Raises ReportError for anything unexpected."""
    if len(body) > LARGEST:
        raise ReportError(f"a report has at most {LARGEST} bytes")
    try:
        report = json.loads(body)
    except (ValueError, RecursionError):
        raise ReportError("a report is JSON") from None
    if not isinstance(report, dict) or report.keys() != {"name", "findings"}:
        raise ReportError("a report has a name and findings, nothing else")
    findings = report["findings"]
    if not isinstance(findings, list) or not 0 < len(findings) <= MOST_FINDINGS:
        raise ReportError(f"a report has 1 to {MOST_FINDINGS} findings")
    for entry in ({"name": report["name"], "status": "ok"}, *findings):
        if not isinstance(entry, dict) or not {"name", "status"} <= entry.keys() <= LENGTHS.keys():
            raise ReportError(f"a finding has the fields {', '.join(LENGTHS)}, nothing else")
        for part, text in entry.items():
            if not isinstance(text, str) or len(text) > LENGTHS[part] or not text.isprintable():
                raise ReportError(f"a {part} has at most {LENGTHS[part]} printable characters")
        if entry["status"] not in STATUSES or not entry["name"].strip():
            raise ReportError(f"a finding has a name, and a status: {', '.join(STATUSES)}")
    return report


@dataclass
class Reports:
    """The reports of a room, the latest of each laptop. Many threads may add at once."""

    latest: dict[tuple[str, str], dict] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, address: str, body: bytes) -> None:
        """Keep a report from `address`. Raises ReportError if it is unsound or the room full."""
        report = parse_report(body)
        key = address, report["name"]
        with self.lock:
            if key not in self.latest and len(self.latest) >= MOST:
                raise ReportError(f"{MOST} laptops have reported, there is no room for more")
            self.latest[key] = report

    def as_json(self) -> bytes:
        """All of them."""
        with self.lock:
            return json.dumps(list(self.latest.values())).encode()


# ---------------------------------------------------------------------------- both ends of the wire


def send(url: str, report: dict) -> None:
    """Send a report to the instructor's server. Raises ReportError, in one line."""
    answer = _ask("POST", url, json=report)
    if answer.status_code != 204:
        raise ReportError(f"{url} did not take the report: {_reason(answer)}")


def collect(url: str) -> list[dict]:
    """The reports that a server has. Raises ReportError, in one line."""
    answer = _ask("GET", url)
    if answer.status_code != 200:
        raise ReportError(f"{url} gives no reports: {_reason(answer)}")
    return answer.json()


def _ask(method: str, url: str, **content):
    import httpx

    address = (url if "://" in url else f"http://{url}").rstrip("/") + PATH
    try:
        # A company's proxy does not reach into the room.
        return httpx.request(method, address, trust_env=False, timeout=10, **content)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReportError(
            f"{url} does not answer ({error}): does `course fetch --serve` run there, and is this "
            "machine in the same network?"
        ) from None


def _reason(answer) -> str:
    return _printable(answer.reason_phrase or str(answer.status_code))[:200]


# --------------------------------------------------------------------------------------- the table


def table(reports: list[dict]) -> str:
    """One line for each problem, the laptops in trouble first; then who is ready."""
    worst = {}
    rows = []
    for number, report in enumerate(reports):
        statuses = [finding["status"] for finding in report["findings"]]
        worst[number] = max(statuses, key=STATUSES.index)
    for status in ("fail", "warn"):
        for number in sorted(n for n in worst if worst[n] == status):
            rows += _problems(reports[number])
    counts = Counter(worst.values())
    lines = [
        f"{len(reports)} laptops: {counts['ok']} ready, {counts['warn']} will run with something "
        f"slow or missing, {counts['fail']} can't run the course yet"
    ]
    if rows:
        rows.insert(0, ("laptop", "", "what", "found", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:3]
        for *cells, found, remedy in rows:
            start = "  ".join(map(str.ljust, cells, widths))
            lines.append(f"{start}  {found}{' -> ' + remedy if remedy else ''}".rstrip())
    if ready := sorted(reports[n]["name"] for n in worst if worst[n] == "ok"):
        lines.append(f"ready: {', '.join(ready)}")
    return "\n".join(lines)


def _problems(report: dict) -> list[tuple[str, ...]]:
    found = [f for f in report["findings"] if f["status"] != "ok"]
    found.sort(key=lambda f: f["status"] == "warn")
    return [
        (report["name"], f["status"], f["name"], f.get("detail", ""), f.get("remedy", ""))
        for f in found
    ]
