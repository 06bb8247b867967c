"""Build of the package; metadata is in pyproject.toml.

The C++ operators of `csrc/cpu` become `vtp_kernels/_cpu.abi3.so` where there is a compiler and PyTorch:

    pip install .                                    # as part of the package; see tools/build_backend.py
    python setup.py build_ext --inplace              # in a checkout

Without a compiler, or with VTP_BUILD_CPP=0 in the environment, the package is pure Python and says at first
use what is slower for it; with VTP_BUILD_CPP=1 a failure of the compiler is an error.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

from tools.build_backend import find_compiler, find_torch, why_pure_python

CPU = Path("csrc/cpu")

# Each file of an instruction set has its own flags: nothing is built for the machine that builds it.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": AVX512,
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "amx_bf16.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# What older compilers do not know, GCC before 11 and Clang before 12: the engine does without such a file.
OPTIONAL = {"amx_bf16.cpp": "-DVTP_WITHOUT_AMX"}
# GCC 12 warns of its own AVX-512 headers.
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wno-uninitialized"]
# The oldest PyTorch whose stable interface is used, 2.10: one binary runs with it and all that follow.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


class BuildKernels(build_ext):
    """Adds flags by file, and goes on without the operators where the compiler fails."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler._compile

        def with_flags(obj, source, ext, arguments, extra, options):
            flags = X86_FLAGS.get(Path(source).name, [])
            compile_one(obj, source, ext, arguments, [*extra, *flags], options)

        self.compiler._compile = with_flags
        super().build_extension(extension)

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # of the compiler, whose output is above
            if os.environ.get("VTP_BUILD_CPP") == "1":
                raise
            _say_not_built(str(error))


def _say_not_built(reason: str) -> None:
    print(
        f"vtp: C++ operators not built ({reason}); vtp works without them, slower on a CPU", file=sys.stderr
    )


def compiles(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler takes these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <immintrin.h>\n")
        command = [*shlex.split(compiler), *flags, "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def sources_and_macros(compiler: str) -> tuple[list[Path], list[str]]:
    """The files of the engine for this processor that the compiler takes, and a macro for each left out."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [path for path in sorted(CPU.glob("*.cpp")) if x86 or path.name not in X86_FLAGS]
    macros = []
    for name, macro in OPTIONAL.items() if x86 else ():
        if not compiles(compiler, X86_FLAGS[name]):
            print(f"vtp: {name} left out: {compiler} takes no {' '.join(X86_FLAGS[name])}", file=sys.stderr)
            sources.remove(CPU / name)
            macros.append(macro)
    return sources, macros


def extensions() -> list[Extension]:
    torch, reason = find_torch(), why_pure_python()
    if reason is not None or torch is None:
        if any(argument.startswith(("build_ext", "bdist_wheel", "editable_wheel")) for argument in sys.argv):
            _say_not_built(reason or "no PyTorch, at least 2.10")
        return []
    compiler = find_compiler()
    os.environ.setdefault("CXX", compiler)
    sources, macros = sources_and_macros(os.environ["CXX"])
    return [
        Extension(
            "vtp_kernels._cpu",
            [str(path) for path in sources],
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            depends=[str(path) for path in CPU.glob("*.h")],
            extra_compile_args=[*FLAGS, *macros, TORCH_TARGET],
            extra_link_args=["-Wl,-z,defs"] if sys.platform == "linux" else [],
            py_limited_api=True,
        )
    ]


EXTENSIONS = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildKernels},
    # The operators use no Python at all: one wheel for every Python from 3.10 on.
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
