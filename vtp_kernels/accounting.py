"""What the kernels move and multiply, by shape and path, and what gating adds to a plain linear. Predicted.

    python -m vtp_kernels.accounting [--model deit_base] [--batch 128] [--dtype bf16+fp32] [--out FILE]
    python -m vtp_kernels.accounting --markdown      # the headline alone, for the README; writes nothing

Nothing is measured, and little is modelled: a training step of one linear (forward and backward) runs on meta
tensors through the op itself, and every launch that it asks for is noted, of Triton kernels and of PyTorch's
operators alike. So the selection of paths and the tiles are the op's own.

Assumptions:
- DRAM: a launch reads each operand once and writes each result once. Tiles that read an operand again find it
  in L2, where the grouped order of programs keeps it. What one launch leaves to another (folded weight, G,
  partial sums) is written and read in full, though a small one would stay in L2.
- Tiles (L2 to multiprocessors): programs read whole tiles, padding included: an upper bound, since masked
  lanes fetch nothing. The tiles of a vendor's GEMM are not known and taken as 128 x 128, without padding.
- FLOPs are those of matrix products, 2 M N K each; as tiled, every dimension is rounded up to its tile.
- A floor is max(bytes / bandwidth, FLOPs / peak), by launch as tiled, without launch overhead.
- The plain linear is eager PyTorch's under autocast, which casts W for the step and dW back; it has a bias.
- No gate is 0 (nor, in float16, below 1/64), so `_unfold_kernel` reads the folded weight. The path "vendor,
  small gates" is the other extreme: every program of it has such a gate, and reads W.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from vtp_kernels import _triton

op = importlib.import_module("vtp_kernels.gated_linear")  # the package has a function of that name

TOKENS = 197
MODELS = {"deit_tiny": 192, "deit_small": 384, "deit_base": 768}
LINEARS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}  # N and K, in widths of the model
BATCHES = tuple(2**i for i in range(11))
DTYPES = {  # of activations and of weights; gates are float32
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
}
PARTS = ("forward", "dX", "dW", "dg", "db")
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "accounting.json"
CLAIM = 1.0  # percent of a plain linear's bytes that gating may add


class Gpu(NamedTuple):
    """Data-sheet peaks: bytes/s; dense FLOP/s in 16 bits summed in float32; FLOP/s in float32, not TF32."""

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
    """One launch: its programs; the arguments that they read, with how often all of them together load a tile
    and its shape; the arguments that they write."""

    programs: int
    loads: dict[str, tuple[int, ...]]
    writes: str
    is_product: bool = False  # of M, N and K


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _size(tensor: Tensor | None, *shape: int) -> int:
    """Bytes of `shape` in the dtype of `tensor`, without a shape of `tensor` itself; 0 without a tensor."""
    return 0 if tensor is None else prod(shape or tensor.shape) * tensor.element_size()


def _tiles(a: SimpleNamespace) -> tuple[int, int, int]:
    return cdiv(a.M, a.BLOCK_M), cdiv(a.N, a.BLOCK_N), cdiv(a.K, a.BLOCK_K)


def _fwd(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"x": (m * n * k, a.BLOCK_M, a.BLOCK_K), "weight": (m * n * k, a.BLOCK_N, a.BLOCK_K)}
    return Work(m * n, loads | {"gate": (m * n * k, a.BLOCK_K), "bias": (m * n, a.BLOCK_N)}, "y", True)


def _dx(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"dy": (m * n * k, a.BLOCK_M, a.BLOCK_N), "weight": (m * n * k, a.BLOCK_N, a.BLOCK_K)}
    loads |= {"gate": (m * k, a.BLOCK_K), "x": (m * k, a.BLOCK_M, a.BLOCK_K)}
    return Work(m * k, loads, "dx partial", True)


def _dw(a: SimpleNamespace) -> Work:
    m, n, k = _tiles(a)
    loads = {"dy": (m * n * k, a.BLOCK_M, a.BLOCK_N), "x": (m * n * k, a.BLOCK_M, a.BLOCK_K)}
    if a.GATE_GRADIENT:  # the weight is given, but not read, without
        loads["weight"] = n * k, a.BLOCK_N, a.BLOCK_K
    if a.WEIGHT_GRADIENT:
        loads["gate"] = n * k, a.BLOCK_K
    return Work(n * k, loads, "dw partial", True)


def _fold(a: SimpleNamespace) -> Work:
    tiles = cdiv(a.N, a.BLOCK_N) * cdiv(a.K, a.BLOCK_K)
    return Work(tiles, {"weight": (tiles, a.BLOCK_N, a.BLOCK_K), "gate": (tiles, a.BLOCK_K)}, "folded")


def _unfold(a: SimpleNamespace) -> Work:
    programs, tile = cdiv(a.N, a.rows_per_program) * cdiv(a.K, a.BLOCK_K), (a.rows_per_program, a.BLOCK_K)
    loads = {"product": (programs, *tile), "gate": (programs, a.BLOCK_K)}
    if a.GATE_GRADIENT:
        loads["folded" if a.FOLDED and not a.small_gates else "weight"] = programs, *tile
    return Work(programs, loads, "dw partial")


def _gate_gradient(a: SimpleNamespace) -> Work:
    programs, rows = cdiv(a.K, a.BLOCK_K), cdiv(a.rows, a.BLOCK_R) * a.BLOCK_R
    return Work(programs, {"partial": (programs, rows, a.BLOCK_K), "gate": (programs, a.BLOCK_K)}, "dg")


# Another op's kernels are added here: by name, the part of a backward pass that they are of, and the account.
KERNELS: dict[str, tuple[str, Callable[[SimpleNamespace], Work]]] = {
    "_gated_linear_fwd_kernel": ("forward", _fwd),
    "_gated_linear_dx_kernel": ("dX", _dx),
    "_gated_linear_dw_kernel": ("dW", _dw),
    "_fold_kernel": ("dX", _fold),
    "_unfold_kernel": ("dW", _unfold),
    "_gate_gradient_kernel": ("dg", _gate_gradient),
}

# What an op of the library runs where there is a GPU.
TRITON_SIDES = {
    "gated_linear": "_forward_triton",
    "gated_linear_backward": "_backward_triton",
    "fold_gate": "_fold_triton",
    "unfold_gate": "_unfold_triton",
}

# ---- noting what a step launches ----


def _plain(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _naive(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    return _plain(x * gate.to(x.dtype), weight, gate, bias)


def _one_op(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """`gated_linear` where it does not put together a fold, PyTorch's linear and an unfold."""
    return torch.ops.vtp.gated_linear(x, weight, gate, bias, 0.0)


