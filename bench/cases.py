"""What bench/compare.py measures: each case builds its models, and lets runtimes take turns with them."""

import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vtp
from bench import gating_cost
from bench.irregular import cut, gated_model, padded, same_macs_dense, torch_pruning, zeros_in_place
from bench.products import FeedForward
from vtp.comparison.comparison import Budget, Record, Subject, compare_runtimes, slowed
from vtp.comparison.own_model import prepare_blocks
from vtp.comparison.runtimes import COMPILERS, DTYPES, REPEAT, Run, Runtime, prepare_eager
from vtp.pruning.compact import new_compact

RATE = 0.4  # share of dimensions that is removed where a case has one rate
RATES = (0.0, 0.2, 0.4, 0.6)
TOKENS = 197  # of an image: the rows of a product at batch 1
IMAGES = 8  # that differ; a larger batch repeats them
# M, K, N of linear layers of compact models, batches 1 and 8: tiny's fc1, small's qkv, base's fc1 and fc2.
SHAPES = [(M, *widths) for M in (197, 1576) for widths in ((115, 461), (231, 1003), (461, 1843), (1843, 768))]

# Not a runtime that runs: what stands in the table where the library is not installed.
TORCH_PRUNING = Runtime("Torch-Pruning, same MACs", "float32", prepare_eager, packages=("torch_pruning",))

SLOWED = "ours, slowed by 10%"
WRONG = "ours, one logit wrong"

# What is compared in where a case has one dtype, by device: what one would deploy in.
MAIN_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}

Entries = dict[str, tuple[Runtime, Subject]]


