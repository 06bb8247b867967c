import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "bench"))  # its scripts import their neighbours
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def interpreter():
    """A worker process in which Triton kernels run without a GPU."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from triton_harness import Interpreter

    with Interpreter() as worker:
        yield worker
