"""Is it right on a GPU? The tests in tests/gpu, whole models, fine-tuning, and compute-sanitizer.

Everything is compared with float64, and may be at most twice as far from it as PyTorch's own operators are in
the same dtype. The tests run several at a time; sanitizers run the few that are marked for them.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vtp
from bench.gpu.cases import MEASURED, NOT_MEASURED, TOY, Case, Context, Record
from bench.gpu.stopwatch import Captured
from bench.irregular import cut, gated_model
from vtp.comparison.comparison import CEILINGS, FACTOR, TINY, relative_error
from vtp.pruning.compact import CompactViT, plain_operators
from vtp_kernels import ragged_attention
from vtp_kernels.library import TritonSides

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests" / "gpu"
PROCESSES = 8  # that run tests at a time: the CPU computes what is right, and the GPU has room for all
QUICK, THOROUGH = "not thorough", "thorough"  # see tests/support/covering.py
NO_TESTS = 5  # pytest's exit status where nothing was chosen
MOST_FAILURES = 20  # that are named

RATE = 0.4
# timm's names and changes to them; DINOv2 at the size of the others, not at its own 518 pixels.
MODELS = {
    "DeiT-T": ("deit_tiny_patch16_224", {}),
    "DeiT-S": ("deit_small_patch16_224", {}),
    "DeiT-B": ("deit_base_patch16_224", {}),
    "DINOv2-S": ("vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 1000}),
    "DINOv3-S+": ("vit_small_plus_patch16_dinov3", {"img_size": 224, "num_classes": 1000}),
}
STEPS = 20

# What is only in tests and models, beside the variants of each op: attention of so many tokens, in heads with
# equal keys and in heads with keys of their own.
TOKENS = (1, 17, 197, 257, 577)
KEYS = ((64, 64), (64, 40))


def launches() -> dict[str, Callable[[], None]]:
    """What is launched here and is no variant of an op by itself: calls on meta tensors."""

    def attend() -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for tokens, keys in itertools.product(TOKENS, KEYS):
                shape = (2, tokens, 2 * sum(keys) + 109)
                qkv = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
                for needs_gradient in (False, True):
                    with torch.set_grad_enabled(needs_gradient), TritonSides():
                        out = ragged_attention(qkv, keys, (61, 48), 64**-0.5)
                with TritonSides():
                    out.sum().backward()

    return {"ragged_attention": attend}


def cases(toy: bool) -> list[Case]:
    """In order of value: whole models, training, the tests of the ops, and what only a sanitizer sees."""
    found = [Case(f"optimized {name}", functools.partial(check_model, name), 30) for name in MODELS]
    found += [
        Case(f"fine-tuning, {STEPS} steps", check_fine_tuning, 30),
        Case("memcheck", functools.partial(sanitize, "memcheck"), 60),
        Case("tests of the compact ops", functools.partial(test, "test_compact_ops_gpu.py", QUICK), 90),
        Case("tests of gated_linear", functools.partial(test, "test_gated_linear_gpu.py", QUICK), 60),
        Case("torch.compile(fullgraph=True)", check_compiled, 40),
        Case("calibration and refit", check_one_shot, 40),
        Case("tests of compilations", functools.partial(test, "test_compilations_gpu.py", QUICK), 40),
        Case("racecheck", functools.partial(sanitize, "racecheck"), 90),
        Case("tests that the quick lane leaves out", functools.partial(test, "", THOROUGH), 90),
    ]
    return found


# --------------------------------------------------------------------------------
# Whole models


def strict() -> None:
    """PyTorch's operators at their most exact: what they get wrong is the yardstick. By default their
    convolutions round float32 to TF32, and products in 16 bits may be summed in 16 bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def small_model(name: str, context: Context) -> CompactViT:
    """The model with random weights, cut to widths that are unequal in every layer and head."""
    strict()  # for the life of the process, whose cases all want it
    timm_name, changes = MODELS[name]
    if context.toy:
        changes = TOY | ({"img_size": 28} if "patch14" in timm_name else {})
    return cut(gated_model(timm_name, **changes), RATE).to(context.device)


def random_images(model: nn.Module, batch: int, context: Context, seed: int = 0) -> Tensor:
    """[batch, channels, height, width], float32."""
    generator = torch.Generator(context.device).manual_seed(seed)
    patch = model.patch_embed
    shape = batch, patch.proj.in_channels, *patch.img_size
    return torch.randn(shape, generator=generator, device=context.device)


