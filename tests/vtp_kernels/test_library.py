"""The op library where something is missing."""

import subprocess
import sys

import torch

from vtp_kernels import launching, library

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, vtp
from vtp_kernels import library, launching, gated_linear
from vtp_kernels.gated_linear import gated_linear_ref
assert not launching.HAS_TRITON
x, weight, gate = torch.randn(9, 5), torch.randn(7, 5), torch.randn(5, requires_grad=True)
y = gated_linear(x, weight, gate)
y.sum().backward()
torch.testing.assert_close(y, gated_linear_ref(x, weight, gate))
print(library.triton_unsupported_reason(torch.device("cuda")))
"""


def test_without_triton_the_package_imports_and_the_ops_work():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Triton is not installed"


def test_on_a_gpu_that_cannot_run_the_kernels_it_says_once_why_and_what_is_slower(recwarn):
    library._warn_once.cache_clear()
    for _ in range(2):
        library._warn_once("Triton is not installed")
    (warning,) = recwarn
    assert "Triton is not installed" in str(warning.message) and "slower" in str(warning.message)


def test_a_recording_launches_nothing_and_ends():
    with launching.recording("op", "sm_90") as found:
        assert launching.has_descriptors(torch.device("meta"))
    assert found == {}
    assert not launching.has_descriptors(torch.device("cpu"))
