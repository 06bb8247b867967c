"""Compact and dense models for other runtimes: one file for each target."""

from vtp.runtime.export import executorch, onnx, openvino, pt2
from vtp.runtime.export.checked import ExportError
from vtp.runtime.export.executorch import export_executorch
from vtp.runtime.export.onnx import export_onnx, onnx_bytes
from vtp.runtime.export.openvino import export_openvino
from vtp.runtime.export.pt2 import export_pt2

# Of each target what it is, and the function that writes for it.
TARGETS = {
    "onnx": (onnx.TARGET, export_onnx),
    "openvino": (openvino.TARGET, export_openvino),
    "pt2": (pt2.TARGET, export_pt2),
    "executorch": (executorch.TARGET, export_executorch),
}

__all__ = [
    "TARGETS",
    "ExportError",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_pt2",
    "onnx_bytes",
]
