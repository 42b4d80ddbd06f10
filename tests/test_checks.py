"""The software checks of `course doctor`, each on the machines it exists for."""

import json
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest

from common import checks
from common.checks import Finding

VersionInfo = namedtuple("version_info", "major minor micro releaselevel serial")
HEALTHY = {"version": "2.15.0", "cpu": "AVX2", "threads": 4, "gpus": [], "archs": [], "mps": False}


@pytest.fixture
def torch_says(monkeypatch):
    """Answer for PyTorch."""

    def answer(**changes):
        monkeypatch.setattr(checks, "probe", lambda: HEALTHY | changes)

    answer()
    return answer


def machine(monkeypatch, system, processor):
    monkeypatch.setattr(checks.sys, "platform", system)
    monkeypatch.setattr(checks.platform, "machine", lambda: processor)


# --------------------------------------------------------------------- this machine runs the tests


@pytest.mark.parametrize(
    "check", [checks.check_python, checks.check_packages], ids=lambda c: c.__name__
)
def test_the_machine_that_runs_this_passes(check):
    assert check().status == "ok"


def test_pytorch_answers_from_a_process_of_its_own():
    checks.start_probe.cache_clear()
    checks.probe.cache_clear()
    facts = checks.probe()
    assert set(facts) == set(HEALTHY)
    assert checks.check_torch() == Finding("torch", "ok", facts["version"])
    assert facts["threads"] >= 1
    json.dumps(facts)


# ------------------------------------------------------------------------------------------ Python


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 14), "ok"), ((3, 15), "fail")]
)
def test_python_versions(monkeypatch, version, status):
    monkeypatch.setattr(checks.sys, "version_info", VersionInfo(*version, 0, "final", 0))
    finding = checks.check_python()
    assert finding.status == status
    assert ("uv python install" in finding.remedy) == (status == "fail")


def test_python_of_32_bits(monkeypatch):
    monkeypatch.setattr(checks.struct, "calcsize", lambda format: 4)
    assert checks.check_python().status == "fail"
    assert "64-bit" in checks.check_python().remedy


@pytest.mark.parametrize(("translated", "says"), [("0", "Linux container"), ("1", "macos-aarch64")])
def test_macs_with_intel_and_macs_that_pretend(monkeypatch, translated, says):
    machine(monkeypatch, "darwin", "x86_64")
    answer = SimpleNamespace(stdout=f"{translated}\n")
    monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: answer)
    finding = checks.check_system()
    assert finding.status == "fail"
    assert says in finding.remedy


def test_linux_without_glibc(monkeypatch):
    machine(monkeypatch, "linux", "x86_64")
    monkeypatch.setattr(checks.platform, "libc_ver", lambda: ("", ""))
    assert checks.check_system().status == "warn"
    assert "needs glibc" in checks.check_system().remedy


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_usual_systems(monkeypatch, system):
    machine(monkeypatch, system, "arm64")
    monkeypatch.setattr(checks.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert checks.check_system().status == "ok"


def test_environments(monkeypatch, tmp_path):
    monkeypatch.delenv("UV_PROJECT_ENVIRONMENT", raising=False)
    monkeypatch.setattr(checks, "PROJECT", tmp_path)
    monkeypatch.setattr(checks.sys, "prefix", str(tmp_path / ".venv"))
    assert checks.check_environment().status == "ok"
    monkeypatch.setattr(checks.sys, "prefix", str(tmp_path / "elsewhere" / "venv"))
    assert checks.check_environment().status == "warn"
    assert "is not the environment of" in checks.check_environment().detail
    monkeypatch.setattr(checks.sys, "prefix", sys.base_prefix)
    assert "is no virtual environment" in checks.check_environment().detail
    assert "`uv run`" in checks.check_environment().remedy


def test_missing_and_old_packages(monkeypatch):
    needs = ["numpy>=1", "tqdm>=999", "no-such-thing>=1", "torch>=999", "nt>1; sys_platform=='x'"]
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda name: needs)
    finding = checks.check_packages()
    assert finding.status == "fail"
    assert finding.detail.endswith("is not >=999, no-such-thing is missing")
    assert finding.detail.startswith("tqdm ")
    assert "uv sync" in finding.remedy


@pytest.mark.parametrize("form", ["common.py", "common/__init__.py"])
def test_another_common_in_the_way(monkeypatch, tmp_path, form):
    monkeypatch.chdir(tmp_path)
    assert checks.check_shadowing().status == "ok"
    (tmp_path / form).parent.mkdir(exist_ok=True)
    (tmp_path / form).touch()
    finding = checks.check_shadowing()
    assert finding.status == "fail"
    assert str(tmp_path / form) in finding.detail
    assert "rename" in finding.remedy


