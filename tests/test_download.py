"""Downloads from a local server that drops, truncates, stalls, lies and behaves."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import download as room
from common.download import DownloadError, download, readable, sha256_of

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


# ---------------------------------------------------------------------------- how a server behaves


def good(request):
    """Send all, or the range asked for."""
    asked = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
    start = int(asked[0])
    if start >= len(CONTENT):
        return reply(request, 416, b"")
    extra = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
    reply(request, 206 if start else 200, CONTENT[start:], extra if start else {})


def reply(request, status, body, headers=(), length=None):
    request.send_response(status)
    for name, value in {"Content-Length": str(length or len(body)), **dict(headers)}.items():
        if value:
            request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True


def drop(count):
    """Announce the rest of the file, send `count` bytes of it, and hang up."""

    def behave(request):
        start = int(request.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        extra = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        body = CONTENT[start : start + count]
        reply(request, 206 if start else 200, body, extra, length=len(CONTENT) - start)

    behave.__name__ = f"drop({count})"
    return behave


def reset(request):
    """Break the connection in the middle, without a goodbye."""
    drop(30_000)(request)
    request.wfile.flush()
    linger = b"\1\0\0\0\0\0\0\0" if os.name != "nt" else b"\1\0\0\0"
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def no_length(request):
    """End early without having said how much there is."""
    reply(request, 200, CONTENT[:70_000], {"Content-Length": None})


def ignore_range(request):
    reply(request, 200, CONTENT)


def lie(request):
    reply(request, 200, CONTENT[:-1] + b"!")


def wrong_range(request):
    reply(request, 206, CONTENT[:50], {"Content-Range": f"bytes 0-49/{len(CONTENT)}"})


def portal(request):
    page = b"<html>Log in to the hotel's network"
    reply(request, 200, page, {"Content-Type": "text/html; charset=utf-8"})


def endless(request):
    """Send a hundred times too much, or until the other side hangs up."""
    request.send_response(200)
    request.end_headers()
    request.close_connection = True
    for _ in range(100):
        request.wfile.write(CONTENT)


def stall(count):
    """Send `count` bytes, then nothing, without hanging up."""

    def behave(request):
        drop(count)(request)
        request.wfile.flush()
        request.server.patience.wait(10)

    behave.__name__ = f"stall({count})"
    return behave


def status(code):
    """Refuse with this status."""

    def behave(request):
        reply(request, code, b"no")

    behave.__name__ = f"status({code})"
    return behave


class Server(ThreadingHTTPServer):
    """Follows a script: one behaviour a request, the last one for ever."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.patience = [good], [], threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file.bin"

    def follow(self, *script):
        self.script, self.requests = list(script), []

    def handle_error(self, request, client_address):
        pass  # broken connections are what it is for


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(self)
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def do_CONNECT(self):
        """As a proxy for HTTPS: pass bytes on, to the server's port whatever the name."""
        self.server.requests.append(self)
        port = int(self.path.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as there:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=pump, args=(there, self.connection), daemon=True)
            back.start()
            pump(self.connection, there)
            back.join(5)
        self.close_connection = True

    def log_message(self, *args):
        pass


def pump(source, target):
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(scope="module")
def running_server():
    with Server() as server:
        yield server
        server.patience.set()
        server.shutdown()


