"""Compile all kernels that a saved compact model launches, before it is served and without a GPU.

    python -m vtp.runtime.ahead_of_time FILE.safetensors --target sm_90 [--dtype bfloat16] [--cache FOLDER]

Served with TRITON_CACHE_DIR=FOLDER, the model finds every kernel compiled, at any batch size; with the same
version of Triton, and with the folder at the same path, as Triton notes absolute paths in it.

Exit status: 0; 1 where a kernel does not compile; 2 where there is nothing to compile or to compile it with.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from vtp.checkpoint import load
from vtp.pruning.compact import CompactModel
from vtp.runtime.optimize import ImageSpec, pack_for_ops
from vtp_kernels import launching
from vtp_kernels.library import TritonSides
from vtp_kernels.proofs.compilations import (
    CompilationError,
    check_compiler,
    compile_variant,
    key,
    print_target,
)


@torch.no_grad()
def kernels(model: CompactModel, dtype: torch.dtype, target: str) -> list[launching.Variant]:
    """The compilations that `optimize(model, dtype)` launches, at any batch size, as long as heads are not
    padded for PyTorch's attention; where they are, that of `ragged_attention` is one too many.

    Args:
        target: the GPU, a key of `vtp_kernels.launching.TARGETS`. Nothing runs on it: the packed model runs
            on meta tensors, while its launches are noted.

    Raises:
        TypeError: the model is no compact model.
        ValueError: it cannot be packed in that dtype.
    """
    packed, spec = pack_for_ops(model, dtype).to("meta"), ImageSpec.of(model)
    images = torch.empty(1, spec.channels, *spec.size, dtype=dtype, device="meta")
    with launching.recording("model", target) as found, TritonSides():
        # Batch sizes choose between a product in one piece or in parts, and the vendor's.
        for batch in (1, 2, 4, 8, 16, 32, 64, 256):
            packed(images.expand(batch, -1, -1, -1))
    return list(found.values())


def compile_kernels(file: Path, target: str, dtype: torch.dtype, cache: Path, console: Console) -> list[str]:
    """Compile what a saved model needs into `cache`, a folder in Triton's layout. Returns the failures."""
    needed = kernels(load(file), dtype, target)
    os.environ["TRITON_CACHE_DIR"] = str(cache)  # read by Triton whenever it compiles
    shown = track(needed, "Compiling", console=Console(stderr=True), transient=True)
    records = {key(record): record for record in (compile_variant(v, target) for v in shown)}
    print_target(console, target, list(records.values()))
    failures = [f"{name}: {record['error']}" for name, record in records.items() if "error" in record]
    console.print(
        f"{len(records) - len(failures)} distinct kernels for {target} are in {cache}\n"
        f"Serve with TRITON_CACHE_DIR={cache}",
        highlight=False,
        soft_wrap=True,
    )
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vtp.runtime.ahead_of_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("file", type=Path, help="a compact model that `vtp.save` wrote")
    parser.add_argument(
        "--target", choices=launching.TARGETS, required=True, help="the GPU that will serve it"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--cache", type=Path, default=Path("triton_cache"), help="folder: triton_cache")
    options = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)  # a folded table cannot be read
    try:
        check_compiler()
        dtype, cache = getattr(torch, options.dtype), options.cache.absolute()
        failures = compile_kernels(options.file, options.target, dtype, cache, console)
    except (CompilationError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
