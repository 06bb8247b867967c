"""Build backend: setuptools, which also asks for PyTorch where the C++ operators can be built.

The operators need PyTorch's headers, and `pip` builds in an environment of its own. They are taken from

1. the PyTorch of the build environment (`--no-build-isolation`, `python setup.py build_ext --inplace`), or
2. the PyTorch of the environment that `pip` installs into, where there is one: the build downloads none, or
3. PyTorch as a build requirement, which `pip` installs into the build environment for the time of the build.

The operators use the stable ABI of PyTorch 2.10: a binary built with any PyTorch from 2.10 on runs with all
of them, so that it does not matter which of the three it was. Without a compiler, on Windows, or with
VTP_BUILD_CPP=0 in the environment, the package is pure Python. `python tools/build_backend.py` says which it
would be here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST_TORCH = (2, 10)


def find_compiler() -> str | None:
    """A C++ compiler that can be called: $CXX, the one that Python was built with, or a usual name."""
    named = (os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++")
    return next((name for name in named if name and shutil.which(name.split()[0])), None)


def find_torch() -> Path | None:
    """The folder of a PyTorch whose headers will do, without importing it; None if there is none."""
    return next((torch for torch in _torch_folders() if _is_new_enough(torch)), None)


def _torch_folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    # pip hides these folders from a build, not from sysconfig.
    installed = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), site.getusersitepackages())
    yield from (Path(packages) / "torch" for packages in installed)


def _is_new_enough(torch: Path) -> bool:
    version = torch / "version.py"
    if not version.is_file() or not (torch / "include/torch/csrc/stable").is_dir():
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_TORCH


def why_pure_python() -> str | None:
    """Why no C++ operators can be built here, PyTorch aside; None if they can."""
    if os.environ.get("VTP_BUILD_CPP") == "0":
        return "VTP_BUILD_CPP=0"
    if os.name == "nt":
        return "they are not built on Windows"
    if find_compiler() is None:
        return "no C++ compiler (install one, such as g++ or clang++, or name it in CXX)"
    return None


def build_requirements() -> list[str]:
    """What a build needs besides setuptools."""
    if why_pure_python() is not None or find_torch() is not None:
        return []
    return [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]


# --------------------------------------------------------------------------------
# PEP 517 and 660


def __getattr__(name: str) -> object:
    """Every hook that is not below is setuptools'."""
    from setuptools import build_meta

    return getattr(build_meta, name)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """setuptools' own requirements, and PyTorch where it is needed."""
    from setuptools import build_meta

    return build_meta.get_requires_for_build_wheel(config_settings) + build_requirements()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    """The same for `pip install --editable`."""
    from setuptools import build_meta

    return build_meta.get_requires_for_build_editable(config_settings) + build_requirements()


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """setuptools' wheel, without what an earlier build of another version has left in `build`."""
    from setuptools import build_meta

    for left in Path("build").glob("lib*"):
        shutil.rmtree(left)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def _say() -> None:
    reason = why_pure_python()
    if reason is not None:
        print(f"C++ operators: not built, {reason}; vtp works without them, slower on a CPU")
    else:
        torch = find_torch() or "the build environment, for the time of the build"
        print(f"C++ operators: built with {find_compiler()}, headers of PyTorch from {torch}")


if __name__ == "__main__":
    sys.exit(_say())
