"""What `pyproject.toml` cannot express: threads, no network, and how outputs are compared."""

import os

from hypothesis import settings

# No example has a deadline: these machines, a learner's and CI's, may be busy with something else.
settings.register_profile("course", deadline=None)
settings.load_profile("course")

# One thread per process under pytest -n: two OpenMP threads that must share a core with another
# process are many times slower than one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test and no notebook may reach for the hub; what they need is packaged.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collectstart(collector):
    """Do not compare stderr in notebooks: progress bars and warnings carry times and versions."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare = (*collector.skip_compare, "stderr")
