"""ragged_attention: beside PyTorch's SDPA, which takes one width of values for all heads.

One with padding has zero columns in qkv already, as the linear before would leave them, and keeps theirs
in the result: what is timed is a model whose heads were made equal.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.shapes import Case, Implementation, plain
from vtp.comparison.runtimes import Run
from vtp_kernels import ragged_attention
from vtp_kernels.ragged_attention import ragged_attention_ref
from vtp_kernels.rows import in_padded_rows

SITES = ("attn",)
BACKWARD = (False,)


def operands(case: Case) -> dict[str, Any]:
    """qkv [B, N, 2 H d + V]."""
    _, width = case.block.linear("qkv")
    return {
        "qkv": case.activations(width),
        "key_widths": (case.block.head_dim,) * len(case.block.values),
        "value_widths": case.block.values,
        "scale": case.block.scale,
    }


def ours(qkv: Tensor, **shape: Any) -> Run:
    """With rows where the ops put them, at 16 bytes."""
    qkv = in_padded_rows(qkv)
    return lambda: ragged_attention(qkv, **shape)


def per_head(qkv: Tensor, key_widths: tuple[int, ...], value_widths: tuple[int, ...], scale: float) -> Tensor:
    """SDPA once for each head: [B, N, V]."""
    H, parts = len(value_widths), qkv.split((*key_widths, *key_widths, *value_widths), dim=-1)
    heads = zip(parts[:H], parts[H : 2 * H], parts[2 * H :], strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]
            for q, k, v in heads
        ],
        dim=-1,
    )


def equal_heads(
    qkv: Tensor, key_widths: tuple[int, ...], value_widths: tuple[int, ...], scale: float, *, width: int
) -> Run:
    """SDPA of all heads at once, their keys equal, their values padded to `width`: [B, N, H * width]."""
    H, keys = len(value_widths), sum(key_widths)
    query_key, values = qkv.split([2 * keys, sum(value_widths)], dim=-1)
    values = [F.pad(v, (0, width - v.shape[-1])) for v in values.split(value_widths, -1)]
    qkv = torch.cat([query_key, *values], dim=-1)

    def run() -> Tensor:
        parts = qkv.split([keys, keys, H * width], dim=-1)
        query, key, value = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in parts)
        return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).flatten(2)

    return run


def implementations(case: Case) -> dict[str, Implementation]:
    block = case.block
    found = {"ours": Implementation(ours), "plain expression": plain(ragged_attention_ref)}
    if case.widths == "dense":
        return found | {"SDPA": Implementation(partial(equal_heads, width=block.head_dim))}
    found["SDPA per head"] = plain(per_head)
    widest = -(-max(block.values) // 8) * 8  # the least that the fused kernels of a GPU take
    for width in dict.fromkeys((widest, block.head_dim)):

        def kept(out: Tensor, width: int = width) -> Tensor:
            heads = zip(out.split(width, -1), block.values, strict=True)
            return torch.cat([head[..., :own] for head, own in heads], dim=-1)

        found[f"SDPA, values padded to {width}"] = Implementation(partial(equal_heads, width=width), kept)
    return found


def test_ragged_attention(measure, case: Case, implementation: str) -> None:
    measure(case, implementations(case)[implementation], operands, ragged_attention_ref)
