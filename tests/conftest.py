"""Two lanes: `pytest -m "not thorough"` runs the quick one, `pytest` everything. See `support/covering.py`."""

import os
from importlib.util import find_spec

import pytest
import torch

from tests.support.covering import set_aside

# Side by side, one worker of pytest-xdist takes a core; alone, a run takes two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

GIB = 2**30
# What a run of the tests needs: the worker itself, its interpreter of Triton kernels, and a model being trained.
MEMORY_OF_A_WORKER = 4 * GIB


def pytest_configure(config):
    config.addinivalue_line("markers", "thorough: run by `make test-all`, left out by `make test`")
    config.addinivalue_line(
        "markers", "covering(strength=2, by=None): what the quick lane takes of a product of parameters"
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items):
    for item in set_aside(items):
        item.add_marker(pytest.mark.thorough)


def pytest_xdist_auto_num_workers():
    """For `-n auto`: two where cores and memory allow, else none. More would not share caches so well."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = min(2, os.cpu_count() or 1, memory // MEMORY_OF_A_WORKER)
    return workers if workers > 1 else 0


@pytest.fixture(scope="session")
def interpreter():
    """A worker process in which Triton kernels run without a GPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.support.triton_harness import Interpreter

    with Interpreter() as worker:
        yield worker
