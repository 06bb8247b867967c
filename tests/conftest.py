from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def interpreter():
    """A worker process in which Triton kernels run without a GPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.support.triton_harness import Interpreter

    with Interpreter() as worker:
        yield worker