class Way(NamedTuple):
    """A way to make the step: what is called, and what stands in place of the op's tables meanwhile."""

    function: Callable[..., Tensor]
    replaced: Mapping[str, Any]
    small_gates: bool = False


_VENDOR = {"_FUSED_ROWS": {2: 0, 4: 0}, "_on_activation_side": lambda *_: False}
_FUSED = _VENDOR | {"_FUSED_ROWS": {2: sys.maxsize, 4: sys.maxsize}, "_FULL_GPU": 0}
CHOSEN, PLAIN, NAIVE, LEAST = "op's choice", "plain linear", "naive x * g", "least"
PATHS = {
    PLAIN: Way(_plain, {}),
    CHOSEN: Way(op.gated_linear, {}),
    "vendor GEMMs": Way(op.gated_linear, _VENDOR),
    "vendor, small gates": Way(op.gated_linear, _VENDOR, small_gates=True),
    "fused": Way(_one_op, _FUSED),
    "activation side": Way(_one_op, _VENDOR | {"_on_activation_side": lambda *_: True}),
    NAIVE: Way(_naive, {}),
}


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

    def floors(self) -> list[float]:
        """Microseconds on each GPU."""
        field = "peak_16bit" if self.itemsize == 2 else "peak_fp32"
        gpus = GPUS.values()
        return [1e6 * max(self.dram_bytes / g.bandwidth, self.tiled_flops / getattr(g, field)) for g in gpus]


