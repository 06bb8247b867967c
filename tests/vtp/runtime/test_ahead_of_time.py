"""Kernels of a saved model, compiled before it is served."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there is nothing to compile with")

import timm
import torch

import vtp
from tests.support.models import TINY, build, gated
from vtp.runtime import ahead_of_time
from vtp_kernels import launching
from vtp_kernels.library import TritonSides
from vtp_kernels.proofs import compilations


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "small.safetensors"
    model = gated(build(TINY, torch.float32))
    vtp.save(vtp.compact(model, vtp.make_plan(model, rate=0.4)), path)
    return path


@pytest.fixture
def needed(monkeypatch):
    """What a model needs; of that the norm alone is compiled, to save time."""
    found, every = [], ahead_of_time.kernels

    def some(*arguments):
        found.extend(every(*arguments))
        return [variant for variant in found if variant.name.startswith("layer_norm_gather")]

    monkeypatch.setattr(ahead_of_time, "kernels", some)
    monkeypatch.setenv("TRITON_CACHE_DIR", "as before")  # and so again after the test
    return found


def test_a_compiled_kernel_lies_where_triton_will_look(saved, needed, tmp_path, capsys):
    folder = tmp_path / "cache"
    assert ahead_of_time.main([str(saved), "--target", "sm_90", "--cache", str(folder)]) == 0
    kernels = {variant.name.partition("-")[0] for variant in needed}
    assert kernels == {"layer_norm_gather_fwd", "compact_linear_fwd", "ragged_attention_fwd"}
    assert len(needed) <= 12
    said = " ".join(capsys.readouterr().out.split())
    assert f"2 distinct kernels for sm_90 are in {folder} Serve with TRITON_CACHE_DIR={folder}" in said
    assert len(list(folder.glob("*/_layer_norm_gather_fwd_kernel.cubin"))) == 2  # with a shift or not


def test_a_kernel_that_does_not_compile_is_named(saved, needed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compilations, "compile_for", lambda *_: 1 / 0)
    assert ahead_of_time.main([str(saved), "--target", "sm_80", "--cache", str(tmp_path / "cache")]) == 1
    said = "".join(capsys.readouterr())
    assert "0 distinct kernels" in said and "layer_norm_gather_fwd-bf16" in said and "ZeroDivision" in said


@pytest.mark.parametrize("name", ["gone", "dense"])
def test_what_is_no_compact_model_is_refused(name, tmp_path, capsys):
    if name == "dense":
        vtp.save(timm.create_model("deit_tiny_patch16_224", depth=1), tmp_path / name)
    assert (
        ahead_of_time.main([str(tmp_path / name), "--target", "sm_90", "--cache", str(tmp_path / "c")]) == 2
    )
    assert {"gone": "no file", "dense": "expected a compact model"}[name] in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_launches_find_in_tritons_cache_what_was_compiled_ahead(saved, target):
    """The key of a launch, made as Triton makes it, equals that of the variant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*launching.TARGETS[target]))
    launched = {}

    def on_launch(kernel, grid, arguments, config, **constants):
        options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
        given = {**arguments, **constants, **config.blocks, **options, "debug": False}
        bound, specialization, rest = create_function_from_signature(
            kernel.signature, kernel.params, backend
        )(**given)
        options, *source = kernel._pack_args(backend, given, bound, specialization, rest)
        launched[ASTSource(kernel, *source).hash()] = options.hash()

    fast = vtp.optimize(vtp.load(saved).to("meta"), torch.bfloat16)
    x = torch.empty(2, 17, fast.vit.embed_dim, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), launching.recording("", target, on_launch) as found, TritonSides():
        fast.vit.blocks(x)
    ahead = {}
    for variant in found.values():
        source, options = compilations._source(variant, target)
        ahead[source.hash()] = backend.parse_options(options).hash()
    assert launched == ahead and len(launched) >= 4
