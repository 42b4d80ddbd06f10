"""A classroom mirror: one machine offers the others the files of the course.

    uv run course fetch --serve                                    # the instructor
    COURSE_MIRROR=http://192.168.1.5:8000 uv run course fetch --all   # everyone else

It also takes what each laptop's doctor found, for `course doctor --room` (`common.classroom`).
Only the assets of `common.assets` are offered, by name, and only after verification; learners
verify what they get. Plain HTTP with ranges (RFC 9110, section 14), so downloads can resume.
"""

import io
import os
import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from common import classroom
from common.assets import ASSETS, Asset, folder_archive, locate
from common.classroom import ReportError
from common.download import readable

PORT = 8000


class MirrorError(Exception):
    """The mirror can't be started or asked. The message is one line."""


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD: "/" lists the names of the assets on offer, "/FILE" sends one.

    POST "/doctor" takes a laptop's report, GET gives all of them, to this machine alone.
    """

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a client that no longer answers

    def do_GET(self):
        """Answer GET, and HEAD without the body."""
        name = unquote(self.path.partition("?")[0]).removeprefix("/")
        if not name:
            listing = "".join(f"{asset.name}\n" for asset in offered()).encode()
            return self._send(io.BytesIO(listing), len(listing), "text/plain")
        if self.path == classroom.PATH:
            if self.client_address[0] not in ("127.0.0.1", "::1", own_address()):
                return self.send_error(403, "Only the machine that serves may read the reports")
            reports = self.server.reports.as_json()
            return self._send(io.BytesIO(reports), len(reports), "application/json")
        # A name is looked up, never opened as a path: nothing else can be reached.
        asset = next((asset for asset in ASSETS.values() if asset.remote_name == name), None)
        path = asset and locate(asset)[0]
        if not path:
            return self.send_error(404, "Not offered here")
        if asset.is_folder:
            archive = folder_archive(path)
            return self._send(io.BytesIO(archive), len(archive), etag=asset.sha256)
        with path.open("rb") as file:
            return self._send(file, path.stat().st_size, etag=asset.sha256)

    do_HEAD = do_GET

    def do_POST(self):
        """Take a report. Whatever is refused, its sender hears why, and is hung up on."""
        length = self.headers.get("Content-Length", "")
        if self.path != classroom.PATH:
            return self._refuse(404, "Reports go to /doctor")
        if not re.fullmatch(r"\d{1,9}", length) or "Transfer-Encoding" in self.headers:
            return self._refuse(411, "A report says how long it is")
        if int(length) > classroom.LARGEST:
            return self._refuse(413, f"A report has at most {classroom.LARGEST} bytes")
        try:
            self.server.reports.add(self.client_address[0], self.rfile.read(int(length)))
        except ReportError as error:
            return self._refuse(400, str(error))
        self.send_response(204)
        return self.end_headers()

    def _refuse(self, status: int, reason: str) -> None:
        self.close_connection = True
        self.send_error(status, reason)

    def _send(self, file, size: int, kind: str = "application/octet-stream", etag: str = ""):
        first, last = self._range(size, etag)
        if first > last:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        partial = last - first + 1 < size
        self.send_response(206 if partial else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "GET":
            file.seek(first)
            _copy(file, self.wfile, last - first + 1)

    def _range(self, size: int, etag: str) -> tuple[int, int]:
        """First and last byte asked for; everything where the request does not say it clearly."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.headers.get("If-Range", f'"{etag}"') != f'"{etag}"':
            return 0, size - 1
        last = int(asked[2]) if asked[2] else size - 1
        return int(asked[1]), min(last, size - 1)

    def log_message(self, format, *args):
        print(f"{self.address_string()}  {format % args}", file=sys.stderr)


class Server(ThreadingHTTPServer):
    """A thread for every learner."""

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # on Windows, two servers would share the port
    request_queue_size = 64  # a room that begins all at once

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.reports = classroom.Reports()

    def handle_error(self, request, client_address):
        """A learner who closes the laptop is no error worth a traceback."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def serve(host: str = "0.0.0.0", port: int = PORT) -> None:
    """Offer every verified file of this machine until Ctrl-C. Raises MirrorError, in one line."""
    try:
        server = Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MirrorError(f"can't listen on port {port} ({reason}): try another --port") from None
    address = f"http://{own_address() if host == '0.0.0.0' else host}:{server.server_port}"
    files = offered()
    missing = [asset.name for asset in ASSETS.values() if asset not in files]
    print(f"{len(files)} files, {readable(sum(f.size for f in files))}, are offered at {address}")
    if missing:
        print(f"Not here, so not offered: {', '.join(missing)} (`uv run course fetch NAME`)")
    print("Learners type, in the folder of the course,")
    print(f"  on Linux and macOS: COURSE_MIRROR={address} uv run course fetch --all")
    print(f'  in PowerShell:      $env:COURSE_MIRROR="{address}"; uv run course fetch --all')
    print("Is the room ready? Learners: the same with `uv run course doctor --send` at the end.")
    print(
        f"  Here, in a second terminal:  uv run course doctor --room 127.0.0.1:{server.server_port}"
    )
    print("Ctrl-C stops it. A firewall may ask whether Python may accept connections: it must.")
    sys.stdout.flush()
    with server:
        server.serve_forever()


def offered() -> list[Asset]:
    """The assets that are on this machine, verified."""
    return [asset for asset in ASSETS.values() if locate(asset)[0]]


def names_at(mirror: str) -> set[str]:
    """The names of the assets that a mirror offers. Raises MirrorError, in one line."""
    import httpx

    address = mirror if "://" in mirror else f"http://{mirror}"
    try:
        # A company's proxy does not reach into the room.
        answer = httpx.get(address, trust_env=False, timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MirrorError(
            f"the mirror COURSE_MIRROR={mirror} does not answer ({error}): is it running, is this "
            "machine in the same network? Unset COURSE_MIRROR to download from the origins"
        ) from None
    return set(answer.text.split()) & set(ASSETS)


def own_address() -> str:
    """This machine's address in the local network, as others see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: it only picks the way out
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _copy(source, target, count: int) -> None:
    while count > 0 and (chunk := source.read(min(count, 1 << 18))):
        target.write(chunk)
        count -= len(chunk)
