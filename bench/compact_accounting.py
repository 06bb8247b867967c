"""What a compact model moves and multiplies on a GPU, and what else one could run. Predicted.

    python -m bench.compact_accounting               # DeiT-B, 40% of dimensions removed: tables and JSON
    python -m bench.compact_accounting --markdown    # those of docs/gpu-proofs.md, from a run's file

A DeiT gets random gates, so that every layer and every head keeps a width of its own, and is cut by
`vtp.make_plan`. `vtp.optimize` of the result, and the same compact model in eager PyTorch, run on meta
tensors while every launch is noted, of Triton kernels and of PyTorch's operators (`proofs.roofline` has the
assumptions). Only the blocks count; what is around them is the same everywhere. Nothing is measured.

- kept: FLOPs of the widths that are kept, and bytes with each operand of a launch of the packed model read
  and each result written once, without any padding.
- padded: all widths a multiple of 64, values of all heads as wide as the next power of two of the widest,
  keys likewise: what dense kernels would run. Its launches are those of the packed model.
- partial sums, of products that are split for want of rows: counted like all else as written and read,
  though they are a few megabytes that the next launch reads from L2.
- folded: LayerNorm and gather inside the matrix product behind them, two launches less for a block. Each
  column of tiles then reads whole rows for the statistics, and the kept columns two bytes at a time.
"""

import argparse
import copy
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.irregular import irregular_models
from bench.results_file import add_results_file, check_results_file, print_results
from vtp.files import FileError, write_atomic
from vtp.machine import environment
from vtp.model.widths import BlockWidths
from vtp.options import positive
from vtp.pruning.compact import CompactViT
from vtp.runtime.optimize import pack_for_ops
from vtp_kernels import compact_linear, launching  # noqa: F401 (the op, so that its module is loaded)
from vtp_kernels.launching import cdiv
from vtp_kernels.proofs.roofline import GPUS, Record, Recorder, floors, total

RESULTS = Path(__file__).parent / "results" / "compact_accounting.json"
AMOUNTS = ("dram_bytes", "tile_bytes", "flops", "tiled_flops")


def random_model(name: str, rate: float, seed: int = 0) -> CompactViT:
    """A compact model whose widths are unequal in every layer and head, on the meta device, in bfloat16."""
    (small,) = irregular_models(name, [rate], seed)
    return small.to("meta", torch.bfloat16)


class LayerRecorder(Recorder):
    """Knows the layer that a launch is of."""

    layer = "outside the blocks"

    def part(self, kernel: str | None, result: Tensor | None) -> str:
        of_attention = kernel and kernel.startswith(("_ragged_attention", "_rotate_heads"))
        return "attention" if of_attention else self.layer


LAYERS = ("norm1", "qkv", "attention", "proj", "norm2", "mlp")
# The layer that begins before (False) or after (True) a module of a block, by the suffix of its name.
PACKED = {("attn.norm", False): "norm1", ("attn.norm", True): "qkv", ("attn.proj", False): "proj",
          ("mlp.norm", False): "norm2", ("mlp.norm", True): "mlp"}  # fmt: skip
EAGER = {("norm1", False): "norm1", ("attn.qkv", False): "qkv", ("attn.qkv", True): "attention",
         ("attn.proj", False): "proj", ("norm2", False): "norm2", ("mlp", False): "mlp"}  # fmt: skip


def launches(model: nn.Module, layers: dict[tuple[str, bool], str], batch: int) -> list[Record]:
    """What the blocks of `model` launch, with the layers that begin at its modules."""
    recorder = LayerRecorder()

    def begin(layer: str) -> Callable[..., None]:
        return lambda *_: setattr(recorder, "layer", layer)

    for i, block in enumerate(getattr(model, "vit", model).blocks):
        for name, module in block.named_modules():
            for (suffix, after), layer in layers.items():
                if name == suffix:
                    register = module.register_forward_hook if after else module.register_forward_pre_hook
                    register(begin(layer))
        if i + 1 == len(getattr(model, "vit", model).blocks):
            block.register_forward_hook(begin(LayerRecorder.layer))
    patch = getattr(model, "vit", model).patch_embed
    size = batch, patch.proj.in_channels, *patch.img_size
    images = torch.empty(size, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), recorder.noting():
        model(images)
    return [record for record in recorder.records if record.part in LAYERS]


def widths(small: CompactViT) -> list[BlockWidths]:
    """The kept widths of each block."""
    return [small.plan.block_widths(i) for i in range(len(small.blocks))]


