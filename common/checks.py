"""Checks of the software for `course doctor`: Python, its packages, Jupyter, PyTorch.

Each check is a function that returns one Finding. Nothing is imported here that may be missing or
broken: PyTorch is asked in a process of its own, which may crash.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from common.download import readable

PROJECT = Path(__file__).resolve().parents[1]
INTEL_MAC = (
    "PyTorch publishes nothing for Intel Macs since 2.3: use a Linux container or virtual machine "
    "on this Mac, the community's build of PyTorch from conda-forge, or another computer"
)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `status`: "ok", "warn" (something will be slow or missing) or "fail" (the course can't run);
    `remedy`: what to do about it.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


# -------------------------------------------------------------------------- Python and its packages


def check_python() -> Finding:
    """64 bits, and a version that PyTorch supports."""
    version = platform.python_version()
    bits = 8 * struct.calcsize("P")
    detail = f"{version}, {bits}-bit, {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 14) or bits != 64:
        remedy = "the course needs a 64-bit Python 3.11 to 3.14: `uv python install 3.13`, then"
        return Finding("python", "fail", detail, f"{remedy} `uv sync --python 3.13`")
    return Finding("python", "ok", detail)


def check_system() -> Finding:
    """Operating system and processor: does PyTorch publish anything for them?"""
    detail = f"{platform.platform()}, {platform.machine()}"
    if sys.platform == "darwin" and platform.machine() == "x86_64":
        question = ["sysctl", "-n", "sysctl.proc_translated"]
        answer = subprocess.run(question, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == "1":  # an Apple processor that pretends
            remedy = "`uv python install cpython-3.13-macos-aarch64`, delete .venv, `uv sync`"
            return Finding("system", "fail", f"{detail}: Python is for Intel processors", remedy)
        return Finding("system", "fail", f"{detail}: a Mac with an Intel processor", INTEL_MAC)
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        remedy = "PyTorch needs glibc: use a Debian, Ubuntu or Fedora system or container"
        return Finding("system", "warn", f"{detail}: not glibc", remedy)
    return Finding("system", "ok", detail)


def check_environment() -> Finding:
    """Is this the project's own virtual environment?"""
    prefix = Path(sys.prefix).resolve()
    if sys.prefix == sys.base_prefix:
        detail = f"{prefix} is no virtual environment"
    elif prefix.parent == PROJECT or os.environ.get("UV_PROJECT_ENVIRONMENT"):
        return Finding("environment", "ok", str(prefix))
    else:
        detail = f"{prefix} is not the environment of {PROJECT}"
    remedy = "start everything with `uv run`, in the folder of the course"
    return Finding("environment", "warn", detail, remedy)


def check_packages() -> Finding:
    """Is every dependency here, in a version that will do?"""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    for line in importlib.metadata.requires("llm-by-coding") or ():
        need = Requirement(line)
        if need.name == "torch" or (need.marker and not need.marker.evaluate()):
            continue  # torch has a check of its own
        count += 1
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version} is not {need.specifier}")
    if wrong:
        return Finding("packages", "fail", ", ".join(wrong), "`uv sync` installs what is needed")
    return Finding("packages", "ok", f"all {count} that the course needs")


def check_shadowing() -> Finding:
    """Would a notebook started here import another `common` than the course's?"""
    for folder in (str(Path.cwd()), *sys.path[1:]):
        spec = PathFinder.find_spec("common", [folder])
        if spec is None or spec.origin is None:  # a folder without code hides nothing
            continue
        if Path(spec.origin).resolve().parent == PROJECT / "common":
            break
        remedy = "rename or uninstall it, or work in another folder; the course's would be hidden"
        return Finding("common", "fail", f"another `common` comes first: {spec.origin}", remedy)
    return Finding("common", "ok", f"{PROJECT / 'common'}")


def check_kernel() -> Finding:
    """Does the kernel "python3" that JupyterLab offers run this environment's Python?"""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        spec = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        return Finding("kernel", "fail", "Jupyter has no Python kernel", "`uv sync` installs it")
    program = spec.argv[0]
    # Jupyter itself puts the running Python in the place of a bare "python".
    if not os.path.dirname(program) or _same_folder(program, sys.executable):
        return Finding("kernel", "ok", f"python3 runs {sys.executable}")
    remedy = f"it hides the course's: `uv run jupyter kernelspec remove python3` ({program})"
    where = f"{spec.resource_dir} runs another Python"
    return Finding("kernel", "fail", where, remedy)


