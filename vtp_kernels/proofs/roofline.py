"""What a launch moves and multiplies: the account of every kernel, and the recorder that notes launches.

Nothing is measured, and little is modelled: ops run on meta tensors, on the side that a GPU would take, and
every launch that they ask for is noted, of Triton kernels and of PyTorch's operators alike. So the selection
of paths and the tiles are the op's own.

Assumptions:
- DRAM: a launch reads each operand once and writes each result once. Tiles that read an operand again find it
  in L2, where the order of programs keeps it. What one launch leaves to another is written and read in full,
  though a small one would stay in L2.
- Tiles (L2 to multiprocessors): programs read whole tiles, padding included: an upper bound, since masked
  lanes fetch nothing. The tiles of a vendor's GEMM are not known and taken as 128 x 128, without padding.
- The padding of rows up to 8 elements is read and written like the rest.
- FLOPs are those of matrix products, 2 M N K each; as tiled, every dimension is rounded up to its tile.
- A floor is max(bytes / bandwidth, FLOPs / peak), by launch as tiled, without launch overhead.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from vtp_kernels import launching
from vtp_kernels._files import write_whole
from vtp_kernels.launching import cdiv
from vtp_kernels.library import TritonSides
from vtp_kernels.rows import padded_width


class Gpu(NamedTuple):
    """Peaks from a data sheet: bytes/s; dense FLOP/s in 16 bits summed in float32; FLOP/s in IEEE float32."""

    bandwidth: float
    peak_16bit: float
    peak_fp32: float


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet (nvidia-a100-datasheet-us-nvidia-1758950-r4), column 80GB SXM.
    "A100": Gpu(2039e9, 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet, column SXM: 1,979 TFLOP/s "with sparsity", half of it dense.
    "H100": Gpu(3.35e12, 989e12, 67e12),
    # NVIDIA Ada GPU Architecture white paper, appendix, RTX 4090: dense BF16 with FP32 accumulate.
    "RTX 4090": Gpu(1008e9, 165.2e12, 82.6e12),
}


class AccountingError(RuntimeError):
    """Something was launched that nothing here accounts for, or the result cannot be written."""


# ---- the kernels of the ops: one account for each, from its arguments and constants ----


class Work(NamedTuple):
    """What one launch of a kernel does, as its account says.

    programs: how many there are. loads: for each argument that is read, how often all programs together load
    a tile of it, and the shape of that. writes: names of the arguments that are written. flops, tiled_flops:
    those of its products, without and with the padding of tiles.
    """

    programs: int
    loads: dict[str, tuple[int, ...]]
    writes: str
    flops: int = 0
    tiled_flops: int = 0


def _size(tensor: Tensor | None, *shape: int) -> int:
    """Bytes of `shape` in the dtype of `tensor`, without a shape of `tensor` itself, with the padding of its
    rows; 0 without a tensor."""
    if tensor is None:
        return 0
    if not shape:
        shape = tensor.shape
        if tensor.ndim > 1 and tensor.stride(-1) == 1 and shape[-1] < tensor.stride(-2) < shape[-1] + 8:
            shape = *shape[:-1], tensor.stride(-2)
    return prod(shape) * tensor.element_size()


def _tiles(a: SimpleNamespace) -> tuple[int, int, int]:
    return cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N), cdiv(a.K, a.BLOCK_K)


def _product(a: SimpleNamespace) -> tuple[int, int]:
    """FLOPs of an M x N x K product, and as tiled."""
    return 2 * a.M * a.N * a.K, 2 * prod(_tiles(a)) * a.BLOCK_M * a.BLOCK_N * a.BLOCK_K


def _fwd(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"x": (m * n * k, a.BLOCK_M, a.BLOCK_K), "weight": (m * n * k, a.BLOCK_N, a.BLOCK_K)}
    return Work(
        m * n, loads | {"gate": (m * n * k, a.BLOCK_K), "bias": (m * n, a.BLOCK_N)}, "y", *_product(a)
    )


def _dx(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"dy": (m * n * k, a.BLOCK_M, a.BLOCK_N), "weight": (m * n * k, a.BLOCK_N, a.BLOCK_K)}
    loads |= {"gate": (m * k, a.BLOCK_K), "x": (m * k, a.BLOCK_M, a.BLOCK_K)}
    return Work(m * k, loads, "dx partial", *_product(a))


def _dw(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"dy": (m * n * k, a.BLOCK_M, a.BLOCK_N), "x": (m * n * k, a.BLOCK_M, a.BLOCK_K)}
    if a.GATE_GRADIENT:  # the weight is given, but not read, without
        loads["weight"] = n * k, a.BLOCK_N, a.BLOCK_K
    if a.WEIGHT_GRADIENT:
        loads["gate"] = n * k, a.BLOCK_K
    return Work(n * k, loads, "dw partial", *_product(a))


def _fold(a: SimpleNamespace) -> Work:
    tiles = cdiv(a.N, a.BLOCK_N) * cdiv(a.K, a.BLOCK_K)
    return Work(tiles, {"weight": (tiles, a.BLOCK_N, a.BLOCK_K), "gate": (tiles, a.BLOCK_K)}, "folded")


def _unfold(a: SimpleNamespace) -> Work:
    programs, tile = cdiv(a.N, a.rows_per_program) * cdiv(a.K, a.BLOCK_K), (a.rows_per_program, a.BLOCK_K)
    loads = {"product": (programs, *tile), "gate": (programs, a.BLOCK_K)}
    if a.GATE_GRADIENT:
        loads["folded" if a.FOLDED and not a.small_gates else "weight"] = programs, *tile
    return Work(programs, loads, "dw partial")


def _linears(a: SimpleNamespace) -> list[tuple[int, int, int]]:
    """The number, N and K of each of four linears in one launch."""
    return [(i, getattr(a, f"N_{i}"), getattr(a, f"K_{i}")) for i in range(4)]


def _fold_gates(a: SimpleNamespace) -> Work:
    programs, loads = 0, {}
    for i, N, K in _linears(a):
        rows, columns = cdiv(N, a.BLOCK_N), cdiv(K, a.BLOCK_K)
        programs += rows * columns
        loads[f"weight_{i}"] = rows * columns, a.BLOCK_N, a.BLOCK_K
        loads[f"gate_{i}"] = rows * columns, a.BLOCK_K
        loads[f"bias_{i}"] = rows, a.BLOCK_N
    return Work(programs, loads, " ".join(f"folded_{i} cast_{i}" for i in range(4)))


def _unfold_gates(a: SimpleNamespace) -> Work:
    programs, loads = 0, {}
    for i, N, K in _linears(a):
        rows, columns = cdiv(N, a.BLOCK_N) * a.BLOCK_N, cdiv(K, a.BLOCK_K)
        programs += columns
        loads[f"product_{i}"] = loads[f"weight_{i}"] = columns, rows, a.BLOCK_K
        loads[f"gate_{i}"], loads[f"db_{i}"] = (columns, a.BLOCK_K), (rows,)
    return Work(programs, loads, " ".join(f"dw_{i} dg_{i} dbias_{i}" for i in range(4)))


def _gate_gradient(a: SimpleNamespace) -> Work:
    programs, rows = cdiv(a.K, a.BLOCK_K), cdiv(a.rows, a.BLOCK_R) * a.BLOCK_R
    return Work(programs, {"partial": (programs, rows, a.BLOCK_K), "gate": (programs, a.BLOCK_K)}, "dg")


def _layer_norm_gather(a: SimpleNamespace) -> Work:
    programs = cdiv(a.M, a.ROWS)
    rows = programs * a.ROWS
    if not a.GATHER:
        return Work(programs, {"x": (rows, a.BLOCK_D), "shift": (programs, a.BLOCK_D)}, "out")
    # The kept columns are loaded again, from the same rows.
    loads = {"x": (rows, a.BLOCK_D + a.kept), "shift": (programs, a.BLOCK_D + a.kept)}
    return Work(programs, loads | {"index": (programs, a.kept)}, "out")


def _compact_linear(a: SimpleNamespace) -> Work:
    op = importlib.import_module("vtp_kernels.compact_linear")
    grid, parts = op.tile_grid(a.M, a.N, a.config), cdiv(a.K, a.inputs_per_part)
    bottom = grid.bottom_rows * grid.bottom_columns
    x_rows = grid.rows * (grid.columns + grid.border) * a.BLOCK_M + bottom * a.BOTTOM_M
    columns = grid.columns * a.BLOCK_N + grid.border * a.BORDER_N
    w_rows = grid.rows * columns + bottom * a.BOTTOM_N
    tiled = op.tiled_flops(a.M, a.N, a.K, a.config)
    inputs = a.K // a.BLOCK_K * a.BLOCK_K + cdiv(a.K % a.BLOCK_K, a.TAIL_K) * a.TAIL_K
    loads = {"x": (x_rows, inputs), "weight": (w_rows, inputs)}
    if a.partial is not None:
        return Work(grid.tiles * parts, loads, "partial", 2 * a.M * a.N * a.K, tiled)
    if a.bias_width:  # what stands for no bias is not read
        loads["bias"] = (w_rows,)
    loads["residual"] = a.M, a.N
    if a.table is not None:  # sines and cosines; those that heads share, once for each tile of columns
        rotated = 2 * a.heads * a.HEAD
        tiles = cdiv(rotated, a.BLOCK_N)
        loads["table"] = a.M, 2 * (rotated if a.table_rows else tiles * min(a.HEAD, a.BLOCK_N))
    return Work(grid.tiles, loads, "out z", 2 * a.M * a.N * a.K, tiled)


def _compact_linear_parts(a: SimpleNamespace) -> Work:
    rows, columns = cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N)
    loads = {"partial": (a.parts, rows * a.BLOCK_M, columns * a.BLOCK_N)}
    loads |= {"bias": (rows, columns * a.BLOCK_N), "residual": (a.M, a.N)}
    return Work(rows * columns, loads, "out z")


def _ragged_attention(a: SimpleNamespace) -> Work:
    op = importlib.import_module("vtp_kernels.ragged_attention")
    _, key_widths, value_widths, *_ = a.op_args
    tiles = op.row_tiles(a.N, a.BLOCK_M)
    keys = cdiv(a.N, 16) * 16
    columns = sum(cdiv(width + 8, 16) * 16 for width in value_widths)  # about: a head starts anywhere
    key_columns = sum(op.key_columns(key_widths))
    # Queries that are not held are loaded for each piece of keys, which are a power of two in size, or tile.
    pieces = 1
    if a.HEAD_DIM is None:
        full = a.N // a.BLOCK_N if "BLOCK_N" in vars(a) else 0
        pieces = full + cdiv(a.N - full * a.BLOCK_N, 16) if full else keys.bit_count()
    loaded = pieces * sum(tiles) * key_columns + len(tiles) * keys * (key_columns + columns)
    flops = 2 * a.B * a.N * a.N * (sum(key_widths) + sum(value_widths))
    tiled = op.tiled_flops(a.B, a.N, key_widths, value_widths, a.qkv.dtype)
    programs = len(a.table) * a.B * len(tiles)
    loads = {"qkv": (a.B, loaded), "table": (programs, 7)}
    if a.rope is not None:  # sines and cosines beside each query and key, those of prefix tokens counted too
        loads["rope"] = a.B, len(value_widths), sum(tiles) + len(tiles) * keys, 2 * a.HEAD_DIM
    return Work(programs, loads, "out lse", flops, tiled)


def _compact_mlp(a: SimpleNamespace) -> Work:
    programs, hidden = cdiv(a.M, a.BLOCK_M), cdiv(a.hidden, a.BLOCK_H)
    inputs, columns = cdiv(a.K, a.BLOCK_K) * a.BLOCK_K, a.BLOCK_N + a.BLOCK_MORE
    units = programs * hidden * a.BLOCK_H
    loads = {"x": (programs * hidden, a.BLOCK_M, inputs), "fc1_weight": (units, inputs)}
    loads |= {"fc2_weight": (units, columns), "fc1_bias": (units,), "fc2_bias": (programs, columns)}
    loads |= {"residual": (a.M, a.N)}
    flops = 2 * a.M * a.hidden * (a.K + a.N)
    return Work(programs, loads, "out z", flops, 2 * units * a.BLOCK_M * (inputs + columns))


def _swiglu(a: SimpleNamespace) -> Work:
    rows, columns = cdiv(a.M, a.BLOCK_M), cdiv(a.hidden, a.BLOCK_H)
    return Work(rows * columns, {"z": (rows * a.BLOCK_M, 2 * columns * a.BLOCK_H)}, "h")


def _rotate_heads(a: SimpleNamespace) -> Work:
    """Prefix tokens, which are not touched in place, are counted like the others."""
    images, tiles, groups = len(a.source) // a.N, cdiv(a.N - a.first, a.BLOCK_M), cdiv(a.H, a.HEADS)
    rows, values = images * tiles * a.BLOCK_M, 0
    if a.target is not None:
        values = cdiv(padded_width(a.width) - 4 * a.H * a.COUNT, a.COLUMNS)
    loads = {"source": (rows, 4 * a.H * a.BLOCK_P + values * a.COLUMNS)}
    loads["rope"] = rows, 4 * (a.H if a.table_rows else groups) * a.BLOCK_P  # a shared one is in L1 later
    return Work(images * tiles * (groups + values), loads, "source" if a.target is None else "target")


# Another op's kernels are added here. Of the compact model's they are those of the forward pass.
KERNELS: dict[str, Callable[[SimpleNamespace], Work]] = {
    "_gated_linear_fwd_kernel": _fwd,
    "_gated_linear_dx_kernel": _dx,
    "_gated_linear_dw_kernel": _dw,
    "_fold_kernel": _fold,
    "_unfold_kernel": _unfold,
    "_fold_gates_kernel": _fold_gates,
    "_unfold_gates_kernel": _unfold_gates,
    "_gate_gradient_kernel": _gate_gradient,
    "_layer_norm_gather_fwd_kernel": _layer_norm_gather,
    "_compact_linear_fwd_kernel": _compact_linear,
    "_compact_linear_parts_kernel": _compact_linear_parts,
    "_ragged_attention_fwd_kernel": _ragged_attention,
    "_ragged_attention_online_kernel": _ragged_attention,
    "_rotate_heads_kernel": _rotate_heads,
    "_compact_mlp_fwd_kernel": _compact_mlp,
    "_swiglu_fwd_kernel": _swiglu,
}

# ---- what a launch is, and noting it ----


class Record(NamedTuple):
    """What one launch moves and multiplies."""

    name: str
    part: str
    dram_bytes: int
    tile_bytes: int
    flops: int
    tiled_flops: int
    itemsize: int  # of the operands of its product
    launch: str = ""  # of a Triton kernel: dtypes, sizes, tile and grid
    partial_bytes: int = 0  # of dram_bytes: what one launch leaves to the next of the same op

    def floors(self) -> list[float]:
        """The least time that the launch can take on each of `GPUS`, in microseconds."""
        field = "peak_16bit" if self.itemsize == 2 else "peak_fp32"
        gpus = GPUS.values()
        return [1e6 * max(self.dram_bytes / g.bandwidth, self.tiled_flops / getattr(g, field)) for g in gpus]


# Operators that touch no numbers.
_NO_LAUNCH = ("empty", "new_empty", "detach", "_unsafe_view", "lift_fresh")


class Recorder(TritonSides):
    """Notes every launch, Triton's and PyTorch's, while ops run their Triton side as on an H100.

    Args:
        small_gates: whether gates are so small that `_unfold_kernel` reads W itself.
    """

    def __init__(self, small_gates: bool = False) -> None:
        super().__init__()
        self.small_gates = small_gates
        self.op_args: tuple = ()  # of the op that runs
        self.records: list[Record] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Context in which launches are added to `records`."""
        without_tf32 = launching.matmul_precision("highest")  # the default
        with launching.recording("", "sm_90", self.launch), without_tf32, self:
            yield

    def part(self, kernel: str | None, result: Tensor | None) -> str:
        """The `part` of the record of a launch: of a Triton kernel, or of an operator with this result."""
        return ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vtp":
            self.op_args = args
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)  # `linear` and `matmul` into what really runs
        if result is NotImplemented:
            result = func(*args, **kwargs)
            if not func.is_view and not func.__name__.startswith(_NO_LAUNCH):
                self._add_operator(func, args, kwargs, result)
        return result

    def _add_operator(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        results = [
            r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, Tensor)
        ]
        if not results:
            return
        inputs = (*args, *(value for name, value in kwargs.items() if name != "out"))
        lists = [a if isinstance(a, (tuple, list)) else [a] for a in inputs]
        operands = [a for each in lists for a in each if isinstance(a, Tensor)]
        read = loads = sum(map(_size, operands))
        written = sum(map(_size, results))
        flops = 0
        in_place = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # which has no formula of its own
        if count := flop_registry.get(in_place.get(func.overloadpacket, func.overloadpacket)):
            flops = count(*args, **kwargs, out_val=result)
            if results[0].ndim == operands[-1].ndim in (2, 3):  # mm, addmm, bmm
                (*batch, rows, columns), inner = results[0].shape, operands[-1].shape[-2]
                loads = _size(
                    results[0], *batch, cdiv(columns, 128) * rows + cdiv(rows, 128) * columns, inner
                )
        amounts = read + written, max(loads, read) + written, flops, flops
        name, part = func.overloadpacket.__name__, self.part(None, results[0])
        self.records.append(Record(name, part, *amounts, results[0].element_size()))

    def launch(self, kernel: Any, grid: tuple, arguments: Mapping, config: Any, **constants: Any) -> None:
        """Add the record of the launch of a Triton kernel; the arguments are those of `launching.launch`."""
        name = kernel.__name__
        if name not in KERNELS:
            raise AccountingError(f"{name}: launched, but not in KERNELS of {__name__}")
        values = {n: v.base if isinstance(v, launching.TensorDescriptor) else v for n, v in arguments.items()}
        own = dict(config=config, op_args=self.op_args, small_gates=self.small_gates)
        work = KERNELS[name](SimpleNamespace(**values, **constants, **config.blocks, **own))
        if work.programs != prod(grid):
            raise AccountingError(f"{name}: accounted for {work.programs} programs, launched {prod(grid)}")
        used = {n: values[n] for n in (*work.loads, *work.writes.split()) if values[n] is not None}
        written = sum(_size(values[n]) for n in work.writes.split())
        loaded = sum(_size(values[n], *shape) for n, shape in work.loads.items())
        types = " ".join(f"{n}:{launching.TYPE_NAMES[tensor.dtype]}" for n, tensor in used.items())
        dims = " ".join(f"{n}={v}" for n, v in arguments.items() if n in ("M", "N", "K", "rows"))
        launch = f"{types} {dims} tile={config} grid={'x'.join(map(str, grid))}"
        read = sum(_size(values[n]) for n in work.loads)
        amounts = read + written, loaded + written, work.flops, work.tiled_flops
        itemsize = next(iter(used.values())).element_size()
        record = name.strip("_").removesuffix("_kernel"), self.part(name, None), *amounts, itemsize, launch
        self.records.append(Record(*record, _size(values.get("partial"))))


# ---- sums ----


def total(records: Sequence[Record], part: str | None = None, amount: str = "dram_bytes") -> int:
    """The sum of one field of the records, of all or of one part."""
    return sum(getattr(r, amount) for r in records if part in (None, r.part))


def floors(records: Sequence[Record]) -> list[float]:
    """The least time that the launches can take one after another on each of `GPUS`, in microseconds."""
    return [round(sum(times), 3) for times in zip(*(r.floors() for r in records), strict=True)]


# ---- the file ----


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON, one row of a table per line; the file is whole or untouched.

    Raises:
        AccountingError: it cannot be written.
    """
    text = json.dumps(content).replace("], [", "],\n[").replace("[[", "\n[[").replace("]]", "]]\n")
    write_whole(path, text + "\n", AccountingError)
