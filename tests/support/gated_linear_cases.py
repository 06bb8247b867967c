"""Inputs and references of gated_linear, for the tests of the op and of its kernels."""

import torch
import torch.nn.functional as F

from tests.support.op_checks import leaves
from vtp_kernels.gated_linear import gated_linear_ref

L1 = 0.03
NAMES = ("y", "dx", "dweight", "dgate", "dbias")
# The dtypes of x and of the weight.
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16-f32": (torch.bfloat16, torch.float32),
    "f16-f32": (torch.float16, torch.float32),
}


def inputs(M, K, N, x_dtype, weight_dtype, seed=0):
    """x, weight, gate, bias, dy; gates of both signs, of like size as the error rule wants it, and a 0."""
    g = torch.Generator().manual_seed(seed)
    x, weight, bias, dy = (torch.randn(s, generator=g) for s in ((M, K), (N, K), (N,), (M, N)))
    gate = torch.empty(K).uniform_(0.5, 1.5, generator=g) * torch.randn(K, generator=g).sign()
    gate[K // 2] = 0.0 if K > 1 else gate[0]
    weight = weight / K**0.5
    return x.to(x_dtype), weight.to(weight_dtype), gate, bias.to(weight_dtype), dy.to(x_dtype)


def reference(x, weight, gate, bias, dy, dtype, function=gated_linear_ref):
    """The definition in `dtype`, with the penalty as a term of the loss."""
    tensors = leaves([t.to(dtype) for t in (x, weight, gate, bias)])
    y = function(*tensors)
    ((y * dy.to(dtype)).sum() + L1 * tensors[2].abs().sum()).backward()
    return y.detach(), *(t.grad for t in tensors)


def references(x, weight, gate, bias, dy):
    """In float64, and in the dtype of x the less exact of the two ways to write it in PyTorch, by element.

    `F.linear(x * g, W)` rounds x * g and keeps W; `F.linear(x, W * g)` rounds W * g and keeps x.
    """
    given = (x, weight, gate, bias, dy)
    exact = reference(*given, torch.float64)
    by_activation = reference(*given, x.dtype)
    by_weight = reference(*given, x.dtype, lambda x, weight, gate, bias: F.linear(x, weight * gate, bias))
    same_dtype = [
        torch.where((a.double() - e).abs() > (w.double() - e).abs(), a, w)
        for a, w, e in zip(by_activation, by_weight, exact, strict=True)
    ]
    return exact, same_dtype