@pytest.fixture
def server(running_server):
    running_server.follow(good)
    return running_server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(room, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(room, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(room, "CONNECT_SECONDS", 2.0)
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "file.bin"


def get(server, target, **changes):
    download(
        **{"url": server.url, "target": target, "size": len(CONTENT), "sha256": SHA256} | changes
    )


def leftovers(target):
    """What lies beside the target, apart from the lock."""
    return sorted(file.name for file in target.parent.iterdir() if file.suffix != ".lock")


# ------------------------------------------------------------------------------ networks that fail


def test_downloads_with_a_progress_bar(server, target, capsys):
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == ["file.bin"]
    assert "file.bin: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script",
    [
        [drop(30_000), good],
        [drop(0), drop(50_000), drop(51_000), good],
        [reset, good],
        [stall(40_000), good],
        [no_length, good],
        [drop(30_000), ignore_range],
        [drop(30_000), wrong_range, good],
        [status(503), status(429), good],
        [drop(30_000), status(416), good],
    ],
    ids=lambda script: " ".join(step.__name__ for step in script),
)
def test_recovers(server, target, script):
    server.follow(*script)
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == ["file.bin"]
    assert len(server.requests) == len(script)


def test_resumes_where_it_stopped(server, target):
    server.follow(drop(30_000), good)
    get(server, target)
    assert server.requests[1].headers["Range"] == "bytes=30000-"


@pytest.mark.parametrize(
    ("script", "says", "keeps"),
    [
        ([lie], "SHA-256 differs", []),
        ([portal], "web page instead of the file: log in", []),
        ([status(404)], "answered 404 Not Found", []),
        ([status(403)], "answered 403", []),
        ([status(407)], "the proxy wants a password: set HTTPS_PROXY", []),
        ([status(500)], "HTTP 500 Internal Server Error. Try again later", []),
        ([drop(0)], "the connection broke", ["file.bin.part"]),
        ([stall(0)], "nothing arrived for 0.4 seconds. If", ["file.bin.part"]),
        (
            [drop(40_000), status(503)],
            "503 Service Unavailable (the 40 kB so far are kept). Try again",
            ["file.bin.part"],
        ),
    ],
    ids=["lie", "portal", "404", "403", "407", "500", "drop", "stall", "part"],
)
def test_gives_up_in_one_line(server, target, script, says, keeps):
    server.follow(*script)
    with pytest.raises(DownloadError) as caught:
        get(server, target)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert leftovers(target) == keeps


def test_more_than_the_file_is_not_taken(server, target, monkeypatch):
    monkeypatch.setattr(room, "PROGRESS", 1000)
    server.follow(endless)
    with pytest.raises(DownloadError, match="sends more than the file"):
        get(server, target)
    assert not target.exists()
    assert target.with_name("file.bin.part").stat().st_size < 10 * len(CONTENT)


def test_progress_renews_the_patience(server, target, monkeypatch):
    monkeypatch.setattr(room, "PROGRESS", 5_000)
    server.follow(*[drop(10_000)] * 10, good)  # far more hiccups than RETRIES
    get(server, target)
    assert target.read_bytes() == CONTENT


def test_nobody_listens(server, target):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/x"
        with pytest.raises(DownloadError, match=r"no connection.*HTTPS_PROXY.*SSL_CERT_FILE"):
            get(server, target, url=url)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    begun=st.integers(0, len(CONTENT)),
    garbled=st.booleans(),
    drops=st.lists(st.integers(0, len(CONTENT)), max_size=room.RETRIES - 1),
)
def test_whatever_happened_before_the_file_is_right(server, tmp_path, begun, garbled, drops):
    target = tmp_path / "file.bin"
    target.unlink(missing_ok=True)
    old = CONTENT[:begun]
    target.with_name("file.bin.part").write_bytes(old[::-1] if garbled else old)
    server.follow(*map(drop, drops), good)
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == ["file.bin"]


# ------------------------------------------------------------------------- processes and interrupts


