"""Does training with gates cost what training without them costs? Whole training steps, side by side.

A DeiT-S of a few blocks is trained on one batch by variants that start with equal weights: without gates,
with `vtp.insert_gates` and all that sparse training does in a step (gates' parameter group, Taylor
statistics, l1 subgradient), with the gate on the activation as one would write it by hand, and without
gates once more, which shows what ratio is noise on this machine. A step is zero_grad, forward, cross-entropy,
backward and AdamW's update.

A variant is timed only if loss and all gradients of its first step are right. Variants take turns round by
round; ratios are of times in the same round. Peak memory is counted from every allocation of a step. Prints a
table and writes it with all times as JSON; takes a quarter of an hour on two cores without bf16 instructions.

    python -m bench.gating_cost
    python -m bench.gating_cost --markdown      # the table of docs/training-cost.md, from a run's file
"""

import argparse
import copy
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Kineto reports on stderr each profile that begins, and a GPU that is not there; it reads this when loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import timm
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vtp
from bench.results_file import add_results_file, check_results_file, print_results
from vtp.comparison.comparison import relative_error
from vtp.comparison.runtimes import DTYPES
from vtp.files import FileError, write_atomic
from vtp.machine import commit, environment, hardware, in_one_line
from vtp.model.architecture import replace_sites
from vtp.model.widths import SITES
from vtp.options import positive, thread_count
from vtp.timing import LEAST_ROUNDS, pairwise_ratio, standard_error, synchronize, take_turns, timed
from vtp.training.config import TrainConfig
from vtp.training.sparsity import gate_param_groups, gated_linears, settle_gates
from vtp_kernels.launching import forced_path

RESULTS = Path(__file__).parent / "results" / "gating_cost.json"
# Largest relative error (norm of the difference over norm) of the loss and of each gradient. In bfloat16 the
# plain model itself is 0.008 away from its float32 gradients in one block, and more in twelve.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
SETTLED = 0.1  # a warm-up step this close to the one before it is the last
REFERENCE = "ungated"
REPEAT = "ungated (repeat)"

# The learning rate is so small that all variants stay at the weights that were checked.
CONFIG = TrainConfig(lr=1e-5, l1=1e-4, label_smoothing=0.0)

# --------------------------------------------------------------------------------
# Variants


@dataclass(frozen=True)
class Variant:
    """A model with what its training adds to a step.

    penalty: a 0-dim tensor that is added to the loss; after_backward: runs between backward and update;
    paths: those of `gated_linear` that its steps are forced to.
    """

    model: nn.Module
    gates: list[nn.Parameter] = field(default_factory=list)
    penalty: Callable[[], Tensor] | None = None
    after_backward: Callable[[], None] | None = None
    paths: tuple[str, ...] = ()


class NaiveGatedLinear(nn.Module):
    """`F.linear(x * gate, weight, bias)` [..., in_features] to [..., out_features]: the gate on the
    activation, as one would write it by hand."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.gate = nn.Parameter(torch.ones(linear.in_features, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.gate, self.weight, self.bias)


def ungated(dense: nn.Module) -> Variant:
    """The plain model, without gates."""
    return Variant(copy.deepcopy(dense))


def gated(dense: nn.Module) -> Variant:
    """The project's gates, with the very function of its training loop between backward and update."""
    return trained(vtp.insert_gates(dense))


def trained(model: nn.Module) -> Variant:
    """A model with gates, and what sparse training does to them in a step."""
    layers = gated_linears(model)
    # Taylor statistics in every step; a real run takes them in the last third.
    return Variant(
        model, [layer.gate for layer in layers], after_backward=partial(settle_gates, layers, CONFIG, True)
    )


def naive(dense: nn.Module) -> Variant:
    """Gates on the activations and the l1 penalty as a term of the loss."""
    model = copy.deepcopy(dense)
    replace_sites(model, lambda _, linear: NaiveGatedLinear(linear))
    gates = [module.gate for module in model.modules() if isinstance(module, NaiveGatedLinear)]
    return Variant(model, gates, penalty=lambda: CONFIG.l1 * sum(gate.abs().sum() for gate in gates))


Variants = Mapping[str, Callable[[nn.Module], Variant]]
VARIANTS: Variants = {REFERENCE: ungated, "gated": gated, "naive": naive, REPEAT: ungated}


