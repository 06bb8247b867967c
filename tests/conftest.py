"""Two lanes: `pytest -m "not thorough"` is the quick one, `pytest` everything; see `support/covering.py`."""

import gc
import os
from importlib.util import find_spec

import pytest
import torch

from tests.support.covering import pytest_collection_modifyitems, pytest_configure  # noqa: F401

# Side by side, one worker of pytest-xdist takes a core, with all that it starts; alone, a run takes two.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("OMP", "OPENBLAS"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

GIB = 2**30
# The process itself, its interpreter of Triton kernels, and one that a test starts, 1 GiB each and some room.
MEMORY_OF_A_WORKER = 4 * GIB


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers():
    """For `-n auto`: two where cores and memory allow, else none. More would not share caches so well."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    workers = min(2, os.cpu_count() or 1, memory // MEMORY_OF_A_WORKER)
    return workers if workers > 1 else 0


def pytest_collection_finish():
    """Modules and tests stay to the end: garbage is not looked for among their million objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)  # once fixtures are torn down
def pytest_runtest_teardown(item, nextitem):
    """So does what the tests of a module leave, imports and caches: measuring memory collects garbage."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def interpreter():
    """A worker process in which Triton kernels run without a GPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.support.triton_harness import Interpreter

    with Interpreter() as worker:
        yield worker
