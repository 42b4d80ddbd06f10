"""How long `course doctor` takes, beside the import of PyTorch that it contains.

    uv run python tests/benchmarks/bench_doctor.py

The figure to reach: under 5 seconds.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 7
COMMANDS = {
    "course doctor": [sys.executable, "-m", "common.cli", "doctor"],
    "import torch": [sys.executable, "-c", "import torch"],
    "course fetch --list": [sys.executable, "-m", "common.cli", "fetch", "--list"],
}


def seconds(command: list[str]) -> float:
    """Wall-clock time of one run."""
    started = time.perf_counter()
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


times: dict[str, list[float]] = {name: [] for name in COMMANDS}
for _ in range(ROUNDS):  # interleaved: a busy minute hits all alike
    for name, command in COMMANDS.items():
        times[name].append(seconds(command))
print(f"seconds, {ROUNDS} interleaved rounds")
for name, measured in times.items():
    print(f"{name:20}  best {min(measured):5.2f}   median {statistics.median(measured):5.2f}")
ratio = statistics.median(times["course doctor"]) / statistics.median(times["import torch"])
print(f"the doctor takes {ratio:.2f} times as long as the import of PyTorch alone")
