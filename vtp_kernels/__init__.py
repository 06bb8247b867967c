"""Kernels of Vision Transformer Pruning: one op, one file."""

from vtp_kernels.gated_linear import gated_linear

__all__ = ["gated_linear"]
