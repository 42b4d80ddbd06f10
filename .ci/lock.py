"""Make `uv.lock` free of index addresses, so that one file serves every mirror.

    uv run --no-sync python .ci/lock.py              resolve, then strip
    uv run --no-sync python .ci/lock.py --upgrade    the same with the newest versions

uv writes the address of the index, and of every file on it, into its lock. Behind a company's
mirror or in a classroom with its own cache those addresses are wrong, and uv would ask them all the
same. What is kept here is the decision: names, versions, markers, dependencies. uv takes every
locked version as its preference and completes the file with the addresses of whichever index the
machine is set up to use. `git checkout uv.lock` undoes that completion at any time.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "uv.lock"


def strip(text: str) -> str:
    """Return lock file `text` without addresses, file lists and the copy of our metadata."""
    text = re.sub(r'\{ registry = "[^"]*"', '{ registry = "index"', text)
    text = re.sub(r"^sdist = \{.*\}\n", "", text, flags=re.M)
    text = re.sub(r"^wheels = \[\n(?:    .*\n)*\]\n", "", text, flags=re.M)
    text = re.sub(r"^\[package\.metadata(?:\..*)?\]\n(?:.+\n)*\n?", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text)


def main() -> None:
    subprocess.run(["uv", "lock", *sys.argv[1:]], cwd=LOCK.parent, check=True)
    stripped = strip(LOCK.read_text(encoding="utf8"))
    if "://" in stripped:
        line = next(line for line in stripped.splitlines() if "://" in line)
        sys.exit(f"an address is left in uv.lock: {line!r}; teach .ci/lock.py to remove it")
    temporary = LOCK.with_suffix(".lock.tmp")
    temporary.write_text(stripped, encoding="utf8")
    os.replace(temporary, LOCK)
    print(f"{LOCK.name}: {stripped.count('[[package]]')} packages, no addresses")


if __name__ == "__main__":
    main()
