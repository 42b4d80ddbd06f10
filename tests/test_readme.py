"""The front page keeps its word: commands that exist, pictures and quotations from the notebooks.

uv run pytest tests/test_readme.py
"""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")


def load_pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / ".ci" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pictures = load_pictures()


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_notebooks_hold_and_are_small(name):
    assert not pictures.is_stale(name), f"{name}: run `uv run python .ci/pictures.py`"
    assert (pictures.FOLDER / name).stat().st_size < 120_000


def test_another_picture_would_be_noticed():
    rows, learning = (pictures.drawn(ROOT / n, p) for n, p in list(pictures.PICTURES.values())[2:4])
    assert pictures.difference(rows, rows) == 0
    assert pictures.difference(rows, learning) > 4
