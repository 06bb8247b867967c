"""OpenVINO's intermediate representation: an .xml file with the graph and a .bin file with the weights."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtp.model.images import IMAGE_FIELDS, described
from vtp.runtime.export.checked import Run, Target, write_checked
from vtp.runtime.export.pt2 import exported

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def load(path: Path) -> Run:
    """An .xml file in OpenVINO, on the CPU. It computes in float32: where the CPU has bfloat16 instructions,
    OpenVINO would take those unless told otherwise."""
    import openvino

    compiled = compile_openvino(openvino.Core().read_model(path))
    return lambda images: torch.from_numpy(compiled([images.float().numpy()])[0])


def compile_openvino(model: Any, *, dtype: str = "float32") -> Any:
    """An `openvino.Model` compiled for the CPU and latency, with PyTorch's thread count, to compute in
    "float32" or "bfloat16"."""
    import openvino

    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
    }
    return openvino.Core().compile_model(model, "CPU", config)


TARGET = Target(
    "OpenVINO", ".xml", "openvino", ("openvino",), (torch.float32, torch.float16), load, beside=(".bin",)
)


def export_openvino(
    model: nn.Module,
    path: str | Path,
    image_shape: tuple[int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    images: Tensor | None = None,
) -> float:
    """Write a model for OpenVINO, for any number of images, once OpenVINO computes the same by it.

    Beside `path`, which ends in .xml, it writes the weights with .bin instead. Its input is "images" [batch,
    channels, height, width] in float32, its output "outputs" [batch, classes]. As far as the model says what
    its images and classes are, so does the section "vtp" of the file's runtime information (`get_rt_info`),
    in the fields of `export_onnx`.

    Args:
        model: from `vtp.compact` or `vtp.load`, or a timm model; in eval mode, on the CPU. It is not changed.
        path: the .xml file; it is replaced only by a whole one whose outputs were checked.
        image_shape: (channels, height, width) of an image; None takes the model's own.
        dtype: that the weights are stored in, float32 or float16; None takes the model's own. What is
            computed in is decided at loading, by INFERENCE_PRECISION_HINT, which has bfloat16 too.
        images: to check the outputs on, normalised, [any number, *image_shape]; None takes random ones.

    Returns:
        The largest relative error of the outputs, computed in float32, against the model in float64, for 1
        and for 5 images.

    Raises:
        TypeError: the model is packed (`vtp.optimize`) or gated: export a compact or dense model.
        ValueError: the model is in training mode or not on the CPU, or an argument is not as above.
        ExportError: it cannot be converted, or OpenVINO does not run what was written, or computes something
            else.
        ModuleNotFoundError: OpenVINO is not installed; the message says how to get it.
        FileError: a file cannot be written.
    """
    if Path(path).suffix != TARGET.suffix:
        raise ValueError(f"path: got {path}, expected a name that ends in .xml")
    return write_checked(TARGET, _write, model, path, image_shape, dtype, images)


def _write(model: nn.Module, images: Tensor, file: Path) -> None:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(exported(copy.deepcopy(model).float(), images.float()))
    converted.inputs[0].get_tensor().set_names({"images"})
    converted.outputs[0].get_tensor().set_names({"outputs"})
    converted.reshape([-1, *images.shape[1:]])
    said = described(model)
    for name in (*IMAGE_FIELDS, "label_names"):
        if said.get(name) is not None:
            converted.set_rt_info(json.dumps(said[name]), ["vtp", name])
    openvino.save_model(converted, file, compress_to_fp16=images.dtype == torch.float16)
