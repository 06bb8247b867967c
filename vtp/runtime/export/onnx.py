"""ONNX, by PyTorch's exporter: for ONNX Runtime, OpenVINO, TensorRT and all that read it."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtp.choices import OPSET, OPSETS
from vtp.model.images import IMAGE_FIELDS, described
from vtp.runtime.export.checked import (
    TRACED,
    ExportError,
    Run,
    Target,
    check_model,
    check_shape,
    of_one_size,
    write_checked,
)

CONVERTER = ("onnx", "onnxscript")  # that PyTorch's exporter needs
MOST_BYTES = 2**31  # of a protocol buffer, which an ONNX file is
# The first whose operators include Attention: one node, that runtimes need not piece together again.


def load(path: Path) -> Run:
    """An ONNX file in ONNX Runtime, on the CPU."""
    session = onnx_session(path)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def onnx_session(source: bytes | Path, *, batch: int | None = None) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU with all graph optimizations and PyTorch's thread count.

    Args:
        source: an ONNX file, or its bytes.
        batch: images in every call; None leaves it open.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors; they are raised too
    # Its threads would go on spinning while another runtime is timed: twice as slow beside them.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


TARGET = Target(
    "ONNX Runtime", ".onnx", "onnx", (*CONVERTER, "onnxruntime"), (torch.float32, torch.float16), load
)


def export_onnx(
    model: nn.Module,
    path: str | Path,
    image_shape: tuple[int, int, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    images: Tensor | None = None,
    opset: int = OPSET,
) -> float:
    """Write a model as one ONNX file, for any number of images, once ONNX Runtime computes the same by it.

    Its input is "images" [batch, channels, height, width] in `dtype`, its output "outputs" [batch, classes].
    As far as the model says what its images and classes are, so do the `metadata_props` of the file:
    input_size, mean, std, crop_pct, crop_mode, interpolation and label_names, each as JSON.

    Args:
        model: from `vtp.compact` or `vtp.load`, or a timm model; in eval mode, on the CPU. It is not changed.
        path: the file; it is replaced only by a whole one whose outputs were checked.
        image_shape: (channels, height, width) of an image; None takes the model's own.
        dtype: float32 or float16, that the file computes in; None takes the model's own.
        images: to check the outputs on, normalised, [any number, *image_shape]; None takes random ones.
        opset: version of ONNX's operators, of `OPSETS`; before 23 attention is several nodes.

    Returns:
        The largest relative error of the outputs against the model in float64, for 1 and for 5 images.

    Raises:
        TypeError: the model is packed (`vtp.optimize`) or gated: export a compact or dense model.
        ValueError: the model is in training mode or not on the CPU, or an argument is not as above.
        ExportError: the model is over 2 GiB, which no ONNX file holds, or cannot be converted, or ONNX
            Runtime does not run what was written, or computes something else.
        ModuleNotFoundError: a package that is needed is not installed; the message says how to get it.
        FileError: the file cannot be written.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset: got {opset}, expected {OPSETS[0]} to {OPSETS[-1]}")

    def write(converted: nn.Module, traced: Tensor, file: Path) -> None:
        file.write_bytes(_convert(converted, traced, opset))

    return write_checked(TARGET, write, model, path, image_shape, dtype, images)


def onnx_bytes(model: nn.Module, image_shape: tuple[int, ...]) -> bytes:
    """A model as ONNX in memory, unchecked: the bytes of the file that `export_onnx` writes.

    Args, Raises: those of `export_onnx`, but for what its check raises.
    """
    check_model(model)
    shape = check_shape(model, image_shape)
    TARGET.check_packages(CONVERTER)
    with torch.autocast("cpu", enabled=False):
        model = of_one_size(model, shape)
        return _convert(model, torch.zeros(TRACED, *shape, dtype=next(model.parameters()).dtype), OPSET)


def _convert(model: nn.Module, images: Tensor, opset: int) -> bytes:
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if size >= MOST_BYTES:
        raise ExportError(
            f"model: {size / 2**30:.1f} GiB of weights, expected less than the 2 GiB of an ONNX file"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["outputs"],
            dynamo=True,
            verbose=False,
            opset_version=opset,
        )
    proto, said = program.model_proto, described(model)
    for name in (*IMAGE_FIELDS, "label_names"):
        if said.get(name) is not None:
            proto.metadata_props.add(key=name, value=json.dumps(said[name]))
    return proto.SerializeToString()
