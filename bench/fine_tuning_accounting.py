"""A step of fine-tuning a compact model on a GPU, launch by launch, beside one of the dense model. Predicted.

    python -m bench.fine_tuning_accounting          # DeiT-B, 40% of dimensions removed, batch 128: a table

The blocks run forward and backward under bfloat16 autocast, on tensors without data, while every launch is
noted: the dense model, the compact one on padded widths (`vtp/pruning/padded.py`) and on the ops. A launch is
taken to last as long as its bytes, each operand read and each result written once, or its FLOPs at the rates
below, whichever is longer. What is around the blocks (patches, head, loss, optimizer), and what launches take
longer than that, is what the dense step took on an H200 beyond its own prediction, for all alike. The host is
not counted: how many launches a step has stands beside the time.
"""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

import vtp
from bench.irregular import cut, gated_model
from vtp.pruning import compact
from vtp_kernels import launching
from vtp_kernels.proofs.roofline import Record, Recorder

NAME, BATCH, RATE = "deit_base_patch16_224", 128, 0.4
# Of an H200 (bench/results/gpu-h200.json): bytes/s of a copy, and FLOP/s in bfloat16 of products of the dense
# model (its qkv in 136 us) and of the compact one on padded operands (101 us), and of attention, PyTorch's
# fused one and the op. Attention backward was not measured: it is taken to be as fast as forward.
BANDWIDTH, DENSE, COMPACT, FUSED, RAGGED = 4.19e12, 6.6e14, 4.6e14, 1.8e14, 5.8e13
DENSE_STEP = 49.4e-3  # seconds, measured, eager
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product_flash_attention"


class FlashAttention(TorchFunctionMode):
    """PyTorch's attention is the operator that a GPU takes under autocast, on any device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        heads = (t.to(torch.bfloat16) for t in args[:3])
        return getattr(torch.ops.aten, ATTENTION)(*heads, 0.0, False, scale=kwargs.get("scale"))[0]


class StepRecorder(Recorder):
    """Notes the launches of backward passes too, and the operands of products that are not aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.misaligned: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.flops = 0  # of the op that runs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks a tensor something
            return func(*args, **(kwargs or {}))
        if func.namespace == "vtp":
            count = flop_registry.get(func.overloadpacket)
            self.flops = 0 if count is None else count(*args, out_val=None)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add_operator(self, func, args, kwargs, result) -> None:
        super()._add_operator(func, args, kwargs, result)
        name = func.overloadpacket.__name__
        if name in PRODUCTS or ATTENTION in name:
            tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
            matrices = [t for t in tensors if t.ndim > 1 and t.itemsize == 2]
            self.misaligned += [(name, tuple(t.shape), t.stride()) for t in matrices if not is_aligned(t)]

    def launch(self, kernel, grid, arguments, config, **constants) -> None:
        values = [v.base if isinstance(v, launching.TensorDescriptor) else v for v in arguments.values()]
        tensors = {id(v): v for v in values if isinstance(v, Tensor)}
        moved = sum(t.numel() * t.element_size() for t in tensors.values())
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        # Two launches share the backward pass of attention.
        flops = (
            0 if "attention" not in name else self.flops // (1 if "fwd" in name or "online" in name else 2)
        )
        self.records.append(Record(name, "", moved, moved, flops, flops, 2))


def is_aligned(t: Tensor) -> bool:
    """Whether matrices of 16-bit numbers can be read 16 bytes at a time: what is contiguous in them, and all
    other steps, and where they begin, are multiples of 8 numbers."""
    inner = next((i for i, step in enumerate(t.stride()) if step == 1), None)
    if inner is None:
        return False
    steps = [step for i, step in enumerate(t.stride()) if i != inner and t.shape[i] > 1]
    return not any(n % 8 for n in (t.shape[inner], *steps, t.storage_offset()))


@dataclass(frozen=True)
class Account:
    """What the blocks launch in a step: records, and operands that are not aligned."""

    records: Sequence[Record]
    misaligned: Sequence[tuple]

    @property
    def gigabytes(self) -> float:
        return sum(r.dram_bytes for r in self.records) / 1e9

    def seconds(self, products: float) -> float:
        """Predicted, for products at so many FLOP/s."""

        def of(record: Record) -> float:
            rate = products
            if "attention" in record.name:
                rate = FUSED if record.name.startswith(ATTENTION) else RAGGED
            return max(record.dram_bytes / BANDWIDTH, record.flops / rate)

        return sum(map(of, self.records))


@contextlib.contextmanager
def as_on_a_gpu(path: str) -> Iterator[None]:
    """Context in which compact models take the path that they take on a GPU."""
    everywhere = mock.patch.object(compact, "_on_kernels", lambda x: True)
    with everywhere, launching.forced_path("compact_training", path):
        yield


def account(model: nn.Module, path: str, batch: int = BATCH) -> Account:
    """A step of all blocks of a model, on the CPU; "padded" or "narrow" says which way a compact one goes."""
    blocks, recorder = model.blocks.train(), StepRecorder()
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens

    def step(tensors: dict[str, Tensor], x: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16), FlashAttention():
            out = torch.func.functional_call(blocks, tensors, (x,))
        out.backward(torch.empty_like(out))

    state = {**dict(blocks.named_parameters()), **dict(blocks.named_buffers())}
    with as_on_a_gpu(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether rows are aligned is asked of an address
        blocks(torch.zeros(1, tokens, model.embed_dim))  # makes what is made once
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in state.items()}
            for name, parameter in blocks.named_parameters():
                fake[name].requires_grad_(parameter.requires_grad)
            x = torch.empty(batch, tokens, model.embed_dim, requires_grad=True)
            with recorder.noting():
                step(fake, x)
    return Account(recorder.records, recorder.misaligned)


def table(depth: int, batch: int, print_line: Callable[[str], object]) -> None:
    """Print dense, padded and narrow steps as a table in Markdown."""
    dense = timm.create_model(NAME, depth=depth)
    small = cut(gated_model(NAME, depth=depth), RATE)
    promised = vtp.count(dense).macs / vtp.count(small).macs
    whole = account(dense, "padded", batch)
    around = DENSE_STEP - whole.seconds(DENSE)
    print_line("| blocks of | launches | GB | products and attention, TFLOP | step, ms | share of MACs |")
    print_line("|---|---|---|---|---|---|")
    found = {
        "the dense model": (whole, DENSE),
        "the compact one on padded widths": (account(small, "padded", batch), COMPACT),
        "the compact one on the ops": (account(small, "narrow", batch), COMPACT),
    }
    for name, (own, rate) in found.items():
        seconds = own.seconds(rate) + around
        share = "" if own is whole else f"{DENSE_STEP / seconds / promised:.2f}"
        flops = sum(r.flops for r in own.records) / 1e12
        cells = name, len(own.records), f"{own.gigabytes:.1f}", f"{flops:.1f}", f"{seconds * 1e3:.1f}", share
        print_line(f"| {' | '.join(map(str, cells))} |")
        for name, shape, stride in own.misaligned:
            print_line(f"not aligned: {name} {shape} {stride}")
    print_line(f"\nAround the blocks, and slower than predicted: {around * 1e3:.1f} ms, in each.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--depth", type=int, default=12, help="blocks (%(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="images (%(default)s)")
    given = parser.parse_args(arguments)
    table(given.depth, given.batch, lambda line: Console().print(line, markup=False, soft_wrap=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
