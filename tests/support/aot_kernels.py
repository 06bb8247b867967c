"""Small kernels for `test_compilations.py`: some pass every rule of the lowering proof, the others break one
each."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vtp_kernels.launching import Variant, tl, triton


@triton.jit
def _gemm_kernel(
    x, w, y, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`y = x w^T`."""
    if ALIGNED:
        N, K = N // 8 * 8, K // 8 * 8
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_m, m_n = o_m[:, None] < M, o_n[:, None] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)[None, :]
        if DESCRIPTORS:
            b_x = x.load([tl.program_id(0) * BLOCK_M, k])
            b_w = w.load([tl.program_id(1) * BLOCK_N, k])
        else:
            b_x = tl.load(x + o_m[:, None] * K + o_k, mask=m_m & (o_k < K), other=0.0)
            b_w = tl.load(w + o_n[:, None] * K + o_k, mask=m_n & (o_k < K), other=0.0)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)
    m_y = m_m & (o_n[None, :] < N)
    tl.store(y + o_m[:, None] * N + o_n[None, :], acc.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def _double_kernel(x, y, n, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """`y = 2 x`."""
    if ALIGNED:
        n = n // 16 * 16
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0) * 2, mask=o < n)


@triton.jit
def _broken_kernel(x, BLOCK: tl.constexpr):
    """Asks for a range that is no power of two, which does not compile."""
    tl.store(x + tl.arange(0, BLOCK + 1), 0.0)


def gemm(
    name: str, dtype="bf16", blocks=(128, 128, 32), num_warps=8, num_stages=3,
    precision="tf32", aligned=True, descriptors=False, dot="tensor_core",
) -> Variant:  # fmt: skip
    block_m, block_n, block_k = blocks
    pointers = {"x": f"*{dtype}", "w": f"*{dtype}"}
    tiles = {n: f"tensordesc<{dtype}[{rows}, {block_k}]>" for n, rows in (("x", block_m), ("w", block_n))}
    operands = tiles if descriptors else pointers
    return Variant(
        op="toy",
        name=name,
        kernel=_gemm_kernel,
        signature={
            **operands,
            "y": f"*{dtype}",
            "M": "i32",
            "N": "i32",
            "K": "i32",
        },
        constants={
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "PRECISION": precision,
            "ALIGNED": aligned,
            "DESCRIPTORS": descriptors,
        },
        aligned=frozenset("y" if descriptors else "xwy"),
        num_warps=num_warps,
        num_stages=num_stages,
        dot=dot,
    )


def double(name: str, dtype="bf16", promised=True, aligned=True) -> Variant:
    """`promised` is what the kernel is told of the row, `aligned` what it is told of the pointers."""
    pointers = frozenset("xy") if aligned else frozenset()
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "n": "i32"}
    constants = {"BLOCK": 1024, "ALIGNED": promised}
    return Variant("toy", name, _double_kernel, signature, constants, pointers, 4, 1)


def broken(name: str) -> Variant:
    return Variant("toy", name, _broken_kernel, {"x": "*fp32"}, {"BLOCK": 8}, frozenset(), 4, 1)


class Crash:
    """In place of a kernel: whoever compiles it dies as if the compiler had aborted."""

    __name__ = "crash"

    @property
    def arg_names(self):
        os._exit(1)


def crash(name: str) -> Variant:
    return Variant("toy", name, Crash(), {}, {}, frozenset(), 4, 1)


def variants(target: str) -> Iterator[Variant]:
    """A well-behaved op; with a crash among its variants where a test asks for it in the environment."""
    for dtype in ("bf16", "fp16"):
        yield double(f"double-{dtype}", dtype)
        yield double(f"double-{dtype}-unaligned", dtype, promised=False)
    if os.environ.get("AOT_TROUBLE"):
        yield crash("crash")