@torch.inference_mode()
def check_model(name: str, context: Context) -> Record:
    """`vtp.optimize` in every dtype, and a captured graph replayed with other images."""
    small = small_model(name, context)
    images, others = (random_images(small, 2, context, seed) for seed in (0, 1))
    with plain_operators():
        exact = copy.deepcopy(small).double()(images.double())
    errors: Record = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with plain_operators():
            torchs = copy.deepcopy(small).to(dtype)(images.to(dtype))
        fast, least = vtp.optimize(small, dtype), TINY[_kind(dtype)]
        error, bound = relative_error(fast(images), exact), allowed(torchs, exact)
        errors[str(dtype).removeprefix("torch.")] = {"error": error, "bound": bound}
        context.note({"errors": errors})
        require(error <= bound, f"{dtype}: relative error {error:.2g}, at most {bound:.2g} allowed")
        static = images.to(dtype)
        graph = Captured(functools.partial(fast, static), context.device)
        for given in (others, images):
            static.copy_(given)
            difference = relative_error(graph(), fast(given))
            require(difference <= least, f"{dtype}: a replay differs from a call by {difference:.2g}")
    return {"errors": errors}


def allowed(torchs: Tensor, exact: Tensor) -> float:
    """The largest relative error, given what PyTorch's operators give in the same dtype."""
    kind = _kind(torchs.dtype)
    return min(CEILINGS[kind], FACTOR * relative_error(torchs, exact) + TINY[kind])


def _kind(dtype: torch.dtype) -> str:
    """Whose bounds hold: float16 has those of bfloat16."""
    return "float32" if dtype == torch.float32 else "bfloat16"


def require(condition: bool, otherwise: str) -> None:
    """Raise AssertionError, which says what is wrong."""
    if not condition:
        raise AssertionError(otherwise)


@torch.inference_mode()
def check_compiled(context: Context) -> Record:
    """The optimized model under torch.compile, whole, at two batch sizes."""
    small = small_model("DeiT-T", context)
    fast = vtp.optimize(small, torch.bfloat16)
    backend = "eager" if context.toy else "inductor"
    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    errors: Record = {}
    for batch in (2, 5):
        images = random_images(small, batch, context)
        with plain_operators():
            exact = copy.deepcopy(small).double()(images.double())
            torchs = copy.deepcopy(small).bfloat16()(images.bfloat16())
        error, bound = relative_error(compiled(images.bfloat16()), exact), allowed(torchs, exact)
        errors[f"batch {batch}"] = {"error": error, "bound": bound}
        require(error <= bound, f"batch {batch}: relative error {error:.2g}, at most {bound:.2g} allowed")
    return {"errors": errors}


def check_fine_tuning(context: Context) -> Record:
    """Steps of a compact DeiT-T in bf16 autocast on the ops; how far losses and weights go from those of
    float32 on PyTorch's operators, and how far PyTorch's operators in bf16 autocast go."""
    small = small_model("DeiT-T", context).train()
    images = random_images(small, 4 if context.toy else 32, context)
    targets = torch.arange(len(images), device=context.device) % small.num_classes

    def train(on_ops: bool, autocast: bool) -> tuple[Tensor, Tensor]:
        model = copy.deepcopy(small)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        losses = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            with (
                contextlib.nullcontext() if on_ops else plain_operators(),
                torch.autocast(context.device.type, torch.bfloat16, enabled=autocast),
            ):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        moved = [p.detach() - q.detach() for p, q in zip(model.parameters(), small.parameters(), strict=True)]
        return torch.stack(losses), torch.cat([change.flatten() for change in moved])

    exact = train(on_ops=False, autocast=False)
    torchs, ours = train(on_ops=False, autocast=True), train(on_ops=True, autocast=True)
    record: Record = {"losses": [float(exact[0][0]), float(exact[0][-1])]}
    for what, right, plain, own in zip(("losses", "weights"), exact, torchs, ours, strict=True):
        error, bound = relative_error(own, right), FACTOR * relative_error(plain, right) + TINY["bfloat16"]
        record[f"error of {what}"] = {"error": error, "bound": bound}
        context.note(record)
        require(error <= bound, f"{what}: relative error {error:.2g}, at most {bound:.2g} allowed")
    return record


