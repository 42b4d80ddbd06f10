"""A room's table: thirty laptops at once, and what must not get in or out."""

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import classroom, cli, doctor, mirror
from common.checks import Finding
from common.classroom import (
    LARGEST,
    MOST,
    ReportError,
    Reports,
    collect,
    parse_report,
    report_of,
    send,
    table,
)

FINE = [Finding("python", "ok", "3.13"), Finding("memory", "ok", "9 GB")]
SLOW = [FINE[0], Finding("memory", "warn", "1.2 GB free", "close other programs")]
BROKEN = [SLOW[1], Finding("torch", "fail", "not installed", "`uv sync` installs it")]


@pytest.fixture
def room():
    """A server as `course fetch --serve` runs it; gives its address."""
    with mirror.Server(("127.0.0.1", 0), mirror.Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# ----------------------------------------------------------------------------------- thirty laptops


def test_thirty_laptops_at_once_make_one_table(room):
    kinds = [FINE, FINE, FINE, FINE, SLOW, BROKEN]
    reports = [report_of(kinds[n % 6], f"laptop-{n:02}") for n in range(30)]
    with ThreadPoolExecutor(30) as laptops:
        list(laptops.map(lambda report: send(room, report), reports))
    assert sorted(collect(room), key=lambda r: r["name"]) == reports
    lines = table(collect(room)).splitlines()
    assert lines[0] == (
        "30 laptops: 20 ready, 5 will run with something slow or missing, "
        "5 can't run the course yet"
    )
    body, ready = lines[2:-1], lines[-1]
    assert [line.split()[1] for line in body] == ["fail", "warn"] * 5 + ["warn"] * 5
    assert all("not installed -> `uv sync` installs it" in line for line in body[:10:2])
    assert ready.startswith("ready: laptop-00, laptop-01, laptop-02, laptop-03, laptop-06")


def test_a_laptop_that_was_repaired_replaces_its_report(room):
    send(room, report_of(BROKEN, "anna"))
    send(room, report_of(FINE, "anna"))
    assert table(collect(room)).splitlines()[1:] == ["ready: anna"]


def test_an_empty_room():
    assert table([]) == (
        "0 laptops: 0 ready, 0 will run with something slow or missing, 0 can't run the course yet"
    )


# ----------------------------------------------------------------------------- what leaves a laptop


def test_a_report_says_nothing_of_the_person(monkeypatch):
    monkeypatch.setattr(classroom.getpass, "getuser", lambda: "jane")
    home = str(Path.home())
    finding = Finding(
        "disk", "warn", f"{home}/course is full, D:\\Users\\Jane\\x", "Jane: make room"
    )
    report = report_of([Finding("cache", "ok", home), finding], "front row")
    assert report == {
        "name": "front row",
        "findings": [
            {"name": "cache", "status": "ok"},
            {
                "name": "disk",
                "status": "warn",
                "detail": "~/course is full, D:\\Users\\USER\\x",
                "remedy": "USER: make room",
            },
        ],
    }


def test_the_real_doctors_report_is_accepted_and_has_no_path_of_this_user():
    findings = doctor.examine([doctor.check_disk, doctor.check_paths, doctor.check_network])
    body = json.dumps(report_of(findings)).encode()
    assert parse_report(body)["name"] == socket.gethostname().partition(".")[0][:40]
    assert str(Path.home()).encode() not in body


def test_odd_findings_are_cut_to_what_is_accepted():
    odd = Finding("x", "fail", "\x1b[31mred\n" + "long " * 200, "\u202e")
    report = parse_report(json.dumps(report_of([odd], "\x07" * 3 + "n" * 99)).encode())
    assert report["name"] == "n" * 40
    assert report["findings"][0]["detail"].startswith("[31mredlong long")
    assert report["findings"][0]["remedy"] == ""


# ------------------------------------------------------------------------------ what is not let in


def with_(**changes):
    return {"name": "a", "findings": [{"name": "x", "status": "ok"}], **changes}


def finding(**changes):
    return with_(findings=[{"name": "x", "status": "ok", **changes}])


BAD = {
    "no JSON": b"{",
    "not UTF-8": b'{"name": "\xff"}',
    "a list": [],
    "a number": 1,
    "a field missing": {"name": "a"},
    "a field more": with_(more=1),
    "no findings": with_(findings=[]),
    "too many findings": with_(findings=[{"name": "x", "status": "ok"}] * 41),
    "findings of another kind": with_(findings={"name": "x"}),
    "a finding of another kind": with_(findings=["x"]),
    "no name": with_(name=""),
    "a blank name": with_(name="  "),
    "a name that is no text": with_(name=["a"]),
    "a long name": with_(name="a" * 41),
    "a name that moves the cursor": with_(name="a\x1b[2J"),
    "a name of two lines": with_(name="a\nb"),
    "a name from right to left": with_(name="a\u202eb"),
    "an unknown status": finding(status="good"),
    "a status of another kind": finding(status=1),
    "a finding's field more": finding(x="y"),
    "a long detail": finding(detail="x" * 401),
    "a detail with an escape": finding(detail="\x1b]0;title\x07"),
    "nothing": b"",
    "deep": b"[" * 10_000,
}


@pytest.mark.parametrize("what", BAD)
def test_hostile_reports_are_refused_in_one_line(room, what):
    body = BAD[what] if isinstance(BAD[what], bytes) else json.dumps(BAD[what]).encode()
    answer = httpx.post(f"{room}/doctor", content=body, trust_env=False)
    assert answer.status_code == 400
    assert answer.reason_phrase.startswith(("a ", "A "))
    with pytest.raises(ReportError) as caught:
        parse_report(body)
    assert "\n" not in str(caught.value)
    assert collect(room) == []


NESTED = st.recursive(
    st.none() | st.text() | st.integers(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["name", "findings", "status"]), inner)
    ),
)