def _same_folder(one: str, other: str) -> bool:
    return os.path.realpath(os.path.dirname(one)) == os.path.realpath(os.path.dirname(other))


# ----------------------------------------------------------------------------------------- PyTorch

PROBE = """
import json, torch
cuda = torch.cuda.is_available()
cards = range(torch.cuda.device_count() if cuda else 0)
gpus = [torch.cuda.get_device_properties(card) for card in cards]
print(json.dumps({
    "version": torch.__version__,
    "cpu": torch.backends.cpu.get_cpu_capability(),
    "threads": torch.get_num_threads(),
    "gpus": [[g.name, g.total_memory, 10 * g.major + g.minor] for g in gpus],
    "archs": torch.cuda.get_arch_list() if cuda else [],
    "mps": torch.backends.mps.is_available(),
}))
"""


@cache
def start_probe() -> subprocess.Popen:
    """Ask PyTorch about itself, in the background: its import takes most of the doctor's time."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", PROBE], text=True, encoding="utf8", **pipes)


@cache
def probe() -> dict:
    """What PyTorch said of itself; {"error": its last words} if it could not be imported."""
    process = start_probe()
    try:
        answer, complaint = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"error": "it took more than two minutes"}
    if process.returncode == 0:
        return json.loads(answer.splitlines()[-1])
    last = complaint.strip().splitlines()[-1:] or [f"it crashed with status {process.returncode}"]
    return {"error": last[0]}


def check_torch() -> Finding:
    """Can PyTorch be imported?"""
    if importlib.util.find_spec("torch") is None:
        intel_mac = sys.platform == "darwin" and platform.machine() == "x86_64"
        remedy = INTEL_MAC if intel_mac else "`uv sync` installs it"
        return Finding("torch", "fail", "not installed", remedy)
    error = probe().get("error")
    if error is None:
        return Finding("torch", "ok", probe()["version"])
    remedy = "`uv sync --reinstall-package torch`"
    if "WinError" in error:
        remedy = "install Microsoft's Visual C++ Redistributable (x64), then restart the computer"
    elif re.search("status (-4|3221225501)|illegal instruction", error):  # Unix, Windows
        remedy = "this processor lacks instructions that PyTorch needs: use another computer"
    return Finding("torch", "fail", f"can't be imported: {error}", remedy)


def usable_processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where a container may have fewer
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_cpu() -> Finding:
    """Processors, threads, vector instructions."""
    facts = probe()
    usable = usable_processors()
    if "error" in facts:
        return Finding("cpu", "ok", f"{usable} processors")
    detail = f"{usable} processors, {facts['threads']} threads for PyTorch, {facts['cpu']}"
    if platform.machine().lower() in ("x86_64", "amd64") and not facts["cpu"].startswith("AVX"):
        remedy = "without AVX2 everything runs several times slower: prefer the short exercises"
        return Finding("cpu", "warn", detail, remedy)
    if facts["threads"] < usable // 2 and os.environ.get("OMP_NUM_THREADS"):
        detail += f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})"
        return Finding("cpu", "warn", detail, "unset OMP_NUM_THREADS to use the whole processor")
    return Finding("cpu", "ok", detail)


def check_accelerator() -> Finding:
    """A GPU that PyTorch can use. None is needed."""
    facts = probe()
    if "error" in facts:
        return Finding("accelerator", "ok", "unknown: PyTorch does not start")
    if facts["gpus"]:
        built_for = [int("".join(filter(str.isdigit, arch))) for arch in facts["archs"]]
        for name, _, capability in facts["gpus"]:
            if built_for and capability < min(built_for):
                remedy = "set COURSE_DEVICE=cpu: this PyTorch is built for newer cards"
                return Finding("accelerator", "warn", f"{name} is too old for CUDA here", remedy)
        cards = ", ".join(f"{name} ({readable(memory)})" for name, memory, _ in facts["gpus"])
        return Finding("accelerator", "ok", f"CUDA: {cards}")
    if facts["mps"]:
        return Finding("accelerator", "ok", "MPS, the GPU of Apple processors")
    if shutil.which("nvidia-smi"):
        remedy = "update NVIDIA's driver, or go on with the CPU: the course is made for it"
        return Finding(
            "accelerator", "warn", "NVIDIA's driver is here, PyTorch has no CUDA", remedy
        )
    return Finding("accelerator", "ok", "none: the CPU does it all")