class _Recorder(TorchDispatchMode):
    """Notes every launch, Triton's by `launch`, PyTorch's by dispatch, while the op runs its Triton side."""

    def __init__(self, M: int, N: int, K: int, small_gates: bool) -> None:
        super().__init__()
        self.result_parts = {M * K: "dX", N * K: "dW"}
        self.small_gates, self.is_backward = small_gates, False
        self.records: list[Record] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:
            if func.namespace == "vtp":
                return getattr(op, TRITON_SIDES[func.overloadpacket.__name__])(*args)
            result = func.decompose(*args, **kwargs)  # `linear` and `matmul` into what really runs
        if result is NotImplemented:
            result = func(*args, **kwargs)
            if not func.is_view and not func.__name__.startswith(("empty", "new_empty")):
                self._add_operator(func, args, kwargs, result)
        return result

    def _add_operator(self, func: Any, args: tuple, kwargs: dict, result: Tensor) -> None:
        operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        read = loads = sum(map(_size, operands))
        flops = 0
        if count := flop_registry.get(func.overloadpacket):
            flops = count(*args, **kwargs, out_val=result)
            (rows, columns), inner = result.shape, operands[-1].shape[0]
            loads = _size(result, cdiv(columns, 128) * rows + cdiv(rows, 128) * columns, inner)
        part = self.result_parts.get(result.numel(), "db") if self.is_backward else "forward"
        amounts = read + _size(result), max(loads, read) + _size(result), flops, flops
        self.records.append(Record(func.overloadpacket.__name__, part, *amounts, result.element_size()))

    def launch(self, kernel: Any, grid: tuple, arguments: Mapping, config: Any, **constants: Any) -> None:
        """In place of `_triton.launch`."""
        name = kernel.__name__
        if name not in KERNELS:
            raise AccountingError(f"{name}: launched, but not in KERNELS of {__name__}")
        part, account_for = KERNELS[name]
        values = {n: v.base if isinstance(v, _triton.TensorDescriptor) else v for n, v in arguments.items()}
        options = {**constants, **config.blocks, "small_gates": self.small_gates}
        a = SimpleNamespace(**values, **options)
        work = account_for(a)
        if work.programs != prod(grid):
            raise AccountingError(f"{name}: accounted for {work.programs} programs, launched {prod(grid)}")
        used = {n: values[n] for n in (*work.loads, *work.writes.split()) if values[n] is not None}
        written = sum(_size(values[n]) for n in work.writes.split())
        loaded = sum(_size(values[n], *shape) for n, shape in work.loads.items())
        flops = 2 * a.M * a.N * a.K if work.is_product else 0
        tiled = 2 * prod(_tiles(a)) * prod(config.blocks.values()) if work.is_product else 0
        types = " ".join(f"{n}:{_triton.TYPE_NAMES[tensor.dtype]}" for n, tensor in used.items())
        dims = " ".join(f"{n}={v}" for n, v in arguments.items() if n in ("M", "N", "K", "rows"))
        launch = f"{types} {dims} tile={config} grid={'x'.join(map(str, grid))}"
        amounts = sum(map(_size, used.values())), loaded + written, flops, tiled
        part = part if self.is_backward else "forward"
        itemsize = next(iter(used.values())).element_size()
        self.records.append(Record(name.strip("_").removesuffix("_kernel"), part, *amounts, itemsize, launch))


@contextlib.contextmanager
def _replaced(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}  # raises if there is no longer such a name
    try:
        vars(module).update(values)
        yield
    finally:
        vars(module).update(before)


def step(path: str, M: int, N: int, K: int, dtype: str) -> list[Record]:
    """All launches of a training step of one linear, made by one of PATHS."""
    x_dtype, w_dtype = DTYPES[dtype]
    shapes = ((M, K), x_dtype), ((N, K), w_dtype), ((K,), torch.float32), ((N,), w_dtype)
    inputs = [torch.empty(size, dtype=dtype, device="meta", requires_grad=True) for size, dtype in shapes]
    function, replaced, small_gates = PATHS[path]
    recorder = _Recorder(M, N, K, small_gates)
    with (
        _triton.recording("gated_linear", "sm_90"),  # what it asks about the GPU, it is told of an H100
        _replaced(op, {"launch": recorder.launch, **replaced}),
        _replaced(torch, {"get_float32_matmul_precision": lambda: "highest"}),  # the default: no TF32
        recorder,
    ):
        y = function(*inputs)
        recorder.is_backward = True
        torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
    return recorder.records


