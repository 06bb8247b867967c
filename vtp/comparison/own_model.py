"""`vtp bench MODEL`: a user's compact model by every runtime, beside the dense one; where time is lost."""

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vtp.comparison.comparison import Budget, Record, Subject, compare_runtimes
from vtp.comparison.runtimes import COMPILERS, DTYPES, RUNTIMES, Run, Runtime
from vtp.comparison.tables import Rows, in_rounds
from vtp.model.cost import attention_cost, count, mlp_cost
from vtp.model.eva import ropes
from vtp.pruning.compact import CompactModel, ConstantBranch, compact
from vtp.pruning.gates import insert_gates
from vtp.pruning.selection import make_plan
from vtp.runtime import cpu
from vtp.runtime.optimize import pack_for_ops, packed_model
from vtp.timing import pairwise_ratio

# Shares of removed MACs that became removed time: from the first on a cut paid, below the second it did not.
PAID, IN_PART = 0.8, 0.3
# By these both models are run, to see what the cut brings.
_BESIDE = ("ours", "PyTorch eager", "OpenVINO")


class Blocks(nn.Module):
    """The blocks of a compact or packed model: tokens [B, N, embed_dim] of images of its own size to the same
    shape."""

    def __init__(self, vit: CompactModel) -> None:
        super().__init__()
        self.vit = vit
        with torch.no_grad():
            self.ropes = ropes(vit)

    def forward(self, tokens: Tensor) -> Tensor:
        for block, rope in zip(self.vit.blocks, self.ropes, strict=True):
            tokens = block(tokens, rope=rope)
        return tokens


def prepare_blocks(model: Blocks, tokens: Tensor, *, dtype: str) -> Run:
    """The blocks as `vtp.optimize` runs them."""
    packed, tokens = packed_model(model.vit, DTYPES[dtype]), tokens.to(DTYPES[dtype])
    if cpu.unsupported_reason(packed, DTYPES[dtype]) is None:
        blocks = Blocks(cpu.pack_blocks(packed, DTYPES[dtype]))
    else:
        blocks = Blocks(pack_for_ops(model.vit, DTYPES[dtype]).vit)
    return lambda: blocks(tokens)


# --------------------------------------------------------------------------------
# The comparisons


def dense_of(small: CompactModel) -> CompactModel:
    """The dense model that a compact one was cut from, with random weights: the file does not have them."""
    torch.manual_seed(0)
    gated = insert_gates(small.plan.architecture.build("cpu"))
    dense = compact(gated, make_plan(gated, rate=0.0)).eval()
    return dense.to(small.patch_embed.proj.weight.device)


def compare(
    small: CompactModel,
    batch: int,
    dtypes: Sequence[str],
    budget: Budget,
    *,
    compilers: bool = False,
    report: Callable[[str], object] = lambda doing: None,
) -> Record:
    """A compact model by every runtime, and the dense one by some: see `compare_runtimes`.

    Args:
        small: in float32, on the device to compare on.
        batch: images in a call.
        compilers: whether torch.compile takes part, which needs minutes.
        report: see `compare_runtimes`.
    """
    dense = dense_of(small)
    patch, device = small.patch_embed, small.patch_embed.proj.weight.device
    generator = torch.Generator().manual_seed(0)
    try:
        images = torch.randn(batch, patch.proj.in_channels, *patch.img_size, generator=generator).to(device)
    except RuntimeError as error:  # of PyTorch's allocator
        raise ValueError(f"batch: got {batch}, expected images that fit into memory ({error})") from error
    subject, beside = (Subject(m, images, macs=count(m).macs) for m in (small, dense))
    runtimes = [p for p in RUNTIMES if p.dtype in dtypes and device.type in p.devices]
    entries = {p.label: (p, subject) for p in runtimes if p.name not in COMPILERS}
    entries |= {
        f"dense: {p.label}": (dataclasses.replace(p, ours=False), beside)
        for p in runtimes
        if p.name in _BESIDE
    }
    entries |= {p.label: (p, subject) for p in runtimes if p.name in COMPILERS and compilers}
    macs = {"compact": subject.macs, "dense": beside.macs}
    return {"batch": batch, "macs": macs, **compare_runtimes(entries, budget, report=report)}


def branches(model: CompactModel) -> dict[str, tuple[Blocks, int]]:
    """Each branch of each block alone and its MACs, by name such as "blocks.3.mlp"; no constants."""
    found = {}
    for index, block in enumerate(model.blocks):
        for branch, other, norm, scale in (("attn", "mlp", "norm2", "ls2"), ("mlp", "attn", "norm1", "ls1")):
            if isinstance(getattr(block, branch), ConstantBranch):
                continue
            alone = copy.deepcopy(block)
            setattr(alone, other, ConstantBranch(model.embed_dim).to(model.patch_embed.proj.weight.device))
            setattr(alone, norm, nn.Identity())
            setattr(alone, scale, nn.Identity())
            # deepcopy takes what `memo` has for an object: everything but the blocks is copied.
            vit = copy.deepcopy(model, {id(model.blocks): nn.Sequential(alone)})
            if getattr(vit, "rope_mixed", False):  # the frequencies of this block
                vit.rope.freqs = nn.Parameter(vit.rope.freqs[:, index : index + 1])
                vit.rope.depth = 1
            found[f"blocks.{index}.{branch}"] = Blocks(vit), _macs(model, index, branch)
    return found


