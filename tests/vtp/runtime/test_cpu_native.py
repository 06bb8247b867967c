"""The C++ of the CPU engine without PyTorch: `tests/native`, built with sanitizers and run.

AVX-512 and AMX instructions are emulated (tests/native/emulated), so that its kernels are tested on every
machine.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[3]
CPU, NATIVE = ROOT / "csrc" / "cpu", ROOT / "tests" / "native"
COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")

X86 = platform.machine() in ("x86_64", "AMD64")
# Emulated instructions become AVX2 ones where there are: faster, and the same numbers.
AVX2 = ["-mavx2", "-mfma"] if X86 and torch.backends.cpu.get_cpu_capability() != "DEFAULT" else []
EMULATED = [f"-I{NATIVE / 'emulated'}", *AVX2]
# The checks are not what is checked: without UndefinedBehaviorSanitizer they compile in half the time.
CHECKS = ["-fno-sanitize=undefined"]
ENGINE = {
    CPU / "portable.cpp": [],
    CPU / "model.cpp": [],
    CPU / "engine.cpp": [],
    CPU / "trial.cpp": [],
    CPU / "amx_support.cpp": [],
    NATIVE / "main.cpp": CHECKS,
    NATIVE / "kernel_checks.cpp": CHECKS,
    NATIVE / "engine_checks.cpp": CHECKS,
    NATIVE / "choice_checks.cpp": CHECKS,
}
# The engine first: of a function that both have, the linker takes the first, here the one with sanitizers.
EVERY_SET = {CPU / f"{name}.cpp": EMULATED for name in ("avx512", "avx512_bf16", "amx_bf16")}
EVERY_SET[CPU / "avx512.cpp"] = [*EMULATED, *CHECKS]  # every line of it is in another file too
EVERY_SET[NATIVE / "tile_checks.cpp"] = [*EMULATED, *CHECKS]
if X86:
    EVERY_SET[CPU / "avx2.cpp"] = ["-mavx2", "-mfma"]
EVERY_SET |= ENGINE
# Memory that was not written yet is NaN, in float32 and in bfloat16.
UNWRITTEN_IS_NAN = "max_malloc_fill_size=1000000000:malloc_fill_byte=255"
# -Og compiles in 60% of the time of -O1; what it makes runs half as long again, which is less than it saves.
FLAGS = ["-std=c++17", "-Og", "-g1", "-Wno-psabi", f"-I{CPU}"]


@pytest.fixture(scope="module")
def memory_checked(tmp_path_factory):
    """The program with every instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    # What touches null or memory behind an object ends by AddressSanitizer: not also looked for beforehand.
    flags = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]
    with_sets = ["-DWITH_AVX512", *(["-DWITH_AVX2"] if X86 else [])]
    return build(folder_of_the_run(tmp_path_factory) / "memory", EVERY_SET, flags, with_sets)


@pytest.fixture(scope="module")
def thread_checked(tmp_path_factory):
    """The program with the portable kernels, under ThreadSanitizer."""
    return build(folder_of_the_run(tmp_path_factory) / "threads", ENGINE, ["-fsanitize=thread"])


def folder_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that all workers of pytest-xdist have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def build(
    folder: Path, sources: dict[Path, list[str]], sanitizer: list[str], more: Sequence[str] = ()
) -> Path:
    """Compile and link `sources` with their flags, once of all processes that name the folder; skips where
    there are no such sanitizers."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    program = folder / "engine_test"
    with FileLock(f"{folder}.lock"):
        if not program.exists():
            folder.mkdir(exist_ok=True)
            refuse_missing_sanitizer(folder, sanitizer)
            compile_program(program, sources, sanitizer, more)
    return program


def compile_program(
    program: Path, sources: dict[Path, list[str]], sanitizer: list[str], more: Sequence[str]
) -> None:
    objects = [program.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compiler, *FLAGS, *sanitizer, *more, *flags, "-c", str(source), "-o", str(target))
            for (source, flags), target in zip(sources.items(), objects, strict=True)
        ]
    for job in jobs:
        job.result()
    linked = program.with_suffix(".linked")
    compiler(*sanitizer, *map(str, objects), "-o", str(linked), "-pthread")
    linked.rename(program)  # which is there only whole


def compiler(*arguments: str) -> None:
    run = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def refuse_missing_sanitizer(folder: Path, sanitizer: list[str]) -> None:
    """Skips if a program built with it does not even return 0 here."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    built = subprocess.run(
        [COMPILER, *sanitizer, str(source), "-o", str(program)], capture_output=True, text=True
    )
    run = built if built.returncode else subprocess.run([program], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"{COMPILER} {sanitizer[0]} does not work here: {run.stderr.strip()[-200:]}")