def up(width: int, to: int) -> int:
    return cdiv(width, to) * to


def ideal(small: CompactViT, batch: int, pad: int = 1) -> dict[str, int]:
    """Bytes and FLOPs of the seven launches of each block, of widths rounded up to a multiple of `pad`.

    With `pad` the values of heads and the keys are a power of two besides.
    """
    D, N = small.embed_dim, small.patch_embed.num_patches + small.num_prefix_tokens
    M, moved, flops = batch * N, 0, 0
    for block in widths(small):
        qkv, values, fc1, hidden, heads = block.qkv, block.values, block.fc1, block.fc2, sum(block.keys)
        keys = N
        if pad > 1:
            qkv, fc1, hidden = up(qkv, pad), up(fc1, pad), up(hidden, pad)
            values = (1 << (max(values) - 1).bit_length(),) * len(values)
            keys = 1 << (N - 1).bit_length()
        V = sum(values)
        for K, outputs, residual in ((qkv, 2 * heads + V, 0), (V, D, D), (fc1, hidden, 0), (hidden, D, D)):
            moved += M * (K + outputs + residual) + outputs * K + outputs
            flops += 2 * M * outputs * K
        moved += M * (2 * heads + V + V)  # attention
        flops += 2 * batch * keys * keys * (heads + V) if pad > 1 else 2 * batch * N * N * (heads + V)
        moved += M * (D + qkv) + M * (D + fc1)  # norms
    return {"dram_bytes": 2 * moved, "flops": flops}


def folded(small: CompactViT, batch: int, records: Sequence[Record]) -> dict[str, int]:
    """What `records` become if LayerNorm and gather move into the product behind them.

    The product is tiled as it is: 128 columns at a time, each of which reads x for itself.
    """
    D, N = small.embed_dim, small.patch_embed.num_patches + small.num_prefix_tokens
    M, dram, tiles = batch * N, total(records), total(records, amount="tile_bytes")
    for block in widths(small):
        outputs_of_qkv = 2 * sum(block.keys) + sum(block.values)
        for K, outputs in ((block.qkv, outputs_of_qkv), (block.fc1, block.fc2)):
            dram -= 2 * 2 * M * K  # written by the norm and read by the product; x is read in its place
            tiles += 2 * M * D * cdiv(outputs, 128) - 2 * M * (D + 2 * K)
    norms = sum(record.part in ("norm1", "norm2") for record in records)
    return {"dram_bytes": dram, "tile_bytes": tiles, "launches": len(records) - norms}


def account(small: CompactViT, batch: int) -> dict[str, Any]:
    """All figures of one model at one batch size."""
    with launching.forced_path("packed_attention", "ragged"):  # what is accounted for are the ops
        packed = launches(pack_for_ops(small), PACKED, batch)
    eager = launches(copy.deepcopy(small), EAGER, batch)
    layers = {}
    for layer in LAYERS:
        layers[layer] = {}
        for who, records in (("packed", packed), ("eager", eager)):
            own = [record for record in records if record.part == layer]
            layers[layer][who] = _sums(own)
    return {
        "kept": ideal(small, batch),
        "padded": ideal(small, batch, pad=64),
        "packed": _sums(packed),
        "eager": _sums(eager),
        "folded": folded(small, batch, packed),
        "layers": layers,
        "kernels": sorted({record.name for record in packed}),
    }


def _sums(records: Sequence[Record]) -> dict[str, Any]:
    sums = {amount: total(records, amount=amount) for amount in AMOUNTS}
    times = dict(zip(GPUS, floors(records), strict=True)) if records else dict.fromkeys(GPUS, 0.0)
    sums["partial_bytes"] = sum(record.partial_bytes for record in records)
    return {"launches": len(records), **sums, "floor_us": times}


# --------------------------------------------------------------------------------
# Tables

Rows = list[list[str]]  # the first is the header