@given(st.binary(max_size=200) | NESTED.map(lambda value: json.dumps(value).encode()))
def test_whatever_comes_is_a_report_or_a_line(body):
    try:
        answer = str(parse_report(body)["name"])
    except ReportError as error:
        answer = str(error)
    assert answer.isprintable()


def raw(room, request):
    """The answer's first line to a request written by hand."""
    host, port = room.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(request)
        return wire.makefile("rb").readline().split(b" ", 2)[1]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /doctor HTTP/1.1\r\n\r\n", b"411"),
        (b"POST /doctor HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"411"),
        (b"POST /doctor HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"411"),
        (
            b"POST /doctor HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
            b"411",
        ),
        (b"POST /doctor HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (LARGEST + 1), b"413"),
        (b"POST /story.txt HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", b"404"),
        (b"PUT /doctor HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", b"501"),
        (b"DELETE /doctor HTTP/1.1\r\n\r\n", b"501"),
    ],
)
def test_requests_that_are_refused_before_they_are_read(room, head, status):
    assert raw(room, head) == status


def test_a_full_room_still_takes_the_reports_of_those_who_are_in():
    reports, body = Reports(), lambda name: json.dumps(with_(name=name)).encode()
    for n in range(MOST):
        reports.add("10.0.0.1", body(f"laptop {n}"))
    with pytest.raises(ReportError, match="200 laptops have reported"):
        reports.add("10.0.0.1", body("one more"))
    reports.add("10.0.0.1", body("laptop 7"))
    assert len(json.loads(reports.as_json())) == MOST


def test_only_the_machine_that_serves_may_read(room, monkeypatch):
    monkeypatch.setattr(mirror.Handler, "client_address", ("10.1.2.3", 1), raising=False)
    monkeypatch.setattr(mirror.Handler, "__init__", _from_elsewhere(mirror.Handler.__init__))
    with pytest.raises(
        ReportError, match="gives no reports: Only the machine that serves may read"
    ):
        collect(room)
    send(room, report_of(FINE, "anna"))


def _from_elsewhere(init):
    return lambda self, request, address, server: init(self, request, ("10.1.2.3", 1), server)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "127.0.0.1:9", "http://["])
def test_a_server_that_is_not_there_is_one_line(url):
    for ask in (collect, lambda url: send(url, report_of(FINE))):
        with pytest.raises(ReportError, match="does not answer") as caught:
            ask(url)
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- by the commands


def test_from_the_laptop_to_the_table(room, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: BROKEN)
    monkeypatch.setenv("COURSE_MIRROR", room)
    assert cli.main(["doctor", "--send", "--name", "third row"]) == 1
    told = capsys.readouterr()
    assert "can't run here yet" in told.out
    assert f"Sent to {room} as 'third row'.\n" in told.err  # beside the server's log
    assert cli.main(["doctor", "--room", room]) == 1
    assert "third row  fail  torch   not installed -> " in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: FINE)
    assert cli.main(["doctor", "--send", room, "--name", "third row", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["overall"] == "ok"
    assert cli.main(["doctor", "--room", room]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ready: third row"


def test_where_to_must_be_said(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: FINE)
    monkeypatch.delenv("COURSE_MIRROR", raising=False)
    assert cli.main(["doctor", "--send"]) == 1
    assert "course: where to? `--send URL`" in capsys.readouterr().err
    assert os.environ.get("COURSE_MIRROR") is None
