"""Build of the package; metadata is in pyproject.toml.

The C++ operators of `csrc/cpu` become `vtp_kernels/_cpu.abi3.so` where there is a compiler and PyTorch:

    pip install .                                    # as part of the package; see tools/build_backend.py
    python setup.py build_ext --inplace              # in a checkout

Without a compiler, or with VTP_BUILD_CPP=0 in the environment, the package is pure Python and says at first
use what is slower for it; with VTP_BUILD_CPP=1 a failure of the compiler is an error.
"""

import os
import platform
import sys
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
}
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


def extensions() -> list[Extension]:
    torch, reason = find_torch(), why_pure_python()
    if reason is not None or torch is None:
        if any(argument.startswith(("build_ext", "bdist_wheel", "editable_wheel")) for argument in sys.argv):
            _say_not_built(reason or "no PyTorch, at least 2.10")
        return []
    compiler = find_compiler()
    os.environ.setdefault("CXX", compiler)
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [path for path in sorted(CPU.glob("*.cpp")) if x86 or path.name not in X86_FLAGS]
    return [
        Extension(
            "vtp_kernels._cpu",
            [str(path) for path in sources],
            include_dirs=[str(torch / "include"), str(torch / "include/torch/csrc/api/include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch_cpu"],
            depends=[str(path) for path in CPU.glob("*.h")],
            extra_compile_args=[*FLAGS, TORCH_TARGET],
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
