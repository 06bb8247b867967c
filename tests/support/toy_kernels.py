"""Small kernels, right as they stand, to test the harness on; defects are planted by replacing text."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _copy_kernel(x_ptr, y_ptr, M, N, stride_xm, stride_ym, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    m_load = (o_m < M) & (o_n < N)
    m_store = (o_m < M) & (o_n < N)
    b_x = tl.load(x_ptr + o_m * stride_xm + o_n, mask=m_load, other=0.0)
    tl.store(y_ptr + o_m * stride_ym + o_n, b_x, mask=m_store)


def copy(x, y=None):
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype) if y is None else y
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 32))
    _copy_kernel[grid](x, y, M, N, x.stride(0), y.stride(0), BLOCK_M=16, BLOCK_N=32)
    return y


@triton.jit
def _scale_dot_kernel(
    x_ptr,
    g_ptr,
    w_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    stride_ym,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x * g) w^T, x [M, K], g [K], w [N, K]."""
    o_m = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    b_y = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        m_x = (o_m[:, None] < M) & (o_k[None, :] < K)
        m_w = (o_n[:, None] < N) & (o_k[None, :] < K)
        b_x = tl.load(x_ptr + o_m[:, None] * stride_xm + o_k[None, :], mask=m_x, other=0.0)
        b_w = tl.load(w_ptr + o_n[:, None] * stride_wn + o_k[None, :], mask=m_w, other=0.0)
        b_g = tl.load(g_ptr + o_k, mask=o_k < K, other=0.0)
        b_w = (b_w.to(tl.float32) * b_g.to(tl.float32)[None, :]).to(b_x.dtype)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision=PRECISION)
    p_y = y_ptr + o_m[:, None] * stride_ym + o_n[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=(o_m[:, None] < M) & (o_n[None, :] < N))


def scale_dot(x, g, w, precision="ieee"):
    (M, K), N = x.shape, len(w)
    y = torch.empty((M, N), dtype=x.dtype)
    grid = (triton.cdiv(M, 32), triton.cdiv(N, 32))
    strides = x.stride(0), w.stride(0), y.stride(0)
    _scale_dot_kernel[grid](x, g, w, y, M, N, K, *strides, PRECISION=precision, BLOCK=32)
    return y


@triton.jit
def _column_sums_kernel(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[i, n] = the sum of x[m, n] over the rows m of program i."""
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (o_m[:, None] < M) & (o_n[None, :] < N)
    b_x = tl.load(x_ptr + o_m[:, None] * N + o_n[None, :], mask=mask, other=0.0).to(tl.float32)
    p_y = y_ptr + i_m * N + o_n
    tl.store(p_y, tl.sum(b_x, axis=0).to(y_ptr.dtype.element_ty), mask=o_n < N)


def column_sums(x):
    """Two stages: one partial sum for each block of rows, then the sum of those."""
    M, N = x.shape
    parts = triton.cdiv(M, 16)
    partial = torch.empty((parts, N), dtype=torch.float32)
    y = torch.empty((1, N), dtype=x.dtype)
    blocks = triton.cdiv(N, 32)
    _column_sums_kernel[(parts, blocks)](x, partial, M, N, BLOCK_M=16, BLOCK_N=32)
    _column_sums_kernel[(1, blocks)](partial, y, parts, N, BLOCK_M=triton.next_power_of_2(parts), BLOCK_N=32)
    return y[0]


@triton.jit
def _descriptor_copy_kernel(x_desc, y_desc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK_M
    o_n = tl.program_id(1) * BLOCK_N
    y_desc.store([o_m, o_n], x_desc.load([o_m, o_n]))


def descriptor_copy(x, y):
    """Rows of x and y start at multiples of 16 bytes."""
    M, N = x.shape
    x_desc, y_desc = (TensorDescriptor.from_tensor(t, [16, 32]) for t in (x, y))
    _descriptor_copy_kernel[(triton.cdiv(M, 16), triton.cdiv(N, 32))](x_desc, y_desc, BLOCK_M=16, BLOCK_N=32)
    return y


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o_n, mask=o_n < N, other=0)
    tl.store(y_ptr + o_n, b_x.to(y_ptr.dtype.element_ty), mask=o_n < N)


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), BLOCK=1024)
    return y
