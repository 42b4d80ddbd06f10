"""A folder of text files as one archive, the same bytes on every machine, and back.

content = folder_archive(Path("plays"))  # so that a folder has a SHA-256, too
unpack(Path("plays.tar"), Path("plays"))
"""

import io
import os
import tarfile
import tempfile
from pathlib import Path


def folder_archive(folder: Path) -> bytes:
    """The Markdown files of a folder as a tar archive, the same bytes on every machine."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        names = {file.relative_to(folder).as_posix(): file for file in folder.glob("*/*.md")}
        for name in sorted(names):
            content = names[name].read_bytes()
            member = tarfile.TarInfo(name)  # no times, no owners
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a verified archive beside itself, then put the folder in place in one step."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = Path(temporary, "new", member.name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tar.extractfile(member).read())
        if folder.exists():  # damaged, or it would have been used
            os.replace(folder, Path(temporary, "old"))
        os.replace(Path(temporary, "new"), folder)
    archive.unlink()
    return folder
