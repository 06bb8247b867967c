"""Export to ONNX: what is written computes the same for any number of images, and what is refused."""

import json

import pytest
import torch

import vtp
from tests.support.models import TINY, build, gated, image
from vtp.model.images import set_image_config
from vtp.runtime.export import export_onnx


def compact_model() -> vtp.CompactViT:
    model = gated(build(TINY, torch.float32))
    return vtp.compact(model, vtp.make_plan(model, rate=0.4)).eval()


@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
def test_onnx_runtime_gives_the_models_own_outputs_at_any_batch_size(tmp_path, dense):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    model = build(TINY, torch.float32).eval() if dense else compact_model()
    export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    for batch in (1, 5):
        x = image(model, batch=batch).float()
        with torch.no_grad():
            expected = model(x)
        (found,) = session.run(["outputs"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_onnx_file_says_what_its_images_and_classes_are(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    small, names = compact_model(), tuple("abcdefghij")
    said = {
        "mean": (0.1,),
        "std": (0.2,),
        "crop_pct": 0.9,
        "crop_mode": "squash",
        "interpolation": "bilinear",
    }
    set_image_config(small, **said, label_names=names)
    export_onnx(small, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert found == json.loads(json.dumps({**said, "input_size": (1, 8, 8), "label_names": names}))


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    small, file = compact_model(), tmp_path / "model.onnx"
    with pytest.raises(TypeError, match="model: got OptimizedViT"):
        export_onnx(vtp.optimize(small), file)
    with pytest.raises(ValueError, match="model: got one in training mode"):
        export_onnx(compact_model().train(), file)
    with pytest.raises(ValueError, match="model: on meta, expected cpu"):
        export_onnx(compact_model().to("meta"), file)
    with pytest.raises(TypeError, match="model: got one with gates"):
        export_onnx(gated(build(TINY, torch.float32)).eval(), file)
    for shape in ((3, 8), (1, 0, 8), [1, 8, 8]):
        with pytest.raises(ValueError, match="image_shape: got"):
            export_onnx(small, file, shape)
    with pytest.raises(vtp.FileError):
        export_onnx(small, tmp_path / "missing" / "model.onnx")
    monkeypatch.setattr("vtp.runtime.export.onnx.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="GiB of weights, expected less than the 2 GiB"):
        export_onnx(small, file)
    monkeypatch.undo()
    monkeypatch.setattr("vtp.runtime.export.onnx.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx and onnxscript: pip install 'vtp\[onnx\]'"):
        export_onnx(small, file)
    assert list(tmp_path.iterdir()) == []