def waste(content: dict[str, Any]) -> Rows:
    """FLOPs and bytes over those kept."""
    rows = [
        [
            "batch", "kept FLOPs", "as tiled", "padded", "least bytes", "packed", "of it partial sums",
            "padded", "eager PyTorch", "folded norms: bytes", "reads of L2",
            "launches per block: packed", "folded", "eager",
        ]
    ]  # fmt: skip
    for batch, found in content["batches"].items():
        kept, packed, eager, inside = (found[name] for name in ("kept", "packed", "eager", "folded"))
        blocks = content["blocks"]
        rows.append([
            batch,
            f"{kept['flops'] / 1e9:,.2f} G",
            f"{packed['tiled_flops'] / kept['flops']:.3f}x",
            f"{found['padded']['flops'] / kept['flops']:.3f}x",
            f"{kept['dram_bytes'] / 1e6:,.0f} MB",
            f"{packed['dram_bytes'] / kept['dram_bytes']:.3f}x",
            f"{packed['partial_bytes'] / kept['dram_bytes']:.3f}x",
            f"{found['padded']['dram_bytes'] / kept['dram_bytes']:.3f}x",
            f"{eager['dram_bytes'] / kept['dram_bytes']:.3f}x",
            f"{inside['dram_bytes'] / kept['dram_bytes']:.3f}x",
            f"{inside['tile_bytes'] / packed['tile_bytes']:.2f}x",
            *(f"{found[who]['launches'] / blocks:.1f}" for who in ("packed", "folded", "eager")),
        ])  # fmt: skip
    return rows


def by_layer(content: dict[str, Any], batch: str) -> Rows:
    """A table of all blocks together, the packed model beside eager PyTorch."""
    names = [name for name in GPUS if name in ("A100", "H100")]
    rows = [["layer", "launches", "MB", "GFLOP", *(f"{name}, us" for name in names)]]
    found = content["batches"][batch]
    for layer, both in {**found["layers"], "all": found}.items():
        packed, eager = both["packed"], both["eager"]

        def pair(value: Any, packed: Any = packed, eager: Any = eager) -> str:
            return f"{value(packed)} / {value(eager)}"

        rows.append([
            layer,
            pair(lambda sums: str(sums["launches"])),
            pair(lambda sums: f"{sums['dram_bytes'] / 1e6:,.1f}"),
            pair(lambda sums: f"{sums['tiled_flops'] / 1e9:,.2f}"),
            *(pair(lambda sums, name=name: f"{sums['floor_us'][name]:,.0f}") for name in names),
        ])  # fmt: skip
    return rows


def tables(content: dict[str, Any]) -> dict[str, Rows]:
    name = f"{content['model']}, {100 * content['rate']:.0f}% of dimensions removed, bfloat16, predicted"
    shown = {f"FLOPs and bytes of the blocks, over those kept: {name}": waste(content)}
    for batch in content["batches"]:
        title = f"Blocks, packed / eager PyTorch, and floors by launch: batch {batch}, {name}"
        shown[title] = by_layer(content, batch)
    return shown


def markdown(content: dict[str, Any]) -> str:
    """All tables, each below its title."""
    lines = []
    for title, rows in tables(content).items():
        first, *others = ["| " + " | ".join(row) + " |" for row in rows]
        lines += [f"{title}\n", first, "| " + " | ".join(["---"] * len(rows[0])) + " |", *others, ""]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and check its options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_base_patch16_224", help="of timm: deit_base_patch16_224")
    parser.add_argument("--rate", type=float, default=0.4, help="share of dimensions to remove: 0.4")
    parser.add_argument("--batch", type=positive(int), nargs="+", default=[1, 8, 128], help="images: 1 8 128")
    add_results_file(parser, RESULTS)
    options = parser.parse_args(argv)
    if not 0 <= options.rate < 1:
        parser.error(f"argument --rate: got {options.rate:g}, expected a share of at least 0 and below 1")
    check_results_file(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 where nothing can be counted, read or written."""
    options = parse_arguments(argv)
    if options.markdown:
        return print_results(options.out, markdown)
    if not launching.HAS_TRITON:
        print("error: Triton is not installed: nothing can be launched", file=sys.stderr)
        return 2
    try:
        small = random_model(options.model, options.rate)
    except (RuntimeError, ValueError, TypeError) as error:  # of timm, or of what vtp does not support
        print(f"argument --model: got {options.model!r}: {error}", file=sys.stderr)
        return 2
    content = {
        "label": "predicted, not measured; assumptions in vtp_kernels/proofs/roofline.py",
        "model": options.model,
        "rate": options.rate,
        "widths": [list(dataclasses.astuple(each)) for each in widths(small)],
        "blocks": len(small.blocks),
        "environment": environment(),
        "batches": {str(batch): account(small, batch) for batch in options.batch},
    }
    text = json.dumps(content, indent=1) + "\n"
    try:
        write_atomic(options.out, lambda path: path.write_text(text, encoding="utf-8"))
    except FileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 200)
    for title, (first, *rows) in tables(content).items():
        table = Table(title=title, title_justify="left")
        for column in first:
            table.add_column(column, justify="left" if column == "layer" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(f"Written to {options.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
