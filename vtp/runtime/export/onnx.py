"""ONNX, by PyTorch's exporter: for ONNX Runtime, OpenVINO and all that read it."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from vtp.files import refuse_unwritable, write_atomic
from vtp.model.images import IMAGE_FIELDS, described
from vtp.pruning.gates import GatedLinear
from vtp.runtime.optimize import OptimizedViT

PACKAGES = ("onnx", "onnxscript")  # that PyTorch's exporter needs
MOST_BYTES = 2**31  # of a protocol buffer, which an ONNX file is


def export_onnx(model: nn.Module, path: str | Path, image_shape: tuple[int, int, int] | None = None) -> None:
    """Write a model as one ONNX file, for any number of images.

    Its input is "images" [batch, channels, height, width] in the model's dtype, its output "outputs"
    [batch, classes]. As far as the model says what its images and classes are, so do the `metadata_props` of
    the file: input_size, mean, std, crop_pct, crop_mode, interpolation and label_names, each as JSON.

    Args:
        model: from `vtp.compact` or `vtp.load`, or a timm model; in eval mode, on the CPU. It is not changed.
        path: the file; it is replaced only by a whole one.
        image_shape: (channels, height, width) of an image; None takes the model's own.

    Raises:
        TypeError: the model is packed (`vtp.optimize`) or gated: export a compact or dense model.
        ValueError: the model is in training mode, not on the CPU, or over 2 GiB, which no ONNX file holds; or
            `image_shape` is not three positive integers.
        ModuleNotFoundError: a package of `PACKAGES` is not installed; the message says how to get it.
        FileError: the file cannot be written.
    """
    if image_shape is None and hasattr(model, "patch_embed"):
        image_shape = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    refuse_unwritable(path)
    exported = onnx_bytes(model, image_shape)
    write_atomic(path, lambda temporary: temporary.write_bytes(exported))


def onnx_bytes(model: nn.Module, image_shape: tuple[int, ...]) -> bytes:
    """A model as ONNX in memory: the bytes of the file that `export_onnx` writes.

    Args, Raises: those of `export_onnx`.
    """
    if isinstance(model, OptimizedViT):
        raise TypeError(
            "model: got OptimizedViT, whose kernels no other runtime has; export the compact model that it "
            "was made from"
        )
    if any(isinstance(module, GatedLinear) for module in model.modules()):
        raise TypeError("model: got one with gates, expected what vtp.compact(gated, plan) makes of it")
    if model.training:
        raise ValueError("model: got one in training mode, expected model.eval()")
    tensors = [*model.parameters(), *model.buffers()]
    parameter = tensors[0]
    if parameter.device.type != "cpu":
        raise ValueError(f"model: on {parameter.device}, expected cpu")
    size = sum(tensor.nbytes for tensor in tensors)
    if size >= MOST_BYTES:
        raise ValueError(
            f"model: {size / 2**30:.1f} GiB of weights, expected less than the 2 GiB of an ONNX file"
        )
    if not (isinstance(image_shape, tuple) and len(image_shape) == 3 and all(n > 0 for n in image_shape)):
        raise ValueError(f"image_shape: got {image_shape}, expected (channels, height, width)")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModuleNotFoundError(f"ONNX export needs {' and '.join(missing)}: pip install 'vtp[onnx]'")
    images = torch.zeros(2, *image_shape, dtype=parameter.dtype)  # a size of 1 would become a constant
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["outputs"],
            dynamo=True,
            verbose=False,
        )
    proto, said = program.model_proto, described(model)
    for name in (*IMAGE_FIELDS, "label_names"):
        if said.get(name) is not None:
            proto.metadata_props.add(key=name, value=json.dumps(said[name]))
    return proto.SerializeToString()