class Trainee:
    """A variant in training on one batch: images [B, C, H, W], targets [B].

    `seconds` has the time of every step so far.
    """

    def __init__(self, variant: Variant, images: Tensor, targets: Tensor, dtype: str) -> None:
        self.variant, self.model = variant, variant.model.train()
        self.images, self.targets = images, targets
        self.seconds: list[float] = []
        self.autocast = partial(
            torch.autocast, images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        groups = gate_param_groups(self.model, variant.gates, CONFIG)
        self.optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, fused=True)  # as vtp.training.loop has it

    def step(self) -> Tensor:
        """One training step, whose gradients stay until the next. Returns the task loss, 0-dim."""
        losses: list[Tensor] = []
        with forced_path("gated_linear", *self.variant.paths):
            self.seconds.append(timed(lambda: losses.append(self._update()), self.images.device))
        return losses[0]

    def _update(self) -> Tensor:
        self.optimizer.zero_grad()
        with self.autocast():
            logits = self.model(self.images)
        loss = F.cross_entropy(logits.float(), self.targets)
        (loss if self.variant.penalty is None else loss + self.variant.penalty()).backward()
        if self.variant.after_backward is not None:
            self.variant.after_backward()
        self.optimizer.step()
        return loss.detach()


# --------------------------------------------------------------------------------
# Correctness: nothing is timed that does not compute the same


def observed(trainee: Trainee) -> dict[str, Tensor | None]:
    """Gradients of the last step by parameter name, and the root of each Taylor score of one step."""
    seen = {name: parameter.grad for name, parameter in trainee.model.named_parameters()}
    for name, buffer in trainee.model.named_buffers():
        if name.endswith(".taylor"):
            seen[name] = buffer.sqrt()
    return seen


def expected(dense: nn.Module, reference: Trainee) -> dict[str, Tensor]:
    """What `observed` has to be for every variant, from the first step of the plain model.

    At g = 1 the task gradient of a gate is `sum_n dW[n, k] W[n, k]`, so that it is known without any gate;
    the penalty adds l1 to it, and the root of its Taylor score is its magnitude.
    """
    right = dict(observed(reference))
    for i in range(len(dense.blocks)):
        for site in SITES:
            name = f"blocks.{i}.{site}"
            weight = dense.get_parameter(f"{name}.weight").detach()
            task = (weight * right[f"{name}.weight"]).sum(dim=0)
            right[f"{name}.gate"], right[f"{name}.taylor"] = task + CONFIG.l1, task.abs()
    return right


def worst_error(
    trainee: Trainee, loss: Tensor, right: Mapping[str, Tensor], right_loss: Tensor
) -> tuple[float, str]:
    """Largest relative error of the loss and all that `observed` returns, and the name of where it is."""
    errors = {"loss": relative_error(loss, right_loss)}
    for name, value in observed(trainee).items():
        errors[name] = relative_error(value, right[name]) if name in right else math.inf
    optional = (".taylor",) if trainee.variant.gates else (".taylor", ".gate")
    errors |= {name: math.inf for name in right.keys() - errors.keys() if not name.endswith(optional)}
    # A NaN compares with nothing, so it is made to lose first.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[worst], worst


# --------------------------------------------------------------------------------
# Memory


