"""What a compiled kernel uses, read from its disassembly, and how much of a chip that is.

`measure` turns the machine code that Triton made for one of `launching.TARGETS` into a dictionary: registers,
spills, shared memory, matrix-core instructions, widths of global accesses, occupancy. Nothing runs, no GPU is
needed. NVIDIA code is read with the cuobjdump and nvdisasm that Triton ships, AMD code is text already.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Chip:
    """The limits on the blocks that one multiprocessor (SM, or compute unit) holds at a time, in bytes.

    Every chip here has four partitions per multiprocessor, each with 512 32-bit registers per lane that are
    given out eight at a time: in NVIDIA's words 65,536 registers per SM, in units of 256 per warp.
    """

    warp: int  # threads
    warps: int
    blocks: int
    shared: int
    shared_block: int  # the most that one block can ask for
    shared_reserved: int  # what the driver takes for itself in each block
    shared_unit: int
    registers: int = 255  # per thread

    partitions = 4
    partition_registers = 512
    register_unit = 8


KB = 1024

# NVIDIA: CUDA Programming Guide, appendix "Compute Capabilities", table "Technical Specifications per Compute
# Capability"; the reserved KB and the allocation units are those of the toolkit's occupancy calculator,
# cuda_occupancy.h. AMD: LLVM's "User Guide for AMDGPU Backend" for gfx942 (512 vector registers per lane of a
# SIMD, AGPRs among them, in units of 8; 8 waves per SIMD; LDS in units of 128 words) and AMD's "CDNA3 ISA"
# reference (64 KB of LDS per compute unit). A workgroup of more than one wave also takes one of 16 barriers:
# 32 waves can never use those up.
CHIPS = {
    "sm_80": Chip(32, 64, 32, 164 * KB, 163 * KB, KB, 128),
    "sm_90": Chip(32, 64, 32, 228 * KB, 227 * KB, KB, 128),
    "sm_100": Chip(32, 64, 32, 228 * KB, 227 * KB, KB, 128),
    "sm_120": Chip(32, 48, 24, 100 * KB, 99 * KB, KB, 128),
    "gfx942": Chip(64, 32, 32, 64 * KB, 64 * KB, 0, 512, registers=512),
}

TENSOR_MEMORY_COLUMNS = 512  # of an sm_100 SM (PTX ISA, tcgen05); what tcgen05 multiplies accumulates there


def occupancy(
    target: str, threads: int, registers: int, shared: int, tensor_memory: int = 0
) -> tuple[int, int]:
    """How many blocks a multiprocessor of `target` holds at a time, and what percentage of its warps that is.

    Args:
        threads: threads of one block.
        registers: registers per thread.
        shared: bytes that the kernel asks for, the reserved part not counted.
        tensor_memory: columns of tensor memory (sm_100).
    """
    chip = CHIPS[target]
    if shared > chip.shared_block or registers > chip.registers:
        return 0, 0
    warps = -(-threads // chip.warp)
    # A warp's registers come from one partition, so what is left over in each of the four is lost.
    per_lane = _round_up(max(registers, 1), chip.register_unit)
    limits = [
        chip.blocks,
        chip.warps // warps,
        chip.partitions * (chip.partition_registers // per_lane) // warps,
    ]
    if shared + chip.shared_reserved:
        limits.append(chip.shared // _round_up(shared + chip.shared_reserved, chip.shared_unit))
    if tensor_memory:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory)
    blocks = min(limits)
    return blocks, 100 * blocks * warps // chip.warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def measure(target: str, asm: Mapping[str, Any], metadata: Any, tile_bytes: int) -> dict[str, Any]:
    """What one compilation uses of its chip, by name; `proofs.compilations` says what of it is allowed.

    Args:
        asm, metadata: of the `CompiledKernel` that `triton.compile` returns.
        tile_bytes: what a TMA instruction moves, to weigh it against ordinary loads; 0 without any.
    """
    threads = metadata.num_warps * CHIPS[target].warp
    found = _amd(asm["amdgcn"]) if "amdgcn" in asm else _nvidia(asm["cubin"])
    blocks, percent = occupancy(
        target, threads, found["registers"], metadata.shared, getattr(metadata, "tmem_size", None) or 0
    )
    for kind in ("load", "store"):
        accesses = found[f"{kind}s"]
        found[f"{kind}_width"], found[f"wide_{kind}s"] = _widths(accesses, threads, tile_bytes)
        found[f"{kind}s"] = {str(width): accesses[width] for width in sorted(accesses, key=str)}
    return found | {"threads": threads, "shared": metadata.shared, "blocks": blocks, "occupancy": percent}


def _widths(accesses: Mapping[int | str, int], threads: int, tile_bytes: int) -> tuple[int, int]:
    """The width by which, or more, half of the bytes move, and the percentage that moves by 16 or more.

    By bytes, not by instructions: a scalar or a small vector beside a tile does not count for more than it
    moves. A TMA instruction moves a tile for the whole block, and is as good as 16 bytes.
    """
    moved = Counter()
    for width, count in accesses.items():
        if width == "tma":
            moved[16] += count * max(tile_bytes // threads, 1)
        else:
            moved[width] += count * width
    total, seen = sum(moved.values()), 0
    if not total:
        return 0, 0
    wide = 100 * sum(moved[width] for width in moved if width >= 16) // total
    for width in sorted(moved, reverse=True):
        seen += moved[width]
        if 2 * seen >= total:
            break
    return width, wide


# ---- NVIDIA ----

# `        /*00f0*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;`
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_TENSOR = re.compile(r"[A-Z]*MMA\b")
_SASS_FP64 = re.compile(r"D(?:ADD|FMA|MMA|MNMX|MUL|SETP)\b|\w+\..*\bF64\b")
_SASS_LOADS = {"LDG", "LDGSTS", "LD"}
_SASS_STORES = {"STG", "ST"}
_SASS_TMA = {"UTMALDG": "loads", "UBLKCP": "loads", "UTMASTG": "stores", "UTMAREDG": "stores"}
_SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", file)
        code = _run("nvdisasm", "-c", file)
    # More than one function where a device function is not inlined: the kernel needs the most of each.
    used = {
        name: max(int(value) for value in re.findall(rf"\b{name}:(\d+)", usage))
        for name in ("REG", "STACK", "LOCAL")
    }
    found = read_sass(code)
    return found | {
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "scalar_spills": 0,
    }


def _run(tool: str, *arguments: str | Path) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, tool).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_sass(code: str) -> dict[str, Any]:
    """Count the instructions that matter in NVIDIA machine code, as `nvdisasm -c` prints it."""
    found = _nothing()
    instructions = Counter(_SASS.findall(code))
    for name, count in instructions.items():
        base, *suffixes = name.split(".")
        width = next((_SASS_BYTES[suffix] for suffix in suffixes if suffix in _SASS_BYTES), 4)
        if base in ("LDL", "STL"):
            found["local_accesses"] += count
        elif base in _SASS_TMA:
            found[_SASS_TMA[base]]["tma"] += count
        elif base in _SASS_LOADS:
            found["loads"][width] += count
        elif base in _SASS_STORES:
            found["stores"][width] += count
        elif _SASS_FP64.match(name):
            found["fp64"] += count
        if _SASS_TENSOR.match(base):
            found["tensor"][name] = count
    found["code_bytes"] = 16 * instructions.total()
    return found


# ---- AMD ----

_GCN = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)
_GCN_TENSOR = re.compile(r"v_s?mfma")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z]+?)(?:x(\d))?(?![a-z])")
_GCN_BYTES = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


def _amd(code: str) -> dict[str, Any]:
    def value(name: str) -> int:
        return max(int(number) for number in re.findall(rf"{name}\s*[:=]\s*(\d+)", code))

    # .vgpr_count has the accumulation registers in it: since gfx90a they come from the same file.
    return read_gcn(code) | {
        "registers": value(r"\.vgpr_count"),
        "spill_bytes": value(r"\.private_segment_fixed_size"),
        "scalar_spills": value(r"\.sgpr_spill_count"),
        "code_bytes": value("codeLenInByte"),
    }


def read_gcn(code: str) -> dict[str, Any]:
    """Count the instructions that matter in AMD assembly."""
    found = _nothing()
    for name, count in Counter(_GCN.findall(code)).items():
        if name.startswith("scratch_"):
            found["local_accesses"] += count
        elif access := _GCN_ACCESS.match(name):
            kind, element, times = access.groups()
            found[f"{kind}s"][_GCN_BYTES.get(element, 4) * int(times or 1)] += count
        elif _GCN_TENSOR.match(name):
            found["tensor"][name] = count
        elif name.startswith("v_") and "_f64" in name:
            found["fp64"] += count
    return found


def _nothing() -> dict[str, Any]:
    return {"loads": Counter(), "stores": Counter(), "tensor": {}, "local_accesses": 0, "fp64": 0}


def tensor_families(tensor: Mapping[str, int]) -> Iterator[str]:
    """Names of matrix-core instructions without shapes: HGMMA.F32.BF16 for HGMMA.64x128x16.F32.BF16."""
    for name in tensor:
        if name.startswith("v_"):
            yield re.sub(r"_\d+x\d+x\d+\w*?_", "_", name + "_").rstrip("_")
        else:
            yield ".".join(part for part in name.split(".") if not re.fullmatch(r"\d+(x\d+)*", part))
