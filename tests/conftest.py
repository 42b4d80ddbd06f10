"""Settings of the unit tests; those of notebooks are in the conftest.py above."""

import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread: tensors are tiny here, and two threads on a busy machine wait for each other."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
