"""Kernels of Vision Transformer Pruning: one op, one file."""

from vtp_kernels.compact_linear import add_linear_, compact_linear
from vtp_kernels.compact_mlp import compact_mlp
from vtp_kernels.gated_linear import fold_gates, gated_linear
from vtp_kernels.layer_norm_gather import layer_norm_gather
from vtp_kernels.ragged_attention import ragged_attention
from vtp_kernels.rotary import rotate_heads, rotate_heads_, rotated_attention, rotated_linear

__all__ = [
    "add_linear_",
    "compact_linear",
    "compact_mlp",
    "fold_gates",
    "gated_linear",
    "layer_norm_gather",
    "ragged_attention",
    "rotate_heads",
    "rotate_heads_",
    "rotated_attention",
    "rotated_linear",
]
