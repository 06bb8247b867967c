"""Paths that are forced."""

import importlib
import threading

import pytest
import torch

from vtp_kernels.launching import forced_path, paths, recording


@pytest.fixture
def launched():
    """The kernels that a forward pass of gated_linear on a few rows asks for, by name."""
    module = importlib.import_module("vtp_kernels.gated_linear")
    x, weight, gate = (torch.empty(shape, device="meta") for shape in ((64, 128), (128, 128), (128,)))

    def call():
        with recording("gated_linear", "sm_90") as found:
            module._forward_triton(x, weight, gate, None, 0.0)
        return [variant.kernel.__name__ for variant in found.values()]

    return call


def test_a_forced_path_is_taken_and_ends_even_with_an_error(launched):
    fused, vendor = ["_gated_linear_fwd_kernel"], ["_fold_kernel"]
    assert launched() == fused
    with pytest.raises(KeyError), forced_path("gated_linear", "vendor", "weight_side"):
        assert launched() == vendor
        with forced_path("gated_linear", "fused"):
            assert launched() == fused
        assert launched() == vendor
        raise KeyError
    assert launched() == fused


def test_names_that_are_not_known_or_exclude_one_another_are_refused():
    assert paths("gated_linear")[0] == ("fused", "vendor")
    with pytest.raises(ValueError, match="op: got 'linear', expected one of"):
        paths("linear")
    for forced, says in {
        ("fast",): "got 'fast', expected one of fused, vendor",
        ("fused", "vendor"): "got fused and vendor, which exclude one another",
    }.items():
        with pytest.raises(ValueError, match=says), forced_path("gated_linear", *forced):
            pass


def test_another_thread_takes_a_forced_path_but_waits_to_force_its_own(launched):
    found = []

    def force():
        with forced_path("gated_linear", "fused"):
            found.append(launched())

    thread, seen = threading.Thread(target=force), threading.Thread(target=lambda: found.append(launched()))
    with forced_path("gated_linear", "vendor"):
        seen.start()
        seen.join()
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and found == [["_fold_kernel"]]
    thread.join()
    assert found[1:] == [["_gated_linear_fwd_kernel"]]
