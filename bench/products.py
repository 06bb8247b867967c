"""Parts of a compact model as runtimes: feed-forward branches on the CPU engine, and single products."""

import dataclasses
import functools
from collections.abc import Iterable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vtp
from bench.irregular import randomize_vectors
from vtp.comparison.own_model import Blocks
from vtp.comparison.runtimes import DTYPES, Run, Runtime, Unsupported
from vtp.runtime import cpu
from vtp_kernels.library import cpp_unsupported_reason


def prepare_packed(linear: nn.Module, x: Tensor, *, dtype: str) -> Run:
    """One linear on oneDNN, its weight laid out once: a private API of PyTorch."""
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        raise Unsupported("this PyTorch has no oneDNN")
    if dtype == "bfloat16" and not ops._is_mkldnn_bf16_supported():
        raise Unsupported("oneDNN takes no packed bfloat16 on this CPU")
    x = x.to(DTYPES[dtype])
    weight = ops._reorder_linear_weight(linear.weight.detach().to(DTYPES[dtype]), len(x))
    return lambda: ops._linear_pointwise(x, weight, None, "none", [], "")


class FeedForward(Blocks):
    """Feed-forward branches alone: tokens [B, N, embed_dim] to the same shape."""

    def __init__(self, embed_dim: int, inputs: int, hidden: int, depth: int = 1) -> None:
        torch.manual_seed(0)
        dense = VisionTransformer(
            img_size=32,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=1,
            mlp_ratio=hidden / embed_dim,
            num_classes=0,
        )
        randomize_vectors(dense)
        gated = vtp.insert_gates(dense)
        plan = vtp.make_plan(gated, rate=0.0)
        kept = {name: () if "attn" in name else widths for name, widths in plan.kept.items()}
        kept |= {name: widths[:inputs] for name, widths in kept.items() if name.endswith("fc1")}
        super().__init__(vtp.compact(gated, dataclasses.replace(plan, kept=kept)))
        self.macs_per_token = depth * hidden * (inputs + embed_dim)


def prepare_our_linear(linear: nn.Module, x: Tensor, *, dtype: str) -> Run:
    """One linear by the engine's micro-kernels, its weight packed once."""
    if (reason := cpp_unsupported_reason()) is not None:
        raise Unsupported(reason)
    outputs = len(linear.weight)
    weight = cpu.panels(linear.weight.detach(), DTYPES[dtype]).view(-1).view(torch.uint8)
    bias = torch.zeros(-(-outputs // 16) * 16)
    x = cpu.activations(x, DTYPES[dtype])
    return lambda: torch.ops.vtp.cpu_linear(x, weight, bias, outputs, dtype == "bfloat16")[:, :outputs]


def gemm_runtimes(runtimes: Iterable[Runtime]) -> list[Runtime]:
    """The runtimes that know no more of a linear than its product, ours, and oneDNN's packed one."""
    found = []
    for dtype in DTYPES:
        packed, ours = (functools.partial(f, dtype=dtype) for f in (prepare_packed, prepare_our_linear))
        found += [Runtime("ours", dtype, ours, ours=True), Runtime("oneDNN, packed", dtype, packed)]
    return found + [p for p in runtimes if not p.name.startswith(("our", "torch.compile"))]