def least(M: int, N: int, K: int, dtype: str) -> Record:
    """The operation: forward reads x, W, g, b, writes y; backward reads dY, x, W, g, writes gradients."""
    x, w = (t.itemsize for t in DTYPES[dtype])
    moved = x * (3 * M * K + 2 * M * N) + w * (3 * N * K + 2 * N) + 4 * 3 * K
    return Record(LEAST, "", moved, moved, 6 * M * N * K, 6 * M * N * K, x)


# ---- sums ----

Paths = dict[str, list[Record]]  # launches by path


def account(model: str, batch: int, dtype: str) -> dict[str, Paths]:
    """By linear, and "block" for the four: the launches of a step by every path, and LEAST."""
    block: dict[str, Paths] = {}
    for linear, (n, k) in LINEARS.items():
        shape = batch * TOKENS, n * MODELS[model], k * MODELS[model], dtype
        block[linear] = {LEAST: [least(*shape)]} | {path: step(path, *shape) for path in PATHS}
    return block | {"block": {path: [r for p in block.values() for r in p[path]] for path in (LEAST, *PATHS)}}


def total(records: Sequence[Record], part: str | None = None, amount: str = "dram_bytes") -> int:
    return sum(getattr(r, amount) for r in records if part in (None, r.part))


def extra(paths: Paths, path: str, part: str | None = None) -> int:
    """DRAM bytes beyond the plain linear's, of a step or of one part of it."""
    return total(paths[path], part) - total(paths[PLAIN], part)


def percent(paths: Paths, path: str, with_db: bool = True) -> float:
    """`extra` of a step, of the plain linear's bytes: all, or without those that make its bias' gradient."""
    return 100 * extra(paths, path) / (total(paths[PLAIN]) - (0 if with_db else total(paths[PLAIN], "db")))


def floors(records: Sequence[Record]) -> list[float]:
    return [round(sum(times), 3) for times in zip(*(r.floors() for r in records), strict=True)]


def taken(records: Sequence[Record]) -> str:
    """As in `forward: fold, addmm; dX: mm; dW: mm, unfold; dg: gate_gradient; db: sum`."""
    return "; ".join(f"{part}: {', '.join(r.name for r in records if r.part == part)}" for part in PARTS)


# ---- the file and the tables ----


def sweep() -> dict[str, Any]:
    """Every model, dtype, batch, linear and path, in tables whose rows can be compared line by line."""
    amounts, times = Record._fields[2:6], [f"floor_us_{name}" for name in GPUS]
    columns = ["model", "dtype", "batch", "linear", "path", "launches", *amounts]
    columns += ["extra_bytes", "extra_percent", "extra_percent_without_db"]
    columns += [*(f"extra_{part}" for part in PARTS), *times, "launched"]
    rows, kernels = [], {}
    for model, dtype, batch in itertools.product(MODELS, DTYPES, BATCHES):
        for linear, paths in account(model, batch, dtype).items():
            for path, records in paths.items():
                row = [model, dtype, batch, linear, path, len(records)]
                row += [total(records, amount=amount) for amount in amounts] + [extra(paths, path)]
                row += [round(percent(paths, path, with_db), 3) for with_db in (True, False)]
                # The naive way has launches that are of none of the parts.
                row += [None if path in (NAIVE, LEAST) else extra(paths, path, part) for part in PARTS]
                launched = taken(records) if path == CHOSEN and linear != "block" else ""
                rows.append([*row, *floors(records), launched])
                kernels |= {(r.name, r.launch): [*r[2:6], *floors([r])] for r in records if r.launch}
    return {
        "label": "predicted, not measured; assumptions in vtp_kernels/accounting.py",
        "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()},
        "paths": [columns, *rows],
        "kernels": [["kernel", "launch", *amounts, *times], *([*k, *kernels[k]] for k in sorted(kernels))],
    }


