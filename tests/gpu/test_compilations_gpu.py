"""What Triton compiles on a GPU when the ops are called: nothing for a new batch size, nothing unforeseen."""

import importlib
import itertools
from collections import defaultdict

import pytest
import torch

from tests.support.gated_linear_cases import DTYPES, L1, inputs
from tests.support.op_checks import leaves
from tests.vtp_kernels.test_gated_linear import run
from vtp_kernels import gated_linear, launching

gated_linear_module = importlib.import_module("vtp_kernels.gated_linear")


class Compilations:
    """`triton` has Triton's name of each compilation, `launched` the distinct variants asked for."""

    def __init__(self):
        self.triton = []
        self.launched = {}


def kernels(module):
    names = [name for name in vars(module) if name.endswith("_kernel")]
    return [getattr(module, name) for name in names]


@pytest.fixture(scope="module")
def foreseen(device):
    """The keys of all variants for this GPU; found before a test forces a path or notes launches."""
    # Of a chip, variants depend on this alone.
    target = "sm_90" if launching.has_descriptors(device) else "sm_80"
    return {variant.key() for variant in gated_linear_module.variants(target)}


@pytest.fixture
def compilations(monkeypatch):
    """Everything is compiled anew within the test, and noted twice: as launched here, and by Triton."""
    import triton

    noted = Compilations()
    recorder, real = launching.Recording("gated_linear", "of this machine"), gated_linear_module.launch
    noted.launched = recorder.variants

    def launch(kernel, grid, arguments, config, **constants):
        recorder.add(kernel, arguments, config, constants)
        real(kernel, grid, arguments, config, **constants)

    def after_compiling(*, repr, fn, **_):
        if fn.module == gated_linear_module.__name__:
            noted.triton.append(repr)

    monkeypatch.setattr(gated_linear_module, "launch", launch)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", after_compiling)
    for kernel in kernels(gated_linear_module):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return noted


def use(device, M, widths, dtypes, all_needs=False):
    """Forward with and without gradients, and backward with all of them or with every subset."""
    x, weight, gate, bias, dy = (t.to(device) for t in inputs(M, *widths, *DTYPES[dtypes]))
    with torch.no_grad():
        gated_linear(x, weight, gate, bias)
        gated_linear(x, weight, gate, None)
    for needs in itertools.product((False, True), repeat=4) if all_needs else [(True,) * 4]:
        if any(needs):
            run(lambda *t: gated_linear(*t, l1=L1), leaves((x, weight, gate, bias), needs), dy)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16-f32"])
@pytest.mark.parametrize("widths", [(461, 115), (384, 384)], ids=["odd", "aligned"])
def test_a_new_batch_size_compiles_nothing(device, path, compilations, widths, dtypes):
    tokens = 50
    # One of each: fewer rows than outputs or more, so many that they are split, more than the table's bound.
    for batch in (1, 3, 7, 8, 32, 128):
        use(device, batch * tokens, widths, dtypes)
    before = len(compilations.triton)
    assert before, "nothing was compiled: the hook is not called"
    for batch in (2, 4, 5, 6, 16, 17, 31, 64, 100, 127):
        use(device, batch * tokens, widths, dtypes)
    assert compilations.triton[before:] == []


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_whatever_is_launched_is_among_the_variants_that_are_compiled_ahead(
    device, foreseen, path, compilations, precision
):
    torch.set_float32_matmul_precision(precision)
    for dtypes, widths, M in itertools.product(DTYPES, [(461, 115), (384, 192)], (64, 1024, 4000)):
        use(device, M, widths, dtypes, all_needs=True)
    unforeseen = [variant.name for key, variant in compilations.launched.items() if key not in foreseen]
    assert unforeseen == []
    # And Triton tells no two launches apart that are one variant to us.
    assert len(compilations.triton) == len(compilations.launched)
