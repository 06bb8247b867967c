"""One op at a time beside other implementations, at the shapes of DeiT: PyTorch's plain expression, and what
one would write instead.

    pytest bench/ops --benchmark-columns=median,iqr,rounds
    pytest bench/ops/bench_compact_linear.py --model base --batch 1,8,64 --dtype float32,bfloat16
    pytest bench/ops --benchmark-json=ops.json
    pytest bench/ops --toy      # every case once, at toy size

A case is timed only if output and gradients are right: the error against float64 is at most twice that of
PyTorch's plain expression in the same dtype. A wrong one fails and has no figure.

pytest-benchmark runs implementations one after another, so that a machine that grows slower in between makes
one slow: these tables show magnitudes. The programs beside this folder, in which runtimes take turns round by
round, carry the claims.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.shapes import DEVICE, WIDTHS, Case, Implementation
from bench.ops.subject import Subject, mode, results
from vtp.comparison.runtimes import DTYPES
from vtp.machine import hardware
from vtp.options import positive

DEFAULTS: dict[str, Any] = {
    "model": ["tiny", "small", "base"],
    "batch": [1],
    "dtype": ["float32"],
    "threads": os.cpu_count(),
    "seconds": 0.1,
    "rounds": 5,
}
TOY = {
    "model": ["toy"],
    "batch": [2],
    "dtype": list(DTYPES),
    "threads": 1,
    "seconds": 1e-4,
    "rounds": 1,
}


# --------------------------------------------------------------------------------
# Cases


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The `type` of an option that takes several values with commas between."""
    return lambda text: [parse(part) for part in text.split(",")]


def one_of(names: list[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {','.join(names)}")
        return text

    return parse


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench/ops")
    count = positive(int)
    group.addoption("--model", type=listed(one_of(list(WIDTHS))), help="tiny,small,base")
    group.addoption("--batch", type=listed(count), help="images: 1")
    group.addoption("--dtype", type=listed(one_of(list(DTYPES))), help="float32")
    group.addoption("--threads", type=count, help="CPU threads: all cores")
    group.addoption("--seconds", type=positive(float), help="of an implementation in a case, about: 0.1")
    group.addoption("--rounds", type=count, help="of an implementation in a case, at least: 5")
    group.addoption("--toy", action="store_true", help="every case once, at toy size")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config.option, "toy"):  # this folder was met on the way, not asked for
        return
    config.addinivalue_line("python_files", "bench_*.py")
    for name, value in (TOY if config.option.toy else DEFAULTS).items():
        if getattr(config.option, name) is None:
            setattr(config.option, name, value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of a module, `SITES` and `BACKWARD`, with all its `implementations`."""
    module, option = metafunc.module, metafunc.config.option
    axes = option.model, ("dense", "compact"), module.SITES, option.batch, option.dtype, module.BACKWARD
    parameters = []
    for case in itertools.starmap(Case, itertools.product(*axes)):
        mark = pytest.mark.benchmark(
            group=f"{module.__name__.removeprefix('bench_')} {case}",
            max_time=option.seconds,
            min_rounds=option.rounds,
            warmup=True,
            warmup_iterations=option.rounds,
        )
        parameters += [
            pytest.param(case, p, id=f"{case}-{p}", marks=mark) for p in module.implementations(case)
        ]
    metafunc.parametrize("case, implementation", parameters)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for name in ("node", "release", "python_build"):  # whose machine it is, is nobody's business
        machine_info.pop(name, None)
    machine_info.update(torch=torch.__version__, threads=config.option.threads, **hardware(DEVICE))


@pytest.fixture(autouse=True)
def pinned_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.option.threads)
    yield
    torch.set_num_threads(before)


# The implementations of a case come one after another.
subject = functools.lru_cache(maxsize=1)(Subject)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check one implementation in one case, then time it."""

    def measured(
        case: Case,
        implementation: Implementation,
        operands: Callable[[Case], dict[str, Any]],
        reference: Callable[..., Tensor],
    ) -> None:
        right = subject(case, operands, implementation.reference or reference)
        with mode(case):
            call = implementation.prepare(**right.operands)
            run = functools.partial(results, call, right.operands, right.dy)
            got = run()
            errors = right.errors(got | {"output": implementation.kept(got["output"])})
            for name, error in errors.items():
                if not error <= right.bounds[name]:  # nor NaN
                    bound = f"at most {right.bounds[name]:.2g} allowed"
                    pytest.fail(f"wrong {name}: relative error {error:.2g}, {bound}", pytrace=False)
            benchmark.name = request.node.callspec.params["implementation"]
            benchmark.extra_info |= {
                **{name: getattr(case, name) for name in ("model", "widths", "site", "batch", "dtype")},
                "pass": "forward+backward" if case.backward else "forward",
                "shapes": {n: list(t.shape) for n, t in right.operands.items() if isinstance(t, Tensor)},
                "macs": right.macs,
                "errors": errors,
                "error_bounds": right.bounds,
                "device": DEVICE.type,
                "threads": torch.get_num_threads(),
            }
            benchmark(run if DEVICE.type == "cpu" else lambda: (run(), torch.cuda.synchronize()))

    return measured