def check(program: Path, *group: str) -> None:
    environment = os.environ | {"ASAN_OPTIONS": UNWRITTEN_IS_NAN}
    run = subprocess.run([program, *group], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-6000:]}"


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sanitizers as of GCC and Clang")


def test_a_kernel_agrees_with_plain_loops_and_stays_in_its_memory(memory_checked):
    check(memory_checked, "kernels")


def test_emulated_tiles_multiply_and_fault_as_a_processor_does(memory_checked):
    check(memory_checked, "tiles")


def test_only_right_and_fast_kernels_are_chosen_and_tiles_where_all_allow_them(memory_checked):
    check(memory_checked, "choice")


def test_a_model_agrees_with_plain_loops_and_stays_in_its_memory(memory_checked):
    check(memory_checked, "models")


@pytest.mark.thorough  # of which every pair of widths, of shapes and dtypes occurs above
@pytest.mark.parametrize("group", ["kernels", "models", "blocks"])
def test_so_it_is_for_every_combination(memory_checked, group):
    check(memory_checked, group, "everything")


@pytest.mark.thorough  # the same bits are asked for in test_cpu.py, the same memory by the models above
def test_an_image_has_the_same_logits_alone_and_in_a_batch(memory_checked):
    check(memory_checked, "batches")


@pytest.mark.thorough  # likewise
def test_threads_that_are_few_or_late_change_no_bit(memory_checked):
    check(memory_checked, "threads")


def test_blocks_for_a_larger_or_smaller_cache_change_no_bit(memory_checked):
    check(memory_checked, "blocks")


def test_a_steady_stream_of_calls_takes_no_memory(memory_checked):
    check(memory_checked, "steady")


def test_a_garbled_model_is_refused_or_stays_in_its_memory(memory_checked):
    check(memory_checked, "garbled")


def test_a_model_that_makes_no_sense_is_refused(memory_checked):
    check(memory_checked, "wrong")


def test_a_list_that_claims_to_be_long_takes_no_memory_to_refuse(memory_checked):
    check(memory_checked, "claims")


@pytest.mark.thorough  # a build of its own
@pytest.mark.parametrize("group", ["threads", "callers"])
def test_threads_and_callers_do_not_race(thread_checked, group):
    check(thread_checked, group)


def test_processes_that_need_the_same_program_at_once_build_it_once(tmp_path, monkeypatch):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    source, noted, noting = tmp_path / "nothing.cpp", tmp_path / "noted", tmp_path / "compiler"
    source.write_text("int main() { return 0; }\n")
    noting.write_text(f'#!/bin/sh\necho "$@" >> {noted}\nexec {COMPILER} "$@"\n')
    noting.chmod(0o755)
    monkeypatch.setattr(f"{__name__}.COMPILER", str(noting))
    with ThreadPoolExecutor(2) as pool:  # locks of one process keep each other out as those of two do
        first, second = pool.map(lambda _: build(tmp_path / "program", {source: []}, ["-g0"]), range(2))
    assert first == second and first.exists()
    probe, *compiled, link = noted.read_text().splitlines()
    assert "probe.cpp" in probe and "engine_test" in link
    assert len(compiled) == 1 and "nothing.cpp" in compiled[0]
