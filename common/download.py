"""Downloads that survive bad networks: resumed, verified, put in place in one step.

    download("https://…/model.safetensors", Path("model.safetensors"), size=…, sha256="…")

The file grows as `NAME.part` beside its target, is checked, and is then renamed: whoever sees NAME
sees all of it. An interrupted download goes on where it stopped, also in a later process and also
from another server. No ETag is kept for that (If-Range): what is at the address is known by its
SHA-256, a stronger promise, and a part that fails it is thrown away.

Environment variables: HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY; SSL_CERT_FILE and
SSL_CERT_DIR, certificates to trust in addition to the operating system's.
"""

import errno
import hashlib
import os
import shutil
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_SECONDS = 15  # to reach a server
STALL_SECONDS = 30  # without a byte: the connection is dead
RETRIES = 3  # after hiccups in a row, without progress
FIRST_PAUSE = 1.0  # seconds; doubles with each retry
PROGRESS = 1_000_000  # bytes: after so many more, a hiccup is the first again


class DownloadError(Exception):
    """The file could not be downloaded. The message is one line that says why and what to do."""


class _Hiccup(Exception):
    """What another attempt may cure."""


class _Unreachable(_Hiccup):
    """A hiccup for which the way to the server may be to blame."""


def download(url: str, target: Path, size: int, sha256: str, use_proxy: bool = True) -> None:
    """Download `url` to `target` (about `size` bytes), showing a progress bar.

    Processes that want the same file take turns: the second finds what the first has brought.
    Raises DownloadError; `target` is then as it was before.
    """
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if target.is_file() and sha256_of(target) == sha256:
                return
            part = target.with_name(f"{target.name}.part")
            _check_space(target, size - _size(part))
            with _client(use_proxy) as client:
                _complete(client, url, part, size, sha256)
            os.replace(part, target)
    except OSError as error:
        raise DownloadError(_disk_reason(error, target)) from error


def _complete(client, url: str, part: Path, size: int, sha256: str) -> None:
    """Attempt by attempt, until `part` is the file."""
    attempt = 0
    while True:
        before = _size(part)
        try:
            _receive(client, url, part, size)
            if part.exists() and sha256_of(part) == sha256:
                return
            part.unlink(missing_ok=True)
            if before == 0:
                raise DownloadError(
                    f"what {_host(url)} sent is not the file (its SHA-256 differs); "
                    "something on the way may have replaced it: try another network"
                )
            hiccup = "the pieces do not make the file"  # so once more, from the start
        except _Hiccup as error:
            hiccup = error
        attempt = 1 if _size(part) - before > PROGRESS else attempt + 1
        if attempt > RETRIES:
            resume = f" (the {readable(_size(part))} so far are kept)" if _size(part) else ""
            advice = _network_advice() if isinstance(hiccup, _Unreachable) else "Try again later"
            raise DownloadError(f"{_host(url)}: {hiccup}{resume}. {advice}")
        time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))


def _receive(client, url: str, part: Path, size: int) -> None:
    """One request: append to `part` what it lacks, or start it over if the server insists."""
    import httpx

    offset = _size(part)
    headers = {"Accept-Encoding": "identity"}  # the bytes as they are: ranges count them
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        with client.stream("GET", url, headers=headers) as response:
            begin = _accept(response, offset)
            if begin is not None:
                _write(response, part, begin, size)
    except httpx.HTTPError as error:
        raise _translate(error, url) from error


def _write(response, part: Path, begin: int, size: int) -> None:
    from tqdm.auto import tqdm

    bar = tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=part.stem)
    with bar, part.open("r+b" if begin else "wb") as file:
        file.seek(begin)
        for chunk in response.iter_raw():  # as they arrive: what is here is never lost
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > size + PROGRESS:
                raise DownloadError(f"{response.url.host} sends more than the file: not used")
        if "content-length" not in response.headers and file.tell() < size:
            raise _Hiccup("the connection ended early")  # otherwise httpx has noticed


