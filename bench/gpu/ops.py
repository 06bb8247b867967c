"""One op at a time beside what one would call instead, at the widths of a compact DeiT-B in bfloat16.

Operands, implementations and what has to come out are those of bench/ops. Everyone is a captured graph and
is timed with nothing in L2: the operands of an op inside a model come from elsewhere. Beside each time of
ours stands the floor that the accounting predicts for an H100 (`vtp_kernels.proofs.roofline`), and what it
moves and multiplies, from which shares of the measured ceilings follow.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.gpu.cases import MEASURED, NOT_MEASURED, Case, Context, Record, first_line
from bench.gpu.stopwatch import Captured, Cold, Flush, in_turns
from bench.ops import (
    bench_compact_linear,
    bench_compact_mlp,
    bench_gated_linear,
    bench_layer_norm_gather,
    bench_ragged_attention,
)
from bench.ops.shapes import Case as Shape
from bench.ops.shapes import Implementation
from bench.ops.subject import Subject, mode, results
from vtp_kernels import launching
from vtp_kernels.compact_linear import compact_linear_ref
from vtp_kernels.compact_mlp import compact_mlp_ref
from vtp_kernels.gated_linear import gated_linear_ref
from vtp_kernels.layer_norm_gather import layer_norm_gather_ref
from vtp_kernels.proofs.roofline import GPUS, AccountingError, Recorder, floors, total
from vtp_kernels.ragged_attention import ragged_attention_ref

# Of each op its cases and implementations, and its definition.
OPS = {
    "compact_linear": (bench_compact_linear, compact_linear_ref),
    "ragged_attention": (bench_ragged_attention, ragged_attention_ref),
    "gated_linear": (bench_gated_linear, gated_linear_ref),
    "compact_mlp": (bench_compact_mlp, compact_mlp_ref),
    "layer_norm_gather": (bench_layer_norm_gather, layer_norm_gather_ref),
}
BATCHES = (128, 8, 1)  # one that fills the card, one that does not, and a single image
ROUNDS, ROUNDS_SECONDS = 25, 1.0


def cases(toy: bool) -> list[Case]:
    """Batch by batch, the largest first; at each the ops in order of the time they take in a model."""
    found = []
    for batch in (2,) if toy else BATCHES:
        for op, (module, *_) in OPS.items():
            for site in module.SITES:
                for backward in module.BACKWARD:
                    model, widths = ("toy" if toy else "base"), "dense" if op == "gated_linear" else "compact"
                    shape = Shape(model, widths, site, batch, "bfloat16", backward)
                    found.append(Case(f"{op} {shape}", functools.partial(measure, op, shape), 12))
    return found


def measure(op: str, shape: Shape, context: Context) -> Record:
    """Check everyone, then let them take turns."""
    module, reference = OPS[op]
    implementations: dict[str, Implementation] = module.implementations(shape)
    subject = functools.cache(functools.partial(Subject, shape, module.operands))
    entries: dict[str, Entry] = {
        name: (implementation, subject(implementation.reference or reference), nullcontext())
        for name, implementation in implementations.items()
    }
    if context.device.type == "cuda":
        for path in paths(op):
            entries[f"ours, {path}"] = *entries["ours"][:2], launching.forced_path(op, path)
    record = {"flops": 2 * entries["ours"][1].macs, "predicted": predicted(op, shape)}
    context.note(record)
    return record | {"timed": in_turns_if_right(shape, entries, context)}


Entry = tuple[Implementation, Subject, AbstractContextManager]


def in_turns_if_right(shape: Shape, entries: Mapping[str, Entry], context: Context) -> Record:
    """Records of all entries: those that compute the right thing are timed in turns.

    Args:
        entries: by name; an implementation, its operands and what they give, and a context in which it is
            captured. The first is the one that others are compared with.
    """
    records, turns, flush = {}, {}, Flush(context.device)
    for name, (implementation, subject, within) in entries.items():
        records[name], call = _ready(implementation, shape, subject, within, context)
        if call is not None:
            turns[name] = Cold(call, context.device, flush)
    if next(iter(entries)) in turns:
        figures = in_turns(turns, 3 if context.toy else ROUNDS, ROUNDS_SECONDS)
        return {name: record | figures.get(name, {}) for name, record in records.items()}
    return records


def _ready(
    implementation: Implementation,
    shape: Shape,
    subject: Subject,
    within: AbstractContextManager,
    context: Context,
) -> tuple[Record, Callable[[], Any] | None]:
    """The record of an implementation so far, and its captured call if that was right."""
    try:
        with mode(shape), within:
            call = implementation.prepare(**subject.operands)
            captured = Captured(
                functools.partial(results, call, subject.operands, subject.dy), context.device
            )
        got = captured()
        errors = subject.errors(got | {"output": implementation.kept(got["output"])})
    except Exception as error:
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # raises where nothing runs any more: then the case ends here
        return {"status": f"failed: {first_line(error)}"}, None
    for result, error in errors.items():
        if not error <= subject.bounds[result]:  # nor NaN
            bound = f"at most {subject.bounds[result]:.2g} allowed"
            return {"status": f"failed: wrong {result}: relative error {error:.2g}, {bound}"}, None
    return {"status": MEASURED, "errors": errors}, captured


def paths(op: str) -> list[str]:
    """The paths that an op chooses from, each timed at every case, so that its tables can be set."""
    try:
        return [path for names in launching.paths(op) for path in names]
    except ValueError:  # it has one only
        return []


def predicted(op: str, shape: Shape) -> Record:
    """What the accounting says of our forward pass: bytes, FLOPs as tiled, seconds on an H100 at least."""
    if shape.backward:
        return {"status": f"{NOT_MEASURED}: not accounted for"}
    module, _ = OPS[op]
    call, recorder = module.implementations(shape)["ours"].prepare(**on_meta(module, shape)), Recorder()
    try:
        with torch.no_grad(), recorder.noting():
            call()
    except AccountingError as error:
        return {"status": f"{NOT_MEASURED}: {error}"}
    return {
        "status": "predicted",
        "bytes": total(recorder.records),
        "tiled_flops": total(recorder.records, amount="tiled_flops"),
        "seconds_on_h100": floors(recorder.records)[list(GPUS).index("H100")] * 1e-6,
    }


def on_meta(module: ModuleType, shape: Shape) -> dict[str, Any]:
    """The operands of a case in bfloat16, without numbers."""
    with torch.device("meta"):
        operands = module.operands(shape)
    return {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in operands.items()
    }
