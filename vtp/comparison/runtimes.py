"""The runtimes of a comparison: ways to run a model, with what each of them needs."""

import copy
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vtp.runtime.export.onnx import CONVERTER, onnx_bytes, onnx_session
from vtp.runtime.export.openvino import compile_openvino
from vtp.runtime.optimize import optimize, pack_for_ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REPEAT = "ours (repeat)"  # our engine a second time, to show what is noise

Run = Callable[[], Tensor]

# How torch.compile may be asked: what else `prepare_compiled` takes. Each needs minutes for a new model.
COMPILERS: dict[str, dict[str, Any]] = {
    "torch.compile": {"frozen": False},
    "torch.compile, frozen": {},
    "torch.compile, max-autotune": {"mode": "max-autotune"},
}


@dataclass(frozen=True)
class Runtime:
    """A way to run a model.

    prepare: takes what `export` made, or the float32 model, and images; returns a call without arguments
        that gives the outputs.
    export: converts the float32 model for any number of images of a shape, once and before it is deployed.
    packages: what has to be installed for it, beside PyTorch; devices: what it runs on.
    own_arithmetic: computes in a precision or order of its own, so that `CEILINGS` alone bound its error.
    ours: what other runtimes of its dtype are compared with.
    """

    name: str
    dtype: str
    prepare: Callable[[Any, Tensor], Run]
    export: Callable[[nn.Module, tuple[int, ...]], Any] | None = None
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    own_arithmetic: bool = False
    ours: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}"

    def unsupported_reason(self, device: str = "cpu") -> str | None:
        """Why it cannot run here; None where it can."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device}"
        missing = [name for name in self.packages if find_spec(name) is None]
        return f"{' and '.join(missing)} not installed: pip install 'vtp[bench]'" if missing else None


class Unsupported(Exception):
    """What was asked of a library is not what it would run; the message says why."""


def prepare_ours(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """Our engine: what `vtp.optimize` makes of the model."""
    fast = optimize(model, dtype=DTYPES[dtype])
    images = images.to(DTYPES[dtype])
    return lambda: fast(images)


def prepare_reference(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """The packed model on PyTorch's operators: what `vtp.optimize` gives where there is no compiler."""
    fast = pack_for_ops(model, DTYPES[dtype])
    images = images.to(DTYPES[dtype])
    return lambda: fast(images)


def prepare_eager(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """PyTorch's eager mode: operator by operator."""
    model, images = copy.deepcopy(model).to(DTYPES[dtype]), images.to(DTYPES[dtype])
    return lambda: model(images)


def prepare_compiled(
    model: nn.Module,
    images: Tensor,
    *,
    dtype: str,
    frozen: bool = True,
    mode: str | None = None,
    backend: str = "inductor",
) -> Run:
    """torch.compile for this one shape; `frozen` makes weights constants, which it may then pack."""
    from torch._inductor import config

    model, images = copy.deepcopy(model).to(DTYPES[dtype]), images.to(DTYPES[dtype])
    compiled = torch.compile(own_code(model), dynamic=False, mode=mode, backend=backend)
    # It compiles in the first call, and reads its configuration then.
    # With more threads than one it goes on compiling behind the rounds' back once `time_limit` has ended it.
    settings = {"freezing": frozen, "compile_threads": 1, "autotune_num_choices_displayed": 0}
    with torch.inference_mode(), config.patch(**settings):
        compiled(images)
    return lambda: compiled(images)


def own_code(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """`model` as a function whose code object nothing else has.

    Dynamo keeps what it compiled with the code object: models of one class would share an entry, recompile
    for each other and, at some limit, stay eager. `torch._dynamo.reset()` between them would drop those
    that are still to be timed; so it is called between cases.
    """

    def call(images: Tensor) -> Tensor:
        return model(images)

    return types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)


def prepare_onnx_runtime(source: bytes, images: Tensor) -> Run:
    """ONNX Runtime on the CPU with all graph optimizations, in float32."""
    session = onnx_session(source, batch=len(images))
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def prepare_openvino(source: bytes, images: Tensor, *, dtype: str) -> Run:
    """OpenVINO on the CPU, tuned for latency."""
    import openvino

    core = openvino.Core()
    if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unsupported("OpenVINO computes in float32 on this CPU, whatever the hint")
    model = core.read_model(source)
    model.reshape(list(images.shape))
    compiled = compile_openvino(model, dtype=dtype)
    request, inputs = compiled.create_infer_request(), [images.numpy()]
    # What it returns is a view of the request's memory: good until the next call, as a user would have it.
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


def _runtimes() -> list[Runtime]:
    """Ours first, as others are compared with it; then the rest, those with slow compilers last."""
    partial, runtimes = functools.partial, []
    for dtype in DTYPES:
        ours = partial(prepare_ours, dtype=dtype)
        runtimes += [
            Runtime("ours", dtype, ours, ours=True),
            Runtime(REPEAT, dtype, ours),
            Runtime("our reference path", dtype, partial(prepare_reference, dtype=dtype)),
            Runtime("PyTorch eager", dtype, partial(prepare_eager, dtype=dtype)),
        ]
    onnx = {"export": onnx_bytes, "own_arithmetic": True, "devices": ("cpu",)}
    runtimes.append(
        Runtime("ONNX Runtime", "float32", prepare_onnx_runtime, packages=(*CONVERTER, "onnxruntime"), **onnx)
    )
    for dtype in DTYPES:
        run = partial(prepare_openvino, dtype=dtype)
        runtimes.append(Runtime("OpenVINO", dtype, run, packages=(*CONVERTER, "openvino"), **onnx))
    for name, options in COMPILERS.items():
        for dtype in DTYPES:
            runtimes.append(Runtime(name, dtype, partial(prepare_compiled, dtype=dtype, **options)))
    # Never run by the authors, who have had no GPU.
    runtimes.append(
        Runtime(
            "TensorRT",
            "bfloat16",
            partial(prepare_compiled, dtype="bfloat16", frozen=False, backend="torch_tensorrt"),
            packages=("torch_tensorrt",),
            devices=("cuda",),
            own_arithmetic=True,
        )
    )
    return runtimes


RUNTIMES = _runtimes()