def _macs(model: CompactModel, block: int, branch: str) -> int:
    architecture, widths = model.plan.architecture, model.plan.block_widths(block)
    if branch == "attn":
        return attention_cost(architecture, widths.qkv, widths.values, widths.keys).macs
    return mlp_cost(architecture, widths.fc1, widths.fc2).macs


def compare_branches(small: CompactModel, batch: int, dtype: str, budget: Budget) -> Record:
    """Time of every branch on our engine, beside those of a dense block ("dense attn", "dense mlp")."""
    architecture, device = small.plan.architecture, small.patch_embed.proj.weight.device
    torch.manual_seed(0)
    gated = insert_gates(dataclasses.replace(architecture, depth=1).build("cpu"))
    dense = compact(gated, make_plan(gated, rate=0.0)).eval().to(device)
    alone = {name.replace("blocks.0.", "dense "): branch for name, branch in branches(dense).items()}
    alone |= branches(small)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, architecture.num_tokens, architecture.embed_dim, generator=generator).to(
        device
    )
    runtime = Runtime("ours", dtype, functools.partial(prepare_blocks, dtype=dtype), ours=True)
    return compare_runtimes(
        {name: (runtime, Subject(blocks, tokens, macs=macs)) for name, (blocks, macs) in alone.items()},
        budget,
    )


# --------------------------------------------------------------------------------
# What they say


def realised(record: Record, runtime: str) -> tuple[float, float] | None:
    """(speed-up over the dense model, share of removed MACs that became removed time) by one runtime, such
    as "ours, float32"; None where either model was not timed."""
    own, dense = in_rounds(record, runtime), in_rounds(record, f"dense: {runtime}")
    if own is None or dense is None:
        return None
    speedup = pairwise_ratio(dense, own)["median"]
    removed = 1 - record["macs"]["compact"] / record["macs"]["dense"]
    return speedup, (1 - 1 / speedup) / removed if removed > 0 else 1.0


def verdict(record: Record, runtime: str) -> str:
    """Whether pruning paid, in one line."""
    removed, found = 1 - record["macs"]["compact"] / record["macs"]["dense"], realised(record, runtime)
    if found is None:
        return f"{runtime}: not measured"
    speedup, share = found
    if removed <= 0:
        return f"{runtime}: nothing was pruned: {speedup:.2f}x the speed of the dense model"
    figures = f"{removed:.0%} fewer MACs, {speedup:.2f}x the speed of the dense model"
    if speedup < 1:
        return f"{runtime}: pruning did not pay: {figures}; it is slower than the dense model"
    if share >= PAID:
        return f"{runtime}: pruning paid: {figures}"
    if share >= IN_PART:
        return f"{runtime}: pruning paid in part: {figures}; {share:.0%} of removed MACs became removed time"
    return f"{runtime}: pruning did not pay: {figures}; MACs fell, time hardly did"


def lost_milliseconds(record: Record) -> dict[str, float]:
    """Milliseconds that each branch takes above its share of MACs of the dense branch's time, most first."""
    rates = {}
    for kind in ("attn", "mlp"):
        if seconds := in_rounds(record, f"dense {kind}"):
            rates[kind] = statistics.median(seconds) / record["runtimes"][f"dense {kind}"]["macs"]
    lost = {}
    for name, runtime in record["runtimes"].items():
        kind, seconds = name.rpartition(".")[2], in_rounds(record, name)
        if name.startswith("blocks.") and seconds and kind in rates:
            lost[name] = 1e3 * (statistics.median(seconds) - rates[kind] * runtime["macs"])
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def attribution_table(small: CompactModel, record: Record, rows: int = 5) -> Rows:
    """The branches that lose the most time, with their widths."""
    table: Rows = [["branch", "widths kept", "MACs", "ms", "MACs promise ms", "lost ms"]]
    for name, lost in list(lost_milliseconds(record).items())[:rows]:
        _, index, branch = name.split(".")
        runtime, part = record["runtimes"][name], getattr(small.blocks[int(index)], branch)
        if branch == "attn":
            widths = f"{part.qkv.in_features} into qkv, values {' '.join(map(str, part.value_widths))}"
            if set(part.key_widths) != {part.head_dim}:
                widths += f", keys {' '.join(map(str, part.key_widths))}"
        else:
            widths = f"{part.fc1.in_features} into fc1, {part.fc2.in_features} hidden"
        took = 1e3 * statistics.median(runtime["seconds"])
        cells = (f"{took:.2f}", f"{took - lost:.2f}", f"{lost:.2f}")
        table.append([name, widths, f"{runtime['macs'] / 1e6:.1f} M", *cells])
    return table
