"""Compact and dense models for other runtimes: one file for each target."""

from vtp.runtime.export.onnx import export_onnx, onnx_bytes

__all__ = ["export_onnx", "onnx_bytes"]