def save(path: Path, content: Mapping[str, Any]) -> None:
    """One row per line; the file is whole or untouched."""
    text = json.dumps(content).replace("], [", "],\n[").replace("[[", "\n[[").replace("]]", "]]\n")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise AccountingError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


Rows = list[list[str]]  # the first is the header


def headline(block: dict[str, Paths]) -> Rows:
    """Extra bytes by path; `!` marks more than the claim."""

    def cell(paths: Paths, path: str) -> str:
        share = percent(paths, path)
        return f"{extra(paths, path) / 1e6:+,.1f} MB ({share:+.2f}%{'' if share <= CLAIM else ' !'})"

    rows = [["path", *block, "block, without db", "launches"]]
    for path in list(PATHS)[1:]:
        share = f"{percent(block['block'], path, with_db=False):+.2f}%"
        rows.append([path, *(cell(p, path) for p in block.values()), share, str(len(block["block"][path]))])
    plain = [f"{total(paths[PLAIN]) / 1e6:,.1f} MB" for paths in block.values()]
    return [*rows, [f"{PLAIN}, all", *plain, "", str(len(block["block"][PLAIN]))]]


def details(block: dict[str, Paths]) -> Rows:
    """Of the block: bytes of the parts of a step, then sums, padding and floors."""
    paths, rows = block["block"], [["path", *PARTS, "DRAM", "tiles", "FLOPs", "padding", *GPUS]]
    for path, records in paths.items():
        moved = [total(records, part) if path == PLAIN else extra(paths, path, part) for part in PARTS]
        # The naive way has launches that are of none of the parts.
        cells = ["" if path in (NAIVE, LEAST) else f"{m / 1e6:,.2f} MB" for m in moved]
        flops, tiled = total(records, amount="flops"), total(records, amount="tiled_flops")
        cells += [f"{total(records, amount=a) / 1e6:,.0f} MB" for a in ("dram_bytes", "tile_bytes")]
        cells += [f"{flops / 1e12:,.3f} T", f"{100 * (tiled / flops - 1):.1f}%"]
        rows.append([path, *cells, *(f"{t:,.0f} us" for t in floors(records))])
    return rows


def _by_batch(content: Mapping[str, Any], model: str) -> Rows:
    share = {tuple(row[:5]): row[11] for row in content["paths"]}
    rows = [[str(b), *(f"{share[model, d, b, 'block', CHOSEN]:+.2f}%" for d in DTYPES)] for b in BATCHES]
    return [["batch", *DTYPES], *rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vtp_kernels.accounting", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=MODELS, default="deit_base", help="whose tables are printed")
    parser.add_argument("--batch", type=int, choices=BATCHES, default=128, metavar="B", help="1, 2, ... 1024")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16+fp32", help="of activations + weights")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the complete sweep")
    parser.add_argument(
        "--markdown", action="store_true", help="the headline alone, as Markdown; writes nothing"
    )
    arguments = parser.parse_args(argv)
    try:
        if not _triton.HAS_TRITON:
            raise AccountingError("Triton is not installed: nothing can be launched")
        block = account(arguments.model, arguments.batch, arguments.dtype)
        if arguments.markdown:
            first, *rest = headline(block)
            print(*("| " + " | ".join(row) + " |" for row in (first, ["---"] * len(first), *rest)), sep="\n")
            return 0
        content = sweep()
        save(arguments.out, content)
    except AccountingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    case = f"{arguments.model}, batch {arguments.batch}, {arguments.dtype}, predicted"
    # A file or a pipe has no width, and a table folded to 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, (header, *rows) in {
        f"DRAM bytes that gating adds to a plain linear: {case}": headline(block),
        f"Block, {PLAIN}'s bytes by part and then extra bytes, sums, and floors: {case}": details(block),
        f"{CHOSEN}, extra of a block: {arguments.model}, predicted": _by_batch(content, arguments.model),
    }.items():
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(
                name, justify="left" if name in ("path", "linear", "part", "launch") else "right"
            )
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Written to {arguments.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
