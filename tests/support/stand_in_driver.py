"""A GPU for Triton where there is none: launches go as far as the launch itself, which does nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vtp_kernels.launching import TARGETS, Config


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        assert binary, f"{name}: no machine code"
        # No module, as it would be unloaded; function, registers, spills and most threads.
        return None, 0, 32, 0, 1024


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver:
    """What Triton asks of a driver between a call of a kernel and its launch."""

    utils = _Utils()
    launcher_cls = _Launcher

    def __init__(self, target: str) -> None:
        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def gpu(target: str) -> Iterator[None]:
    """Within it Triton believes in a GPU of this architecture."""
    before = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = before


def launch(kernel: Any, grid: tuple, arguments: dict, config: Config, **constants: Any) -> None:
    """A launch of `launching.launch`, also while it is recorded."""
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)
    kernel[grid](**arguments, **constants, **config.blocks, **options)
