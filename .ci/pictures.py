"""The README's pictures, each an output of a notebook as it is stored there.

    uv run python .ci/pictures.py            write those that are missing or stale
    uv run python .ci/pictures.py --check    only say which those are; status 1 if there are any

They lie in .github/pictures/, in 64 colours instead of 16 million, so that a page opens quickly. A
picture is named here by a piece of the cell that draws it. It is stale when the notebook's own
looks different; a hair's breadth is allowed, since no two trainings are alike. A test runs
the check.
"""

import argparse
import base64
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".github" / "pictures"
PICTURES = {
    "languages.png": ("ch02_text_data/ch02_text_data.ipynb", 'ylabel="tokens, English = 1"'),
    "attention.png": ("ch03_attention/ch03_attention.ipynb", '"average of 270 heads"'),
    "rows.png": ("ch04_gpt_model/ch04_gpt_model.ipynb", 'ylabel="rank among 49,152"'),
    "learning.png": ("ch05_pretraining/ch05_pretraining.ipynb", "train(reader, Windows(8)"),
    "labels.png": (
        "ch06_classification_finetune/ch06_classification_finetune.ipynb",
        "curves(frame)",
    ),
    "leash.png": (
        "ch07_instruction_finetune/ch07_instruction_finetune.ipynb",
        '"no leash": please(',
    ),
}


def drawn(notebook: Path, piece: str) -> Image.Image:
    """What the one cell that holds `piece` and has a picture below it drew last, on white."""
    found = []
    for cell in json.loads(notebook.read_text(encoding="utf8"))["cells"]:
        outputs = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
        if piece in "".join(cell["source"]) and any(outputs):
            found.append([png for png in outputs if png][-1])
    if len(found) != 1:
        sys.exit(f"{notebook}: {len(found)} cells with a picture hold `{piece}`; it must be one")
    image = Image.open(io.BytesIO(base64.b64decode("".join(found[0])))).convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB").quantize(64, dither=Image.Dither.NONE)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of squares of 8 x 8 pixels, 0 to 255; 255 for pictures of unlike size."""
    if one.size != other.size:
        return 255.0
    coarse = (image.convert("RGB").reduce(8) for image in (one, other))
    first, second = (np.asarray(image, dtype=float) for image in coarse)
    return float(np.abs(first - second).mean())


def is_stale(name: str) -> bool:
    """True if the picture is missing, or looks unlike what the notebook holds."""
    path, (notebook, piece) = FOLDER / name, PICTURES[name]
    return not path.exists() or difference(Image.open(path), drawn(ROOT / notebook, piece)) > 2


def write(name: str) -> None:
    """Put the picture in place in one step."""
    notebook, piece = PICTURES[name]
    FOLDER.mkdir(parents=True, exist_ok=True)
    temporary = FOLDER / f"{name}.tmp"
    drawn(ROOT / notebook, piece).save(temporary, "PNG", optimize=True)
    os.replace(temporary, FOLDER / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [name for name in PICTURES if is_stale(name)]
    for name in stale:
        if check:
            print(f"{name} is stale: `uv run python .ci/pictures.py` makes it anew")
        else:
            write(name)
            print(f"{name}  {(FOLDER / name).stat().st_size >> 10} KiB")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