@torch.no_grad()
def check_one_shot(context: Context) -> Record:
    """`vtp.calibrate`, and the cut with its refit, of four blocks of a DeiT-T on GPU and CPU: the same
    statistics, and cut models that are as near to the dense one. Seconds of each; the GPU's with all it does
    once."""
    strict()
    name, changes = MODELS["DeiT-T"]
    dense = timm.create_model(name, **(TOY if context.toy else {**changes, "depth": 4})).eval()
    images = random_images(dense, 64, dataclasses.replace(context, device=torch.device("cpu")))
    macs = 0.55 * vtp.count(dense).macs
    statistics: dict[str, vtp.Statistics] = {}
    left: dict[str, float] = {}
    took: Record = {}
    for where, device in (("CPU", torch.device("cpu")), ("GPU", context.device)):
        model = copy.deepcopy(dense).to(device)
        start = time.perf_counter()
        statistics[where] = vtp.calibrate(model, images)
        calibrated = time.perf_counter()
        plan = vtp.make_plan(dense, macs=macs, statistics=statistics["CPU"], scope="optimal")
        small = vtp.compact(model, plan, images=images)
        took[where] = {
            "calibration": calibrated - start,
            "cut and refit": time.perf_counter() - calibrated,
        }
        given = images.to(device)
        left[where] = relative_error(small(given), model(given))
        context.note({"took": took, "relative error": left})
    right = statistics["CPU"].tensors
    found = {
        key: value
        for key, value in statistics["GPU"].tensors.items()
        if not key.endswith((".order", ".changes"))
    }
    worst = max(found, key=lambda key: relative_error(found[key], right[key]))
    error = relative_error(found[worst], right[worst])
    require(error <= 1e-3, f"{worst}: relative error {error:.2g} beside the CPU's, at most 0.001 allowed")
    ratio = left["GPU"] / left["CPU"]
    require(0.95 <= ratio <= 1.05, f"the cut's relative error is {ratio:.3f} times that of the CPU's cut")
    return {"took": took, "relative error": left, "error of statistics": error}


# --------------------------------------------------------------------------------
# Tests


def test(file: str, lane: str, context: Context) -> Record:
    """A file of tests/gpu, several tests at a time; those that failed by name, with what they say."""
    at_a_time = []
    if not context.toy and importlib.util.find_spec("xdist"):
        at_a_time = ["-n", str(PROCESSES)]
    return run_tests(*at_a_time, "-m", lane, tests=TESTS / file, seconds=context.seconds)


def run_tests(
    *options: str,
    tests: Path,
    seconds: float,
    prefix: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Record:
    """Run pytest, whose output goes to the log; counts, and the tests that failed with what they say."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [*prefix, *run, str(tests), *options]
        started = time.perf_counter()
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **(variables or {})}, timeout=seconds
        ).returncode
        spent = time.perf_counter() - started
        try:
            found = list(ElementTree.parse(report).iter("testcase"))
        except (OSError, ElementTree.ParseError):
            return {"status": f"failed: pytest wrote no report, exit status {status}"}
    failed = dict(failures(found))
    skipped = [case for case in found if case.find("skipped") is not None]
    passed = len(found) - len(failed) - len(skipped)
    outcome = MEASURED
    if status == NO_TESTS:
        outcome = f"{NOT_MEASURED}: there are no such tests"
    elif status or failed:
        outcome = f"failed: {len(failed)} of {len(found)} tests, exit status {status}"
    elif not passed:
        outcome = f"{NOT_MEASURED}: all tests were skipped"
    return {
        "status": outcome,
        "passed": passed,
        "failed": dict(list(failed.items())[:MOST_FAILURES]),
        "skipped": len(skipped),
        "skipped_because": sorted({case.find("skipped").get("message", "") for case in skipped}),
        "test_seconds": round(spent, 1),
    }


def failures(found: Sequence[ElementTree.Element]) -> Iterator[tuple[str, str]]:
    """Names of failed tests, and the first line of what each says."""
    for case in found:
        for kind in ("failure", "error"):
            if (reason := case.find(kind)) is not None:
                said = (reason.get("message") or "").strip().splitlines()
                yield f"{case.get('classname')}::{case.get('name')}", said[0][:300] if said else kind


def find_sanitizer() -> str | None:
    """compute-sanitizer, on the path or where the CUDA toolkit puts it."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(toolkit))


def sanitize(tool: str, context: Context, tests: Path = TESTS) -> Record:
    """The tests that are marked for it, under a tool of compute-sanitizer."""
    executable = find_sanitizer()
    if executable is None:
        return {"status": f"{NOT_MEASURED}: compute-sanitizer: not installed"}
    # Each tensor in an allocation of its own: PyTorch's pool would hide what lies between two of them.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        # Calls of the driver's interface that fail are no news: PyTorch tries some to see whether they work.
        options = ["--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
        record = run_tests(
            "-m", "sanitizer",
            tests=tests,
            seconds=context.seconds,
            prefix=[executable, *options, "--log-file", str(log)],
            variables=variables,
        )  # fmt: skip
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    if record["status"] == MEASURED and not any("SUMMARY: 0 " in line for line in lines):
        record["status"] = "failed: compute-sanitizer gave no clean summary"
    return record | {"log": lines[-40:]}
