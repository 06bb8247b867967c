"""What bench/cpu_engine.py compares: ways to run a compact model on a CPU, with what each of them needs."""

import copy
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from measure import randomize_vectors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vtp
from vtp import cpu_engine
from vtp.cpu_engine import CpuBlocks
from vtp.engine import pack_for_ops
from vtp_kernels._library import why_no_cpp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A way to run a model.

    prepare: takes a float32 model and images, returns a call without arguments that gives the logits.
    packages: what has to be installed for it, beside PyTorch.
    own_arithmetic: computes in a precision or order of its own, so that `CEILINGS` alone bound its error.
    ours: what other peers of its dtype are compared with.
    """

    name: str
    dtype: str
    prepare: Callable[[nn.Module, Tensor], Run]
    packages: tuple[str, ...] = ()
    own_arithmetic: bool = False
    ours: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype}"

    def why_not(self) -> str | None:
        """Why it cannot run here; None where it can."""
        missing = [name for name in self.packages if find_spec(name) is None]
        return f"{' and '.join(missing)} not installed: pip install 'vtp[bench]'" if missing else None


class Unsupported(Exception):
    """What was asked of a library is not what it would run; the message says why."""


def prepare_ours(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """`vtp.optimize`."""
    fast = vtp.optimize(model, dtype=DTYPES[dtype])
    images = images.to(DTYPES[dtype])
    return lambda: fast(images)


def prepare_eager(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """PyTorch, operator by operator."""
    model, images = copy.deepcopy(model).to(DTYPES[dtype]), images.to(DTYPES[dtype])
    return lambda: model(images)


def prepare_compiled(
    model: nn.Module, images: Tensor, *, dtype: str, frozen: bool = True, mode: str | None = None
) -> Run:
    """torch.compile for this one shape; `frozen` makes weights constants, which it may then pack."""
    from torch._inductor import config

    model, images = copy.deepcopy(model).to(DTYPES[dtype]), images.to(DTYPES[dtype])
    compiled = torch.compile(own_code(model), dynamic=False, mode=mode)
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


@functools.lru_cache(maxsize=1)  # the libraries that take it come one after the other
def onnx_bytes(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """The model for images of `shape` as ONNX."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (torch.zeros(shape),), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def prepare_onnx_runtime(model: nn.Module, images: Tensor) -> Run:
    """ONNX Runtime on the CPU with all graph optimizations, in float32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    source = onnx_bytes(model, tuple(images.shape))
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def prepare_openvino(model: nn.Module, images: Tensor, *, dtype: str) -> Run:
    """OpenVINO on the CPU, tuned for latency."""
    import openvino

    hint = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    core = openvino.Core()
    if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unsupported("OpenVINO computes in float32 on this CPU, whatever the hint")
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
    }
    compiled = core.compile_model(core.read_model(onnx_bytes(model, tuple(images.shape))), "CPU", config)
    request, inputs = compiled.create_infer_request(), [images.numpy()]
    # What it returns is a view of the request's memory: good until the next call, as a user would have it.
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])


def _peers() -> list[Peer]:
    """Ours first, as others are compared with it; then the rest, those with slow compilers last."""
    partial, peers = functools.partial, []
    for dtype in DTYPES:
        ours = partial(prepare_ours, dtype=dtype)
        peers += [
            Peer("ours", dtype, ours, ours=True),
            Peer("ours again", dtype, ours),
            Peer("PyTorch eager", dtype, partial(prepare_eager, dtype=dtype)),
        ]
    packages = ("onnx", "onnxscript")
    peers.append(
        Peer("ONNX Runtime", "float32", prepare_onnx_runtime, (*packages, "onnxruntime"), own_arithmetic=True)
    )
    for dtype in DTYPES:
        run = partial(prepare_openvino, dtype=dtype)
        peers.append(Peer("OpenVINO", dtype, run, (*packages, "openvino"), own_arithmetic=True))
    compilers: dict[str, dict[str, Any]] = {
        "torch.compile": {"frozen": False},
        "torch.compile, frozen": {},
        "torch.compile, max-autotune": {"mode": "max-autotune"},
    }
    for name, options in compilers.items():
        for dtype in DTYPES:
            peers.append(Peer(name, dtype, partial(prepare_compiled, dtype=dtype, **options)))
    return peers


PEERS = _peers()


def prepare_packed(linear: nn.Module, x: Tensor, *, dtype: str) -> Run:
    """One linear on oneDNN, its weight laid out once: a private API of PyTorch."""
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_reorder_linear_weight")):
        raise Unsupported("this PyTorch has no oneDNN")
    if dtype == "bfloat16" and not ops._is_mkldnn_bf16_supported():
        raise Unsupported("oneDNN takes no packed bfloat16 on this CPU")
    x = x.to(DTYPES[dtype])
    weight = ops._reorder_linear_weight(linear.weight.detach().to(DTYPES[dtype]), len(x))
    return lambda: ops._linear_pointwise(x, weight, None, "none", [], "")


class FeedForward(nn.Module):
    """The blocks of a compact model without attention: tokens [B, N, embed_dim] to the same shape."""

    def __init__(self, embed_dim: int, inputs: int, hidden: int, depth: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        dense = VisionTransformer(
            img_size=32,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=1,
            mlp_ratio=hidden / embed_dim,
            num_classes=0,
        )
        randomize_vectors(dense)
        gated = vtp.insert_gates(dense)
        plan = vtp.make_plan(gated, rate=0.0)
        kept = {name: () if "attn" in name else widths for name, widths in plan.kept.items()}
        kept |= {name: widths[:inputs] for name, widths in kept.items() if name.endswith("fc1")}
        self.vit = vtp.compact(gated, dataclasses.replace(plan, kept=kept))
        self.macs_per_token = depth * hidden * (inputs + embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.vit.blocks(tokens)


def prepare_feed_forward(model: nn.Module, tokens: Tensor, *, dtype: str) -> Run:
    """The blocks on the C++ engine."""
    packed = pack_for_ops(model.vit, DTYPES[dtype]).vit
    if (reason := cpu_engine.why_not(packed.blocks, DTYPES[dtype])) is not None:
        raise Unsupported(reason)
    blocks, tokens = CpuBlocks(packed, DTYPES[dtype]), tokens.to(DTYPES[dtype])
    return lambda: blocks(tokens)


def prepare_our_linear(linear: nn.Module, x: Tensor, *, dtype: str) -> Run:
    """One linear by the engine's micro-kernels, its weight packed once."""
    if (reason := why_no_cpp()) is not None:
        raise Unsupported(reason)
    outputs = len(linear.weight)
    weight = cpu_engine.panels(linear.weight.detach(), DTYPES[dtype]).view(-1).view(torch.uint8)
    bias = torch.zeros(-(-outputs // 16) * 16)
    if torch.ops.vtp.cpu_isa() == "avx512_bf16":  # whose activations are in the dtype of the weights
        x = x.to(DTYPES[dtype])
    return lambda: torch.ops.vtp.cpu_linear(x, weight, bias, outputs, dtype == "bfloat16")[:, :outputs]


def gemm_peers(peers: Iterable[Peer]) -> list[Peer]:
    """Those of `peers` that know no more of a linear than its product, and the packed one."""
    found = []
    for dtype in DTYPES:
        packed, ours = (functools.partial(f, dtype=dtype) for f in (prepare_packed, prepare_our_linear))
        found += [Peer("ours", dtype, ours, ours=True), Peer("oneDNN, packed", dtype, packed)]
    return found + [p for p in peers if not p.name.startswith(("ours", "torch.compile"))]
