"""Paths that are forced, and the assembler for Hopper."""

import importlib
import importlib.util
import threading
import types

import pytest
import torch

from vtp_kernels import launching, library
from vtp_kernels.launching import Config, forced_path, launch, paths, recording


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


def tools(ptxas, ptxas_blackwell):
    """Triton's assemblers of these versions; one of None is missing."""
    found = {"ptxas": ptxas, "ptxas_blackwell": ptxas_blackwell}
    return types.SimpleNamespace(
        **{n: types.SimpleNamespace(path=n, version=version) for n, version in found.items() if version}
    )


@pytest.mark.parametrize(
    ("ptxas", "ptxas_blackwell", "taken"),
    [
        ("12.8", "12.9", "ptxas_blackwell"),  # Triton 3.6
        ("12.9", "13.4", None),  # Triton 3.9: what it takes by itself will do
        ("13.0", None, None),
        ("12.10", "12.8", None),  # no string: 12.10 is later than 12.9
    ],
)
def test_hopper_is_assembled_by_a_sound_ptxas(monkeypatch, ptxas, ptxas_blackwell, taken):
    found = tools(ptxas, ptxas_blackwell)
    before = found.ptxas
    monkeypatch.setattr(launching.triton, "knobs", types.SimpleNamespace(nvidia=found))
    assert launching.unsound_assembler.__wrapped__() is None
    assert found.ptxas == (taken or before)


@pytest.mark.parametrize(("ptxas", "ptxas_blackwell"), [("12.8", None), ("12.8", "12.8"), (None, None)])
def test_without_a_sound_ptxas_hopper_runs_on_pytorch(monkeypatch, ptxas, ptxas_blackwell):
    monkeypatch.setattr(
        launching.triton, "knobs", types.SimpleNamespace(nvidia=tools(ptxas, ptxas_blackwell))
    )
    reason = launching.unsound_assembler.__wrapped__()
    assert "12.9" in reason and (ptxas or "none") in reason
    monkeypatch.setattr(launching, "unsound_assembler", lambda: reason)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    for capability, expected in (((9, 0), f"H100: {reason}"), ((8, 0), None), ((10, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert library.triton_unsupported_reason.__wrapped__(torch.device("cuda")) == expected


def matrix(dtype=torch.float32):
    return torch.zeros(16, 16, dtype=dtype)


# What differs from a launch of `_fold_kernel`, and whether that is said to need another compilation.
LAUNCHES = {
    "the first": ({}, True),
    "other tensors": ({"weight": matrix(), "N": 1}, False),
    "another dtype": ({"folded": matrix(torch.float16), "kinds": (torch.float16,)}, True),
    "another tile": ({"config": Config.of(4, 1, BLOCK_N=32, BLOCK_K=16)}, True),
    "other warps": ({"config": Config.of(8, 1, BLOCK_N=16, BLOCK_K=16)}, True),
    "not said": ({"kinds": None}, None),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_launch_that_is_said_to_be_like_an_earlier_one_is_that_without_triton_s_search(monkeypatch):
    from tests.support import stand_in_driver

    kernel = importlib.import_module("vtp_kernels.gated_linear")._fold_kernel
    searches, launches, run = [], [], type(kernel).run

    def counted(self, *args, **kwargs):
        searches.append(self)
        return run(self, *args, **kwargs)

    class Launcher(stand_in_driver._Launcher):
        def __init__(self, source, metadata):
            self.compilation = metadata.hash

        def __call__(self, *arguments):
            sizes, values = arguments[:3], arguments[-len(kernel.arg_names) :]
            launches.append(
                (self.compilation, sizes, [getattr(v, "data_ptr", lambda v=v: v)() for v in values])
            )

    monkeypatch.setattr(type(kernel), "run", counted)
    monkeypatch.setattr(stand_in_driver._Driver, "launcher_cls", Launcher)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    base = dict(weight=matrix(), gate=torch.ones(16), folded=matrix(torch.bfloat16), N=16, K=16, stride_w=16)
    options = dict(config=Config.of(4, 1, BLOCK_N=16, BLOCK_K=16), kinds=(torch.bfloat16,))
    compilations = set()
    with stand_in_driver.gpu("sm_90"):
        for name, (changed, is_new) in LAUNCHES.items():
            given = {**base, **options, **changed}
            how = {n: given.pop(n) for n in options}
            for searched in (True, True) if is_new is None else (is_new, False):
                searches.clear()
                launch(kernel, (3, 2), given, **how, ALIGNED=True)
                assert bool(searches) == searched, name
            first, second = launches[-2:]
            assert first == second and first[1] == (3, 2, 1), name
            assert first[2][:3] == [given[n].data_ptr() for n in ("weight", "gate", "folded")], name
            assert (first[0] not in compilations) == bool(is_new), name
            compilations.add(first[0])
