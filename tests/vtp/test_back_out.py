"""What others make of a model, quantized or wrapped, and what packing makes: what it can do, and what not."""

import warnings

import pytest
import torch
from torch import nn

import vtp
from tests.support.models import FAMILIES, TINY, build, gated, image, relative_error
from vtp.runtime.optimize import pack_for_ops
from vtp_kernels.library import cpp_unsupported_reason


def cut(architecture=TINY, dtype=torch.float32):
    model = gated(build(architecture, dtype=dtype))
    return vtp.compact(model, vtp.make_plan(model, rate=0.3)).eval()


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_a_quantized_model_runs_and_is_told_when_to_be_saved_and_packed(tmp_path):
    small = cut()
    fast = quantized(small)
    assert relative_error(fast(image(small)), small(image(small))) < 0.1
    with pytest.raises(vtp.UnsupportedModelError, match="Save the model before layers of it are quantized"):
        vtp.save(fast, tmp_path / "small.safetensors")
    with pytest.raises(
        TypeError, match=r"quantized\.dynamic.*Linear, expected torch\.nn\.Linear; optimize the"
    ):
        vtp.optimize(fast)
    with pytest.raises(vtp.UnsupportedModelError, match="expand before you quantize"):
        vtp.expand(fast)
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_not_cut(tmp_path):
    model = build(dtype=torch.float32)
    fast = quantized(model)
    message = r"blocks\.0\.attn\.qkv: torch\.ao\.nn\.quantized.*come before quantization"
    for call in (lambda: vtp.insert_gates(fast), lambda: vtp.calibrate(fast, image(model)),
                 lambda: vtp.save(fast, tmp_path / "x.safetensors")):  # fmt: skip
        with pytest.raises(vtp.UnsupportedModelError, match=message):
            call()
    assert not list(tmp_path.iterdir())


def test_a_packed_model_is_told_which_model_to_save(tmp_path):
    fast = vtp.optimize(cut())
    with pytest.raises(vtp.UnsupportedModelError, match="take the compact model that it was made from"):
        vtp.save(fast, tmp_path / "fast.safetensors")
    with pytest.raises(vtp.UnsupportedModelError, match="take the compact model that it was made from"):
        vtp.insert_gates(fast)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_features_of_the_compact_one(family):
    small = cut(FAMILIES[family], torch.float64)
    fast, images = pack_for_ops(small), image(small)
    assert relative_error(fast.forward_features(images), small.forward_features(images)) < 1e-12
    assert relative_error(fast.forward_head(fast.forward_features(images)), small(images)) < 1e-12
    fast = pack_for_ops(small, features=True)
    final, maps = fast.forward_intermediates(images, indices=[0, 1])
    assert relative_error(final, small.forward_features(images)) < 1e-12
    for got, want in zip(maps, small.forward_intermediates(images, indices=[0, 1])[1], strict=True):
        assert relative_error(got, want) < 1e-12
    with pytest.raises(ValueError, match="images: got height and width"):
        fast.forward_features(images[..., 1:])


@pytest.mark.skipif(cpp_unsupported_reason() is not None, reason="the C++ operators are not built")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cpp_engine_gives_features_where_it_was_asked_for_them(family):
    small = cut(FAMILIES[family])
    fast, images = vtp.optimize(small, features=True), image(small)
    assert fast.engine == vtp.optimize(small).engine
    features = fast.forward_features(images)
    assert relative_error(features, small.forward_features(images)) < 1e-5
    assert relative_error(fast.forward_head(features), small(images)) < 1e-5
    assert relative_error(fast(images), small(images)) < 1e-5
    final, maps = fast.forward_intermediates(images, indices=[0, 1])
    for got, want in zip([final, *maps], [features, *small.forward_intermediates(images)[1]], strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.skipif(cpp_unsupported_reason() is not None, reason="the C++ operators are not built")
def test_the_cpp_engine_says_what_it_has_no_features_of():
    small = cut()
    fast = vtp.optimize(small)
    for call in (
        lambda: fast.forward_features(image(small)),
        lambda: fast.forward_head(torch.zeros(2, 5, 12)),
        lambda: fast.forward_intermediates(image(small)),
    ):
        with pytest.raises(ValueError, match=r"C\+\+.* in one piece; .*features=True.*compact model"):
            call()
    partly = cut(FAMILIES["average-pool"])  # of which the engine runs the blocks alone
    fast, images = vtp.optimize(partly), image(partly)
    assert fast.engine.startswith("C++")
    final, _ = fast.forward_intermediates(images)
    assert relative_error(final, partly.forward_features(images)) < 1e-5
