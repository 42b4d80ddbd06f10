"""Freed memory kept at hand: training on Linux without asking the kernel for the same pages again.

A training step of a small model with a large vocabulary asks for tensors of hundreds of megabytes
(the logits are B * T * V numbers) and frees them again. glibc, the C library of most Linux systems,
returns such pieces to the kernel at once, and at the next step the kernel hands them out anew, page
by page, filled with zeros. On a CPU that can take longer than the arithmetic in between.

    keep_freed_memory()       # before training
    keep_freed_memory(False)  # afterwards: as before, and what was kept goes back to the kernel

Nothing is computed differently. The price is memory: pieces kept don't always fit the next request,
so the process may hold more than it uses. mallopt(3), the manual page, has the details.
"""

import ctypes

# The numbers are those of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEEP = 2**31 - 1  # bytes, the largest number that mallopt takes
DEFAULT = 128 * 1024  # bytes, glibc's own


def keep_freed_memory(keep: bool = True) -> bool:
    """Tells glibc to keep what this process frees, or (keep=False) to return large pieces again.

    Returns whether that was possible: False, and nothing happens, on macOS, on Windows, and on
    Linux systems with another C library.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.gnu_get_libc_version  # noqa: B018  musl has mallopt, too, and ignores it
    except (OSError, AttributeError):
        return False
    threshold = KEEP if keep else DEFAULT
    done = [libc.mallopt(option, threshold) for option in (MMAP_THRESHOLD, TRIM_THRESHOLD)]
    if not keep:
        libc.malloc_trim(0)
    return all(done)