def peak_rise(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the memory of `device` rises above its level at the start, at most, during `step`.

    Exact for what PyTorch's allocator hands out; the libraries' own buffers (oneDNN, MKL) are not seen. On a
    CPU the profiler does not know of memory from before, so `step` must not free any.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what a collection in the midst of the step would free has no event of its allocation
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    # prof.events() sums up what one operator allocates and frees: its peaks are lost. These are the events.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def persistent_bytes(trainee: Trainee) -> int:
    """Bytes of parameters, their gradients, buffers, optimizer state and batch; shared memory counts once."""
    tensors = [trainee.images, trainee.targets, *trainee.model.buffers()]
    for parameter in trainee.model.parameters():
        tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
    for state in trainee.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def peak_memory(trainee: Trainee) -> tuple[int, int]:
    """Bytes at the start of a step that is not the trainee's first, and at its peak.

    The gradients of the step before go first: a step begins by freeing them.
    """
    trainee.optimizer.zero_grad()
    persistent = persistent_bytes(trainee)
    return persistent, persistent + peak_rise(trainee.step, trainee.images.device)


# --------------------------------------------------------------------------------
# Time


def warm_up(trainees: Mapping[str, Trainee], seconds: float) -> None:
    """Step until no trainee's last step differs by more than `SETTLED` from the one before it.

    Each has done two steps at least. It gives up after `seconds`, as a busy machine never settles.
    """

    def settled(trainee: Trainee) -> bool:
        before, last = trainee.seconds[-2:]
        return abs(last - before) <= SETTLED * before

    started = time.perf_counter()
    while not all(map(settled, trainees.values())) and time.perf_counter() - started < seconds:
        for trainee in trainees.values():
            trainee.step()


# --------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Case:
    """dtype: "float32", or "bfloat16" for autocast; batch: images in a step; depth: blocks of the model."""

    dtype: str
    batch: int
    depth: int


def deit_small(depth: int) -> nn.Module:
    """DeiT-S with `depth` blocks: 224 px, 1,000 classes, random weights, no dropout."""
    return timm.create_model("deit_small_patch16_224", depth=depth)


def default_depth(dtype: str, device: torch.device) -> int:
    """Blocks of a case: all on a GPU; on a CPU as many as take minutes."""
    if device.type == "cuda":
        return 12
    # Without bf16 instructions a bf16 GEMM is 10 times slower than a float32 GEMM.
    return 1 if dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else 2


def measure(
    case: Case,
    build: Callable[[int], nn.Module] = deit_small,
    *,
    device: torch.device,
    rounds: int,
    seconds: float,
    precision: float = 0.0,
    variants: Variants = VARIANTS,
) -> dict[str, Any]:
    """Check, then measure the variants of one case; the record that the results file has of it.

    Args:
        build: makes the plain model of so many blocks.
        seconds: budget of the rounds; see `take_turns`.
        precision: rounds end early where the standard error of the ratio that shows noise is smaller.
        variants: the reference, under that name, and others; see `VARIANTS`.
    """
    torch.manual_seed(0)
    dense = build(case.depth).to(device)
    images = torch.randn(case.batch, dense.patch_embed.proj.in_channels, *dense.patch_embed.img_size)
    images, targets = images.to(device), torch.randint(dense.num_classes, (case.batch,)).to(device)
    trainees = {n: Trainee(make(dense), images, targets, case.dtype) for n, make in variants.items()}
    records, trainees = check(trainees, dense, TOLERANCES[case.dtype])
    for name, trainee in trainees.items():
        persistent, peak = peak_memory(trainee)
        records[name] |= {"persistent_bytes": persistent, "peak_bytes": peak}
    warm_up(trainees, seconds / 4)

    def precise(rounds: int) -> bool:
        repeats = [trainees[name].seconds[-rounds:] for name in (REPEAT, REFERENCE) if name in trainees]
        return len(repeats) == 2 and standard_error(*repeats) < precision

    started = time.perf_counter()
    done = take_turns(trainees, rounds, seconds, precise)
    rounds_seconds = time.perf_counter() - started
    reference = trainees[REFERENCE].seconds[-done:]
    for name, trainee in trainees.items():
        own = trainee.seconds[-done:]
        records[name] |= {
            "peak_ratio": records[name]["peak_bytes"] / records[REFERENCE]["peak_bytes"],
            "median_seconds": statistics.median(own),
            "ratio": pairwise_ratio(own, reference),
            "seconds": own,
            "warm_up_seconds": trainee.seconds[:-done],
        }
    return {**asdict(case), "rounds": done, "rounds_seconds": rounds_seconds, "variants": records}


def check(
    trainees: Mapping[str, Trainee], dense: nn.Module, tolerance: float
) -> tuple[dict[str, dict[str, Any]], dict[str, Trainee]]:
    """Take the first step of each. Returns a record for each, and the trainees whose step was right."""
    right_loss = trainees[REFERENCE].step()
    right = expected(dense, trainees[REFERENCE])
    records: dict[str, dict[str, Any]] = {REFERENCE: {"failed": None}}
    passed = {REFERENCE: trainees[REFERENCE]}
    for name, trainee in trainees.items():
        if name == REFERENCE:
            continue
        error, where = worst_error(trainee, trainee.step(), right, right_loss)
        records[name] = {"failed": None, "error": error if math.isfinite(error) else None, "error_at": where}
        if error <= tolerance:
            passed[name] = trainee
        else:
            records[name]["failed"] = f"{where}: relative error {error:.2g}, at most {tolerance:g} allowed"
    return records, passed


# --------------------------------------------------------------------------------
# Tables and the results file


def _ratio(record: Mapping[str, Any]) -> str:
    if record["failed"]:
        return "failed"
    ratio = record["ratio"]
    return f"{ratio['median']:.3f}x ({ratio['q1']:.3f}-{ratio['q3']:.3f})"


def _peak_ratio(record: Mapping[str, Any]) -> str:
    return "failed" if record["failed"] else f"{record['peak_ratio']:.3f}x"


def table(case: Mapping[str, Any]) -> Table:
    """A row for each variant of one case."""
    title = f"{case['dtype']}, batch {case['batch']}, depth {case['depth']}: {case['rounds']} rounds"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    shown.add_column("variant", no_wrap=True)
    for heading in ("median s", "time / ungated", "peak MiB", "/ ungated", "error"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, record in case["variants"].items():
        cells = ["-", "failed", "-", "-"]
        if not record["failed"]:
            seconds, peak = f"{record['median_seconds']:.4g}", f"{record['peak_bytes'] / 2**20:.1f}"
            cells = [seconds, _ratio(record), peak, _peak_ratio(record)]
        error = record.get("error")
        shown.add_row(name, *cells, "" if error is None else f"{error:.0e}")
    return shown


def markdown(results: Mapping[str, Any]) -> str:
    """The table of docs/training-cost.md: one row for each case, and a line on what it was measured on."""
    lines = [
        "| precision | batch | blocks | rounds | step without gates | gated | by hand | noise "
        "| peak memory without gates | gated | by hand |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        records = case["variants"]
        plain = records[REFERENCE]
        lines.append(
            f"| {case['dtype']} | {case['batch']} | {case['depth']} | {case['rounds']} "
            f"| {plain['median_seconds']:.3g} s "
            f"| {_ratio(records['gated'])} | {_ratio(records['naive'])} | {_ratio(records[REPEAT])} "
            f"| {plain['peak_bytes'] / 2**20:.0f} MiB "
            f"| {_peak_ratio(records['gated'])} | {_peak_ratio(records['naive'])} |"
        )
    return "\n".join([*lines, "", f"Measured on {in_one_line(results)}."])


def failures(results: Mapping[str, Any]) -> list[str]:
    """One line for each variant that was not measured as it computes something else."""
    return [
        f"{case['dtype']}, batch {case['batch']}: {name} failed: {record['failed']}"
        for case in results["cases"]
        for name, record in case["variants"].items()
        if record["failed"]
    ]


# --------------------------------------------------------------------------------
# Command line


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line and check its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, number = positive(int), positive(float)
    parser.add_argument("--batch", type=count, nargs="+", default=[16, 64], help="images per step: 16 64")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="both")
    parser.add_argument("--depth", type=count, help="blocks; by default what fits the device and the dtype")
    parser.add_argument("--rounds", type=count, default=15, help="steps of each variant that are timed: 15")
    parser.add_argument(
        "--seconds",
        type=number,
        default=240.0,
        help=f"budget of a case's rounds, which makes them fewer, but not under {LEAST_ROUNDS}: 240",
    )
    parser.add_argument("--threads", type=thread_count, default=os.cpu_count(), help="CPU threads: all cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPU if any")
    add_results_file(parser, RESULTS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got 'cuda', but PyTorch sees no GPU")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    check_results_file(parser, options)
    return options


def main(
    argv: Sequence[str] | None = None,
    build: Callable[[int], nn.Module] = deit_small,
    variants: Variants = VARIANTS,
) -> int:
    """Run the command line; for `build` and `variants` see `measure`. Returns the exit status: 1 where a
    variant failed its check, 2 where there is no file to read or write."""
    options, console = parse_arguments(argv), Console()
    if options.markdown:
        return print_results(options.out, markdown)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results: dict[str, Any] = {
        "environment": environment(),
        "hardware": hardware(device),
        **commit(),
        "arguments": {**vars(options), "out": options.out.name},
        "tolerances": TOLERANCES,
        "cases": [],
    }
    print(f"Seconds and MiB of one training step on this machine: {in_one_line(results)}")
    print("time / ungated: median (quartiles) of ratios within a round; error: of the first step")
    for dtype in dict.fromkeys(options.dtype):
        for batch in dict.fromkeys(options.batch):
            case = Case(dtype, batch, options.depth or default_depth(dtype, device))
            budget = {"rounds": options.rounds, "seconds": options.seconds}
            results["cases"].append(measure(case, build, device=device, variants=variants, **budget))
            console.print(table(results["cases"][-1]))
    try:
        write_atomic(options.out, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    except FileError as error:
        print(error, file=sys.stderr)
        return 2
    for line in failures(results):
        print(line, file=sys.stderr)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