def _accept(response, offset: int) -> int | None:
    """Where in the file this answer's body begins; None if there is nothing to add."""
    status = response.status_code
    host = response.url.host
    if status == 206:
        return offset  # whether it is the right piece, the SHA-256 will tell
    if status == 416:
        return None
    if status == 200 and "text/html" in response.headers.get("content-type", ""):
        raise DownloadError(
            f"{host} answered with a web page instead of the file: log in to this network "
            "in a browser, then try again"
        )
    if status == 200:
        return 0
    if status == 407:
        raise DownloadError(f"the proxy wants a password: {_proxy_advice()}")
    if status in (408, 425, 429) or status >= 500:
        raise _Hiccup(f"HTTP {status} {response.reason_phrase}".strip())
    raise DownloadError(f"{host} answered {status} {response.reason_phrase}".strip())


# ----------------------------------------------------------------------------------- the network


def _client(use_proxy: bool):
    import httpx

    try:
        return httpx.Client(
            verify=_certificates(),
            follow_redirects=True,
            trust_env=use_proxy,
            timeout=httpx.Timeout(STALL_SECONDS, connect=CONNECT_SECONDS),
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise DownloadError(f"the proxy can't be used ({error}): {_proxy_advice()}") from error


def _certificates() -> ssl.SSLContext:
    """Trust the operating system's certificates, certifi's, and those of SSL_CERT_FILE."""
    import certifi

    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file or folder:
        try:
            context.load_verify_locations(file or None, folder or None)
        except OSError as error:
            raise DownloadError(
                f"SSL_CERT_FILE={file or folder} can't be read as certificates ({error}): "
                "let it name a .pem file"
            ) from error
    # Python 3.13 began to insist on certificate extensions that many companies' own lack.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _translate(error: Exception, url: str) -> Exception:
    """What httpx raised, as a hiccup to retry or as an error that says what to do."""
    import httpx

    reasons, cause = [], error
    while cause is not None:
        reasons.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(reason, ssl.SSLCertVerificationError) for reason in reasons):
        return DownloadError(
            f"the certificate of {_host(url)} is not trusted here. On a company's network, set "
            "SSL_CERT_FILE to the company's certificates (a .pem file; the IT department has it)"
        )
    if isinstance(error, httpx.ProxyError):
        return DownloadError(f"the proxy refused ({error}): {_proxy_advice()}")
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
        return _Unreachable(f"no connection ({error or 'timeout'})")
    if isinstance(error, httpx.TimeoutException):
        return _Unreachable(f"nothing arrived for {STALL_SECONDS:g} seconds")
    if isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol):
        return _Unreachable(f"the connection broke ({error})")
    return DownloadError(f"{url} can't be downloaded ({error})")


def _network_advice() -> str:
    if _proxy():
        return f"The proxy {_proxy()} was used: if it is the wrong one, correct HTTPS_PROXY"
    return (
        "If this network has a proxy, set HTTPS_PROXY=http://host:port; if it has its own "
        "certificates, set SSL_CERT_FILE"
    )


def _proxy_advice() -> str:
    used = f", now {_proxy()}" if _proxy() else ""
    return f"set HTTPS_PROXY=http://user:password@host:port{used}"


def _proxy() -> str:
    """The proxy in use, without the password."""
    from urllib.request import getproxies  # the environment's, or the operating system's

    proxies = getproxies()
    chosen = proxies.get("https") or proxies.get("http") or proxies.get("all") or ""
    return chosen.rpartition("@")[2] if "@" in chosen else chosen


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2] or url


# -------------------------------------------------------------------------------------- the disk


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{readable(needed)} needed, {readable(free)} free")


def _disk_reason(error: OSError, target: Path) -> str:
    remedy = "set COURSE_CACHE to a folder on another disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk with {target.parent} is full ({error.strerror}): make room, or {remedy}"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"{target.parent} can't be written ({error.strerror}): {remedy}"
    return f"{target} can't be written ({error.strerror or error}): {remedy}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


_hashed: dict[tuple, str] = {}  # what this process has read: (path, size, time) -> SHA-256


def sha256_of(path: Path) -> str:
    """SHA-256 of a file. One that has not changed (size, time) is not read a second time."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _hashed:
        with path.open("rb") as stream:
            _hashed[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashed[key]


def readable(size: float) -> str:
    """A number of bytes for people: 98362432 -> '98 MB'."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{int(size < 9.95 * factor)}f} {unit}"
    return f"{size:.0f} bytes"