def test_an_interrupted_download_goes_on(server, target, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(room, "sha256_of", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(server, target)
    assert not target.exists()
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[1].headers["Range"] == f"bytes={len(CONTENT)}-"


def test_two_processes_share_one_download(server, target):
    def slow(request):
        request.server.patience.wait(1.5)
        good(request)

    server.follow(slow)
    code = f"""
import pathlib
from common.download import download
download({server.url!r}, pathlib.Path({str(target)!r}), {len(CONTENT)}, {SHA256!r})
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert target.read_bytes() == CONTENT
    assert len(server.requests) == 1


# ---------------------------------------------------------------------------------------- the disk


def test_too_little_room_is_said_before_the_first_byte(server, target):
    with pytest.raises(DownloadError, match=r"is full \(1000000 GB needed.*COURSE_CACHE"):
        get(server, target, size=10**15)
    assert server.requests == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_the_disk_fills_up_on_the_way(server, target):
    target.parent.mkdir()
    target.with_name("file.bin.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match=r"is full.*make room, or set COURSE_CACHE"):
        get(server, target)
    assert not target.exists()


def test_the_cache_folder_is_a_file(server, tmp_path):
    (tmp_path / "cache").write_text("in the way", encoding="utf8")
    with pytest.raises(DownloadError, match=r"can't be written.*set COURSE_CACHE"):
        get(server, tmp_path / "cache" / "file.bin")
    assert server.requests == []


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may write everywhere")
def test_the_cache_folder_is_write_protected(server, target):
    target.parent.mkdir(mode=0o500)
    with pytest.raises(DownloadError, match=r"can't be written.*set COURSE_CACHE"):
        get(server, target)


# ------------------------------------------------------------------------- proxies and certificates


def test_goes_through_the_proxy(server, target, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url.removesuffix("/file.bin"))
    get(server, target, url="http://origin.invalid/file.bin")
    assert target.read_bytes() == CONTENT
    assert server.requests[0].path == "http://origin.invalid/file.bin"


def test_a_mirror_in_the_room_needs_no_proxy(server, target, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    get(server, target, use_proxy=False)
    assert target.read_bytes() == CONTENT


def test_a_dead_proxy_is_named_without_its_password(server, target, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"proxy 127.0.0.1:9.*HTTPS_PROXY") as caught:
        get(server, target, url="https://origin.invalid/file.bin")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("proxy", ["socks9://host:1", "nonsense://x"])
def test_a_proxy_that_makes_no_sense(server, target, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(DownloadError, match="HTTPS_PROXY=http://user:password@host:port"):
        get(server, target)


def test_a_proxy_that_refuses(server, target, monkeypatch):
    with Server() as proxy:
        monkeypatch.setattr(Handler, "do_CONNECT", lambda request: reply(request, 407, b""))
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.removesuffix("/file.bin"))
        with pytest.raises(DownloadError, match=r"the proxy refused .*407.*user:password"):
            get(server, target, url="https://origin.invalid/file.bin")
        proxy.shutdown()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A company's own certificate, for 127.0.0.1 and origin.invalid."""
    folder = tmp_path_factory.mktemp("certificate")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-keyout key.pem -out company.pem -subj /CN=company "
        "-addext subjectAltName=IP:127.0.0.1,DNS:origin.invalid"
    )
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return folder


@pytest.fixture
def secure(certificate):
    import ssl

    with Server() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate / "company.pem", certificate / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server
        server.shutdown()


def test_an_unknown_certificate_is_refused_and_the_remedy_named(secure, target):
    with pytest.raises(DownloadError, match=r"not trusted here.*set SSL_CERT_FILE"):
        get(secure, target, url=secure.url.replace("http:", "https:"))
    assert secure.requests == []


def test_the_companys_certificate_is_trusted(secure, target, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "company.pem"))
    get(secure, target, url=secure.url.replace("http:", "https:"))
    assert target.read_bytes() == CONTENT


def test_https_through_the_companys_proxy(secure, server, target, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "company.pem"))
    monkeypatch.setenv("HTTPS_PROXY", server.url.removesuffix("/file.bin"))
    get(secure, target, url=f"https://origin.invalid:{secure.server_port}/file.bin")
    assert target.read_bytes() == CONTENT
    assert server.requests[0].command == "CONNECT"


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_wrong_certificate_file_is_named(server, target, tmp_path, monkeypatch, content):
    path = tmp_path / "company.pem"
    if content:
        path.write_text(content, encoding="utf8")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(DownloadError, match=r"SSL_CERT_FILE=.*company.pem can't be read"):
        get(server, target)


# ------------------------------------------------------------------------------------- small things


def test_a_changed_file_is_hashed_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    assert sha256_of(path) == hashlib.sha256(b"before").hexdigest()
    path.write_bytes(b"after!")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == hashlib.sha256(b"after!").hexdigest()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (456_318, "456 kB"),
        (1_042_301, "1.0 MB"),
        (98_362_432, "98 MB"),
        (6_431_829_964, "6.4 GB"),
        (9_960_000_000, "10 GB"),
    ],
)
def test_sizes_for_people(size, text):
    assert readable(size) == text


def test_httpx_honours_no_proxy(monkeypatch):
    """What the docstring says of the environment is httpx's doing: notice if it changes."""
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with httpx.Client() as client:
        direct = client._transport_for_url(httpx.URL("http://127.0.0.1/"))
        other = client._transport_for_url(httpx.URL("http://origin.invalid/"))
    assert direct is client._transport
    assert other is not client._transport
