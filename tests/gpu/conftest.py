"""Tests that need a GPU; elsewhere one case of each is skipped, and says what is missing."""

import os
import sys
from pathlib import Path

import pytest
import torch

from vtp_kernels.launching import forced_path
from vtp_kernels.library import triton_unsupported_reason

HERE = Path(__file__).parent


def missing() -> str | None:
    """What these tests lack here; None where they can run."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return triton_unsupported_reason(torch.device("cuda", torch.cuda.current_device()))


def pytest_configure(config):
    config.addinivalue_line("markers", "sanitizer: small enough to run under compute-sanitizer")


def pytest_collection_modifyitems(config, items):
    reason = missing()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    named, others = set(), []
    for item in items:
        if HERE in item.path.parents:  # this hook is given the items of the whole run
            item.add_marker(skip, append=False)  # before a test's own conditions: its reason is the first
            name = item.nodeid.partition("[")[0]
            if name in named:
                others.append(item)
            named.add(name)
    config.hook.pytest_deselected(items=others)
    gone = set(others)
    items[:] = [item for item in items if item not in gone]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After a stray access nothing runs in this process any more. Among several, it ends with the test that
    made it: pytest-xdist names that one, and the others run in a fresh process."""
    if call.excinfo is not None and missing() is None and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except Exception:
            print(f"{item.nodeid}: {call.excinfo.value}", file=sys.stderr, flush=True)
            os._exit(3)
    return (yield)


def pytest_runtest_logreport(report):
    """A failure is told at once: a run on a GPU may be ended before pytest comes to its summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(f"{report.nodeid}: {crash or report.longreprtext[-300:]}", file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def strict_yardstick():
    """PyTorch's error in the same dtype is the yardstick: sums in 16 bits would make it a lenient one. And
    convolutions, which are the same on both sides, would round float32 to TF32."""
    matmul = torch.backends.cuda.matmul  # computes its attributes: monkeypatch could not put them back
    before_tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names], torch.get_float32_matmul_precision()
    for name in names:
        setattr(matmul, name, False)
    torch.set_float32_matmul_precision("highest")
    yield
    for name, value in zip(names, before[0], strict=True):
        setattr(matmul, name, value)
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cudnn.allow_tf32 = before_tf32


@pytest.fixture
def poisoned():
    """`torch.empty` is full of NaN: an element that no kernel writes is seen. A side effect of this mode."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "this PyTorch does not fill empty memory in deterministic mode"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(params=["table", "fused", "vendor"])
def path(request):
    """Which path `gated_linear` takes: what its table says, or one of the two at any number of rows."""
    forced = [] if request.param == "table" else [request.param]
    with forced_path("gated_linear", *forced):
        yield request.param