def test_a_folder_named_common_hides_nothing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "common").mkdir()
    assert checks.check_shadowing().status == "ok"
    ran = subprocess.run(  # as Python sees it
        [sys.executable, "-c", "import common; print(common.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(checks.PROJECT) in ran.stdout


def test_another_common_further_up_the_path(monkeypatch, tmp_path):
    (tmp_path / "common.py").touch()
    monkeypatch.setattr(checks.sys, "path", [sys.path[0], str(tmp_path), *sys.path[1:]])
    monkeypatch.chdir(tmp_path.parent)
    assert checks.check_shadowing().status == "fail"


# ----------------------------------------------------------------------------------------- Jupyter


@pytest.fixture
def kernel(monkeypatch):
    """Install a kernel "python3" that runs this program; None: no kernel at all."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def install(program):
        def find(self, name):
            if program is None:
                raise NoSuchKernel(name)
            return SimpleNamespace(
                argv=[program, "-m", "ipykernel"], resource_dir="/kernels/python3"
            )

        monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", find)

    return install


@pytest.mark.parametrize("program", ["python", sys.executable])
def test_the_right_kernel(kernel, program):
    kernel(program)
    assert checks.check_kernel().status == "ok"


def test_a_kernel_of_another_python_hides_ours(kernel):
    kernel("/usr/local/anaconda/bin/python")
    finding = checks.check_kernel()
    assert finding.status == "fail"
    assert "kernelspec remove python3" in finding.remedy
    assert "/usr/local/anaconda/bin/python" in finding.remedy


def test_no_kernel(kernel):
    kernel(None)
    assert checks.check_kernel() == Finding(
        "kernel", "fail", "Jupyter has no Python kernel", "`uv sync` installs it"
    )


# ----------------------------------------------------------------------------------------- PyTorch


@pytest.mark.parametrize(
    ("system", "processor", "says"),
    [("linux", "x86_64", "uv sync"), ("darwin", "x86_64", "Intel"), ("darwin", "arm64", "uv sync")],
)
def test_pytorch_is_missing(monkeypatch, system, processor, says):
    machine(monkeypatch, system, processor)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    finding = checks.check_torch()
    assert finding.status == "fail"
    assert says in finding.remedy


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise OSError('[WinError 126] fbgemm.dll')", "Visual C++ Redistributable"),
        ("import os; os.kill(os.getpid(), 4)", "lacks instructions"),
        ("raise ImportError('libtorch_cpu.so: file too short')", "--reinstall-package torch"),
    ],
)
def test_pytorch_is_broken(monkeypatch, code, says):
    if "kill" in code and sys.platform == "win32":
        pytest.skip("Windows has no SIGILL")
    for cached in (checks.start_probe, checks.probe):
        cached.cache_clear()
    monkeypatch.setattr(checks, "PROBE", code)
    finding = checks.check_torch()
    for cached in (checks.start_probe, checks.probe):
        cached.cache_clear()
    assert finding.status == "fail"
    assert says in finding.remedy


def test_a_broken_pytorch_stops_no_other_check(monkeypatch):
    monkeypatch.setattr(checks, "probe", lambda: {"error": "ImportError: no"})
    assert checks.check_torch().status == "fail"
    assert checks.check_cpu().status == "ok"
    assert checks.check_accelerator().status == "ok"


@pytest.mark.parametrize(
    ("processor", "capability", "status"),
    [
        ("x86_64", "AVX512", "ok"),
        ("AMD64", "AVX2", "ok"),
        ("x86_64", "DEFAULT", "warn"),
        ("AMD64", "NO AVX", "warn"),
        ("arm64", "DEFAULT", "ok"),
    ],
)
def test_vector_instructions(monkeypatch, torch_says, processor, capability, status):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(checks.platform, "machine", lambda: processor)
    torch_says(cpu=capability)
    finding = checks.check_cpu()
    assert finding.status == status
    assert ("AVX2" in finding.remedy) == (status == "warn")


def test_fewer_threads_than_processors(monkeypatch, torch_says):
    monkeypatch.setattr(checks, "usable_processors", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch_says(threads=1)
    assert checks.check_cpu().status == "warn"
    assert "unset OMP_NUM_THREADS" in checks.check_cpu().remedy
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert checks.check_cpu().status == "ok"


def test_gpus(monkeypatch, torch_says):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert checks.check_accelerator().detail == "none: the CPU does it all"
    torch_says(mps=True)
    assert checks.check_accelerator().detail.startswith("MPS")
    archs = ["sm_75", "sm_90", "sm_90a", "compute_120"]
    torch_says(gpus=[["Tesla T4", 15_000_000_000, 75]], archs=archs)
    assert checks.check_accelerator() == Finding("accelerator", "ok", "CUDA: Tesla T4 (15 GB)")
    torch_says(gpus=[["Tesla K80", 12_000_000_000, 37]], archs=archs)
    assert checks.check_accelerator().status == "warn"
    assert "COURSE_DEVICE=cpu" in checks.check_accelerator().remedy


def test_a_driver_without_cuda(monkeypatch, torch_says):
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = checks.check_accelerator()
    assert finding.status == "warn"
    assert "driver" in finding.remedy