@dataclass(frozen=True, eq=False)
class Model:
    """timm's name and changes to it; batch sizes at which all runtimes meet, and those of the sweep; device.

    What it makes is made once: cases share models, and so what was exported of them.
    """

    name: str
    batches: tuple[int, ...] = (1,)
    sweep_batches: tuple[int, ...] = (1, 8, 64)
    changes: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return MAIN_DTYPE[self.device]

    @functools.cache  # noqa: B019, there are a few for the life of the process
    def gated(self, uniform: bool = False) -> nn.Module:
        return gated_model(self.name, uniform=uniform, **self.changes)

    @functools.cache  # noqa: B019
    def cut(self, rate: float, uniform: bool = False) -> vtp.CompactViT:
        return cut(self.gated(uniform), rate)

    @functools.cache  # noqa: B019
    def dense(self) -> nn.Module:
        """timm's own model with the weights that the cuts are made of."""
        return zeros_in_place(self.gated(), vtp.make_plan(self.gated(), rate=0.0))

    def shallow(self, depth: int) -> "Model":
        """The same with fewer blocks."""
        return dataclasses.replace(self, changes={**self.changes, "depth": depth})

    def subject(self, module: nn.Module, batch: int, exact: Tensor | None = None) -> Subject:
        """The module, which is moved to the device, with random images."""
        generator = torch.Generator().manual_seed(0)
        patch, images = module.patch_embed, min(batch, IMAGES)
        shape = (images, patch.proj.in_channels, *patch.img_size)
        return Subject(
            module.to(self.device),
            torch.randn(shape, generator=generator).to(self.device),
            repeats=-(-batch // images),
            exact=exact,
            macs=vtp.count(module).macs,
        )


MODELS = {
    "tiny": Model("deit_tiny_patch16_224"),
    "small": Model("deit_small_patch16_224"),
    "base": Model("deit_base_patch16_224", batches=(1, 8)),
}
TOYS = {
    "toy": Model(
        "deit_tiny_patch16_224",
        (1,),
        (1, 2),
        {"img_size": 32, "depth": 1, "num_classes": 16, "embed_dim": 96},
    )
}


def of(runtimes: Iterable[Runtime], dtypes: Container[str], *names: str) -> list[Runtime]:
    """The runtimes of a list that have these names and dtypes."""
    return [runtime for runtime in runtimes if runtime.name in names and runtime.dtype in dtypes]


def once_again(runtimes: Iterable[Runtime], model: Model) -> list[Runtime]:
    """All, but our engine a second time in one dtype only: what it shows is the machine's noise."""
    return [runtime for runtime in runtimes if runtime.name != REPEAT or runtime.dtype == model.dtype]


# --------------------------------------------------------------------------------
# Whole models


def measure_models(
    model: Model, batch: int, runtimes: Sequence[Runtime], compilers: bool, budget: Budget, results: Record
) -> Record:
    """One compact model by all runtimes.

    Args:
        compilers: whether torch.compile takes part.
    """
    subject = model.subject(model.cut(RATE), batch)
    runtimes = [p for p in once_again(runtimes, model) if compilers or p.name not in COMPILERS]
    skip = too_slow(results, batch * subject.macs)
    return {"macs": subject.macs, **compare_runtimes({p.label: (p, subject) for p in runtimes}, budget, skip)}


def measure_compilers(model: Model, runtimes: Sequence[Runtime], budget: Budget, _: Record) -> Record:
    """A compact model of a few blocks by torch.compile, beside PyTorch's eager mode and ours."""
    runtimes = of(once_again(runtimes, model), DTYPES, "ours", REPEAT, "PyTorch eager", *COMPILERS)
    # The dtype that every CPU computes in first, as preparing may use all of the time up.
    runtimes.sort(key=lambda runtime: (not runtime.ours, list(DTYPES).index(runtime.dtype)))
    subject = model.subject(model.cut(RATE), 1)
    return {"macs": subject.macs, **compare_runtimes({p.label: (p, subject) for p in runtimes}, budget)}


def measure_place(model: Model, runtimes: Sequence[Runtime], budget: Budget, _: Record) -> Record:
    """Ours on one compact model, and what a user might run in its place."""
    plan = vtp.make_plan(model.gated(), rate=RATE, min_keep=0)
    subject = model.subject(model.cut(RATE), 1)
    entries = {p.label: (p, subject) for p in of(runtimes, (model.dtype,), "ours", REPEAT)}
    entries |= in_its_place(model, plan, subject, runtimes)
    return {"macs": subject.macs, **compare_runtimes(entries, budget)}


def in_its_place(
    model: Model, plan: vtp.PruningPlan, compact: Subject, runtimes: Sequence[Runtime]
) -> Entries:
    """Other models that a user might run instead of `compact`, each on our engine if it can be, in PyTorch's
    eager mode and on OpenVINO: labels are "model: runtime"."""
    others = of(runtimes, (model.dtype,), "PyTorch eager", "OpenVINO")
    ours = of(runtimes, (model.dtype,), "ours")
    gated, batch = model.gated(), len(compact.images)
    dense = model.dense()
    same_macs = same_macs_dense(plan.architecture, compact.macs)
    packed = {"dense": model.cut(0.0), "dense of the same MACs": cut(vtp.insert_gates(same_macs), 0.0)}
    alone = {"dense": dense, "dense of the same MACs": same_macs}
    if TORCH_PRUNING.unsupported_reason() is None:
        alone[TORCH_PRUNING.name] = torch_pruning(dense, compact.macs)
    equal = {  # to the compact model in what they put out
        "padded to 16": padded(gated, plan),
        "padded for SDPA": padded(gated, plan, whole_heads=True),
        "zeros in place": zeros_in_place(gated, plan),
    }
    subjects = {name: model.subject(module, batch, compact.exact) for name, module in equal.items()}
    subjects |= {name: model.subject(module, batch) for name, module in alone.items()}
    runs = dict.fromkeys(subjects, others)
    for name in equal:  # elsewhere zeros are no better than what is beside them
        runs[name] = of(others, DTYPES, "PyTorch eager")
    entries = {
        f"{name}: {runtime.label}": (runtime, subjects[name])
        for name, runtimes in runs.items()
        for runtime in runtimes
    }
    on_ours = {name: model.subject(module, batch) for name, module in packed.items()}
    on_ours["padded to 16"] = subjects["padded to 16"]
    for name, subject in on_ours.items():
        for runtime in ours:  # "ours" that others are compared with is the compact model on our engine
            entries[f"{name}: {runtime.label}"] = dataclasses.replace(runtime, ours=False), subject
    if TORCH_PRUNING.unsupported_reason() is not None and others:
        entries[f"{TORCH_PRUNING.name}: {others[0].label}"] = TORCH_PRUNING, compact
    return entries


def measure_sweep(
    model: Model, batch: int, runtimes: Sequence[Runtime], rates: Sequence[float], budget: Budget, _: Record
) -> Record:
    """The model cut at several rates, heads unequal and uniform, on our engine and some others.

    The larger the work, the fewer take part: all cuts in both dtypes up to 2e10 multiply-adds in a call of
    the dense model; unequal heads, and bfloat16 for one cut, up to 1e11; then our engine in float32 alone;
    above 2e11 only one cut. On a GPU no work counts as large. The dense model of others is timm's.
    """
    work = 0 if model.device != "cpu" else batch * vtp.count(model.cut(0.0)).macs
    cuts = {_cut_name(rate, "unequal"): (rate, False) for rate in rates}
    if work <= 2e10:
        cuts |= {_cut_name(rate, "uniform"): (rate, True) for rate in rates if rate}
    main = ("dense", _cut_name(RATE, "unequal"))
    if work > 2e11:
        cuts = {name: cuts[name] for name in main}
    subjects = {name: model.subject(model.cut(*asked), batch) for name, asked in cuts.items()}
    ours, half = of(runtimes, ("float32",), "ours"), of(runtimes, ("bfloat16",), "ours")
    others = of(runtimes, (model.dtype,), "PyTorch eager", "OpenVINO") if work <= 1e11 else []
    wide, narrow = (ours + half, []) if work <= 2e10 else (ours, half * (work <= 1e11))
    again = of(runtimes, (model.dtype,), REPEAT)
    entries: Entries = {}
    for name, subject in subjects.items():
        for runtime in (*wide, *(again if name == main[1] else [])):
            entries[f"{name}: {runtime.label}"] = runtime, subject
    entries |= {f"{name}: {runtime.label}": (runtime, subjects[name]) for name in main for runtime in narrow}
    beside = {**subjects, main[0]: model.subject(model.dense(), batch)} if others else {}
    entries |= {f"{name}: {runtime.label}": (runtime, beside[name]) for name in main for runtime in others}
    return {"macs": {name: subject.macs for name, subject in subjects.items()}} | compare_runtimes(
        entries, budget
    )


def measure_heads(model: Model, batch: int, runtimes: Sequence[Runtime], budget: Budget, _: Record) -> Record:
    """The model with nothing narrower but what heads compute in, to a quarter: queries and keys, or values,
    which cost the same, or all three; to one width, and to unequal ones of the same sum."""
    cuts = {"dense": model.cut(0.0)}
    for widths in ("uniform", "unequal"):
        for narrow in ("keys", "values", "both"):
            what = {"keys": "q, k", "values": "v", "both": "q, k, v"}[narrow]
            cuts[f"{what}, {widths}"] = _narrow_heads(model, narrow, widths == "unequal")
    subjects = {name: model.subject(module, batch) for name, module in cuts.items()}
    ours, again = (of(runtimes, (model.dtype,), name) for name in ("ours", REPEAT))
    entries = {f"{name}: {p.label}": (p, subject) for name, subject in subjects.items() for p in ours}
    entries |= {f"dense: {p.label}": (p, subjects["dense"]) for p in again}
    return {"macs": {name: subject.macs for name, subject in subjects.items()}} | compare_runtimes(
        entries, budget
    )


def _narrow_heads(model: Model, narrow: str, unequal: bool) -> vtp.CompactViT:
    """With other random weights: those of narrower keys would be fitted to images, and take the same time."""
    plan = vtp.make_plan(model.gated(uniform=True), rate=0.0)
    shape = plan.architecture
    quarter = shape.head_dim // 4
    # Up and down by turns; a last head without a partner has the mean.
    offsets = [(-1) ** h * (3 + 2 * (h // 2 % 3)) * unequal for h in range(shape.num_heads // 2 * 2)]
    widths = [quarter + offset for offset in offsets] + [quarter] * (shape.num_heads % 2)
    kept, keys = dict(plan.kept), dict(plan.keys)
    for block in range(shape.depth):
        if narrow in ("values", "both"):
            kept[f"blocks.{block}.attn.proj"] = tuple(
                h * shape.head_dim + i for h, width in enumerate(widths) for i in range(width)
            )
        if narrow in ("keys", "both"):
            keys[f"blocks.{block}.attn"] = tuple(widths)
    return new_compact(dataclasses.replace(plan, kept=kept, keys=keys)).eval()


def _cut_name(rate: float, heads: str) -> str:
    return f"{heads} {rate:.0%}" if rate else "dense"


def measure_training(model: Model, batch: int, depth: int, budget: Budget, _: Record) -> Record:
    """A step of sparse training with gates, without, and with the gate on the activation by hand."""

    def build(blocks: int) -> nn.Module:
        return timm.create_model(model.name, **{**model.changes, "depth": blocks})

    return gating_cost.measure(
        gating_cost.Case(model.dtype, batch, depth),
        build,
        device=torch.device(model.device),
        rounds=budget.rounds,
        seconds=budget.seconds,
        precision=budget.precision,
    )


def measure_planted(model: Model, runtimes: Sequence[Runtime], budget: Budget, _: Record) -> Record:
    """Whether a slow-down of 10% and a wrong result of our engine would be seen: both are planted."""
    subject = model.subject(model.cut(RATE), 1)
    (ours,), again = (of(runtimes, (model.dtype,), name) for name in ("ours", REPEAT))
    slow = Runtime(SLOWED, ours.dtype, lambda *arguments: slowed(ours.prepare(*arguments), 0.1))
    wrong = Runtime(WRONG, ours.dtype, lambda *arguments: _wrong(ours.prepare(*arguments)))
    return compare_runtimes(
        {runtime.label: (runtime, subject) for runtime in (ours, *again, slow, wrong)}, budget
    )


def _wrong(run: Run) -> Run:
    def call() -> Tensor:
        outputs = run().clone()
        outputs[0, 0] += 0.01 * outputs[0].abs().max()
        return outputs

    return call


def too_slow(results: Record, work: float) -> dict[str, str]:
    """Label to reason, for runtimes that left the rounds of a model with less than `work` (batch x MACs)."""
    found = {}
    for key, record in results["cases"].items():
        if record["case"] == "models" and record["batch"] * record["macs"] < work:
            for label, runtime in record["runtimes"].items():
                if runtime["status"] == "slow":
                    found[label] = f"{runtime['times_ours']:.0f} times ours in {key}"
    return found


# --------------------------------------------------------------------------------
# Parts of models

WIDTHS_EMBED_DIM = 480


def measure_widths(widths: Sequence[int], dtype: str, budget: Budget, _: Record) -> Record:
    """A feed-forward branch on our engine at many widths, of fc1's inputs and outputs and fc2's inputs."""
    models = {str(w): FeedForward(WIDTHS_EMBED_DIM, min(w, WIDTHS_EMBED_DIM), w) for w in widths}
    return {"macs": {w: TOKENS * model.macs_per_token for w, model in models.items()}} | compare_runtimes(
        {w: (_feed_forward_runtime(dtype), Subject(model, _tokens(model))) for w, model in models.items()},
        budget,
    )


def measure_layers(
    embed_dim: int, widths: Sequence[int], runtimes: Sequence[Runtime], budget: Budget, _: Record
) -> Record:
    """A feed-forward branch of `embed_dim` inputs at many numbers of hidden units, the last of them dense."""
    runs = [_feed_forward_runtime("float32"), *of(runtimes, ("float32",), "PyTorch eager")]
    models = {w: FeedForward(embed_dim, embed_dim, w) for w in widths}
    subjects = {w: Subject(model, _tokens(model)) for w, model in models.items()}
    entries = {f"{w}: {runtime.label}": (runtime, subjects[w]) for w in widths for runtime in runs}
    return {"macs": {str(w): TOKENS * m.macs_per_token for w, m in models.items()}} | compare_runtimes(
        entries, budget
    )


def _feed_forward_runtime(dtype: str, name: str = "ours") -> Runtime:
    return Runtime(name, dtype, functools.partial(prepare_blocks, dtype=dtype), ours=True)


def _tokens(model: FeedForward) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, TOKENS, model.vit.embed_dim)


def measure_gemm(
    shape: tuple[int, int, int], runtimes: Iterable[Runtime], budget: Budget, _: Record
) -> Record:
    """A product of [M, K] and [K, N] by every library."""
    M, K, N = shape
    torch.manual_seed(0)
    subject = Subject(nn.Linear(K, N, bias=False), torch.randn(M, K))
    # `eager_error` is that of the first row, which is much like any other.
    return {"flops": 2 * M * K * N} | compare_runtimes({p.label: (p, subject) for p in runtimes}, budget)


def measure_rate(size: int, runtimes: Iterable[Runtime], budget: Budget, _: Record) -> Record:
    """A product of `size` x `size` matrices by every library; of ours, all feed-forward branches of a compact
    DeiT-B at batch 1, norms and GELU included, at the widths that `size` would have in it."""
    torch.manual_seed(0)
    square = Subject(nn.Linear(size, size, bias=False), torch.randn(size, size))
    embed_dim, inputs, hidden = (size * part // 2048 for part in (768, 461, 1843))
    model = FeedForward(embed_dim, inputs, hidden, depth=12)
    runtimes, dtypes = [runtime for runtime in runtimes if not runtime.ours], {}
    for runtime in runtimes:
        dtypes[runtime.dtype] = _feed_forward_runtime(runtime.dtype, "ours, feed-forward of DeiT-B")
    branches = Subject(model, _tokens(model))
    entries = {p.label: (p, branches) for p in dtypes.values()} | {p.label: (p, square) for p in runtimes}
    record = {"flops": 2 * size**3} | compare_runtimes(entries, budget)
    for runtime in dtypes.values():
        record["runtimes"][runtime.label]["flops"] = 2 * TOKENS * model.macs_per_token
    return record
