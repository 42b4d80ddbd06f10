"""glibc keeps what is freed when told to, and gives it back when told to stop."""

import platform
import subprocess
import sys

import pytest

from common.allocator import keep_freed_memory

FAULTS = """
import resource
import torch
from common.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16_000_000)  # 64 MB: 16,000 pages of 4 kB, or 32 of 2 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = faults()
assert keep_freed_memory()
for _ in range(6):  # taken from the kernel once more, until a piece fits wherever it goes
    faults()
kept = faults()
assert keep_freed_memory(False)
print(default, kept, faults())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so fast"
)
def test_pages_are_taken_once_instead_of_at_every_step():
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    default, kept, afterwards = map(int, run.stdout.split())
    assert kept < 0.2 * default
    assert afterwards > 0.2 * default  # the first of four, at least: the heap may keep a place free


@pytest.mark.skipif(platform.libc_ver()[0] == "glibc", reason="for the others")
def test_elsewhere_nothing_happens():
    assert not keep_freed_memory()
