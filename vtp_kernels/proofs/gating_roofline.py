"""What the kernels move and multiply, by shape and path, and what gating adds to a plain linear. Predicted.

    python -m vtp_kernels.proofs.gating_roofline [--model deit_base] [--batch 128] [--dtype bf16+fp32]
                                                 [--out FILE]
    python -m vtp_kernels.proofs.gating_roofline --markdown    # the headline alone; writes nothing

A training step of one linear (forward and backward) runs through the op itself; how launches are counted, and
with which assumptions, is in `roofline.py`. Besides:

- The plain linear is eager PyTorch's under autocast, which casts W for the step and dW back; it has a bias.
- No gate is 0 (nor, in float16, below 1/64), so `_unfold_kernel` reads the folded weight. The path "vendor,
  small gates" is the other extreme: every program of it has such a gate, and reads W.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vtp_kernels import gated_linear, launching
from vtp_kernels.proofs.roofline import GPUS, AccountingError, Record, Recorder, floors, save, total

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
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "accounting.json"
CLAIM = 1.0  # percent of a plain linear's bytes that gating may add


# ---- noting what a step launches ----


# The part of a backward pass that a kernel is of.
KERNEL_PARTS = {
    "_gated_linear_dx_kernel": "dX",
    "_gated_linear_dw_kernel": "dW",
    "_fold_kernel": "dX",
    "_unfold_kernel": "dW",
    "_gate_gradient_kernel": "dg",
}


class StepRecorder(Recorder):
    """Notes the launches of a training step of one linear, each with the part of the step that it is."""

    def __init__(self, M: int, N: int, K: int, small_gates: bool) -> None:
        super().__init__(small_gates)
        self.result_parts = {M * K: "dX", N * K: "dW"}
        self.is_backward = False

    def part(self, kernel: str | None, result: Tensor | None) -> str:
        """One of `PARTS`: by the kernel, or by the shape of the result of one of PyTorch's operators."""
        if not self.is_backward:
            return "forward"
        return KERNEL_PARTS[kernel] if kernel else self.result_parts.get(result.numel(), "db")


def _plain(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def _naive(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    return _plain(x * gate.to(x.dtype), weight, gate, bias)


def _one_op(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """`gated_linear` where it does not put together a fold, PyTorch's linear and an unfold."""
    return torch.ops.vtp.gated_linear(x, weight, gate, bias, 0.0)


class Way(NamedTuple):
    """How a linear is computed: the function that is called, and the paths that are forced meanwhile."""

    function: Callable[..., Tensor]
    forced: tuple[str, ...] = ()
    small_gates: bool = False


_VENDOR = ("vendor", "weight_side")
CHOSEN, PLAIN, NAIVE, LEAST = "op's choice", "plain linear", "naive x * g", "least"
PATHS = {
    PLAIN: Way(_plain),
    CHOSEN: Way(gated_linear),
    "vendor GEMMs": Way(gated_linear, _VENDOR),
    "vendor, small gates": Way(gated_linear, _VENDOR, small_gates=True),
    "fused": Way(_one_op, ("fused", "fused_dw", "weight_side")),
    "activation side": Way(_one_op, ("vendor", "activation_side")),
    NAIVE: Way(_naive),
}


def step(path: str, M: int, N: int, K: int, dtype: str) -> list[Record]:
    """All launches of a training step of a linear [N, K] on M rows, computed as one of `PATHS`."""
    x_dtype, w_dtype = DTYPES[dtype]
    shapes = ((M, K), x_dtype), ((N, K), w_dtype), ((K,), torch.float32), ((N,), w_dtype)
    inputs = [torch.empty(size, dtype=dtype, device="meta", requires_grad=True) for size, dtype in shapes]
    function, forced, small_gates = PATHS[path]
    recorder = StepRecorder(M, N, K, small_gates)
    with launching.forced_path("gated_linear", *forced), recorder.noting():
        y = function(*inputs)
        recorder.is_backward = True
        torch.autograd.grad(y, inputs, torch.empty_like(y), allow_unused=True)
    return recorder.records


def least(M: int, N: int, K: int, dtype: str) -> Record:
    """The least that a training step of a gated linear can move and multiply.

    Forward reads x, W, g and b and writes y; backward reads dY, x, W and g and writes the gradients.
    """
    x, w = (t.itemsize for t in DTYPES[dtype])
    moved = x * (3 * M * K + 2 * M * N) + w * (3 * N * K + 2 * N) + 4 * 3 * K
    return Record(LEAST, "", moved, moved, 6 * M * N * K, 6 * M * N * K, x)


# ---- sums ----

Paths = dict[str, list[Record]]  # launches by path


def account(model: str, batch: int, dtype: str) -> dict[str, Paths]:
    """The launches of a training step by path, with `LEAST`: of each linear, and of all four as "block"."""
    block: dict[str, Paths] = {}
    for linear, (n, k) in LINEARS.items():
        shape = batch * TOKENS, n * MODELS[model], k * MODELS[model], dtype
        block[linear] = {LEAST: [least(*shape)]} | {path: step(path, *shape) for path in PATHS}
    return block | {"block": {path: [r for p in block.values() for r in p[path]] for path in (LEAST, *PATHS)}}


def extra(paths: Paths, path: str, part: str | None = None) -> int:
    """DRAM bytes that a path moves beyond the plain linear, in a step or in one part of it."""
    return total(paths[path], part) - total(paths[PLAIN], part)


def percent(paths: Paths, path: str, with_db: bool = True) -> float:
    """`extra` of a step in percent of the bytes of the plain linear, with or without its bias' gradient."""
    return 100 * extra(paths, path) / (total(paths[PLAIN]) - (0 if with_db else total(paths[PLAIN], "db")))


def taken(records: Sequence[Record]) -> str:
    """What was launched, by part, as in `forward: fold, addmm; dX: mm; dW: mm, unfold; dg: gate_gradient`."""
    return "; ".join(f"{part}: {', '.join(r.name for r in records if r.part == part)}" for part in PARTS)


# ---- the file and the tables ----


def sweep() -> dict[str, Any]:
    """The accounts of every model, dtype, batch, linear and path, as tables for the file of results."""
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
        "label": "predicted, not measured; assumptions in vtp_kernels/proofs/roofline.py",
        "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()},
        "paths": [columns, *rows],
        "kernels": [["kernel", "launch", *amounts, *times], *([*k, *kernels[k]] for k in sorted(kernels))],
    }


Rows = list[list[str]]  # the first is the header


def headline(block: dict[str, Paths]) -> Rows:
    """The table of extra bytes by path and linear; `!` marks more than `CLAIM`."""

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
    """The table of a block by path: bytes of the parts of a step, then sums, padding and floors."""
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
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vtp_kernels.proofs.gating_roofline", description=__doc__.splitlines()[0]
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
        if not launching.HAS_TRITON:
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
