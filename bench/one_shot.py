"""What a cut without training keeps: rankings, refit, ranks of queries and keys, images, damping.

Everything starts from the shipped dense baseline and unlabelled images of its training set, for rankings
drawn anew for each of some seeds; the test images are those that ship with the package and, given
--original-test, the 10,000 of the original test set. Writes the results after every case; started again with
the same --out, it goes on where it stopped.

    python -m bench.one_shot --out runs/one_shot.json [--original-test FOLDER]
    python -m bench.one_shot --out bench/results/one_shot.json --markdown
    python -m bench.one_shot --time deit_base_patch16_224 1024   # how long it takes on a larger model
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode

import vtp
from bench.ob2c import (
    MLP_UNITS,
    Moments,
    denoised_variance_plan,
    input_moments,
    least_macs,
    with_compensation,
)
from bench.results_file import add_results_file, check_results_file, print_results
from bench.snapvit import Sensitivity, searched_factors, sensitivity, snapvit_plan
from vtp.files import write_atomic
from vtp.machine import commit, description, in_one_line, peak_bytes
from vtp.pruning.gates import with_gates
from vtp.pruning.refit import refit
from vtp.pruning.streams import plain_copy
from vtp.training.data import Data, open_data
from vtp.training.loaders import test_loader
from vtp.zoo import FASHION_DEIT, open_model

SHARES = (0.55, 0.354, 0.25)  # of the dense model's MACs; the first two are those of the accuracy table
IMAGES = 2000
COUNTS = (128, 512, 2000, 10_000)
DAMPINGS = (None, 1e-4, 1e-3, 1e-2, 1e-1)  # None: OAS
ROWS = (5, 10, 20, 80)  # for each input of the widest layer
RANKS = (16, 8, 4, 2)
NARROWED = {
    "svd": "whitened SVD",
    "chosen": "best dimensions, as they are",
    "mended": "best dimensions, with CORP's repair",
}


@dataclasses.dataclass
class Setting:
    """What all cases share for one seed: the model to be cut, and where its images come from."""

    model: nn.Module
    data: Data
    seed: int

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Images of the training set, normalised, [count, C, H, W], and their labels."""
        chosen = np.random.default_rng(self.seed).permutation(len(self.data.train))[:count]
        data = dataclasses.replace(self.data, test=Subset(self.data.train, sorted(chosen.tolist())))
        size, channels = self.model.patch_embed.img_size[0], self.model.patch_embed.proj.in_channels
        batches = list(test_loader(data, image_size=size, in_chans=channels, batch_size=500))
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def macs(self, share: float) -> float:
        """MACs that a share of the dense model's is."""
        return share * vtp.count(self.model).macs


# -------------------------------------------------------------------------------------------------- rankings
# Each gives a plan for so many MACs. `statistics` is of `vtp.calibrate`; labels are for Taylor alone.

Make = Callable[[Setting, float, vtp.Statistics, tuple[Tensor, Tensor]], vtp.PruningPlan]


def magnitude(setting: Setting, macs: float, *_: Any) -> vtp.PruningPlan:
    """L2 norm of the weight column that a dimension feeds; the same share of each kind of site."""
    gated = with_gates(setting.model)
    scores = {name: layer.weight.detach().norm(dim=0) for name, layer in vtp.sites(gated).items()}
    return vtp.make_plan(gated, macs=macs, score=scores, scope="per_site")


def taylor(setting: Setting, macs: float, _: Any, labelled: tuple[Tensor, Tensor]) -> vtp.PruningPlan:
    """Mean square of g * dL/dg at g = 1 over batches of 50 (Molchanov et al., arXiv 1906.10771)."""
    gated = with_gates(setting.model).eval()
    for images, labels in zip(labelled[0].split(50), labelled[1].split(50), strict=True):
        gated.zero_grad()
        nn.functional.cross_entropy(gated(images), labels).backward()
        for layer in vtp.sites(gated).values():
            layer.accumulate_taylor()
    return vtp.make_plan(gated, macs=macs, score="taylor")


def random(setting: Setting, macs: float, *_: Any) -> vtp.PruningPlan:
    """Any dimensions."""
    gated = with_gates(setting.model)
    generator = torch.Generator().manual_seed(setting.seed)
    scores = {
        name: torch.rand(layer.in_features, generator=generator) for name, layer in vtp.sites(gated).items()
    }
    return vtp.make_plan(gated, macs=macs, score=scores)


def of_statistics(score: str, scope: str, protect: tuple[str, ...] = ()) -> Make:
    """The rankings of `vtp.make_plan`."""

    def make(setting: Setting, macs: float, statistics: vtp.Statistics, *_: Any) -> vtp.PruningPlan:
        return vtp.make_plan(
            setting.model, macs=macs, statistics=statistics, score=score, scope=scope, protect=protect
        )

    return make


VARIANCE = "variance, per site"
UNITS_ALONE = "MLP units alone"
RANKINGS: dict[str, Make] = {
    "random": random,
    "weight magnitude, per site": magnitude,
    "Taylor (labels)": taylor,
    VARIANCE: of_statistics("variance", "per_site"),
    "activation": of_statistics("activation", "global"),
    "greedy OBS": of_statistics("obs", "global"),
    "optimal widths, narrow q, k, v": of_statistics("obs", "optimal"),
    f"greedy OBS, {UNITS_ALONE}": of_statistics("obs", "global", MLP_UNITS),
}


def shares_of(name: str, dense: nn.Module) -> list[float]:
    """The shares of the MACs that a row of this name can be cut to."""
    least = least_macs(dense) / vtp.count(dense).macs if UNITS_ALONE in name else 0.0
    return [share for share in SHARES if share >= least]


OB2C = {  # what is protected
    f"DVBP + OB2C, {UNITS_ALONE}": MLP_UNITS,
    "DVBP + OB2C, extended to all sites": (),
}
SNAPVIT = "SnapViT"
MEAN_SHIFT = f"{VARIANCE}, mean shift (VBP)"


@torch.no_grad()
def with_mean_shift(dense: nn.Module, plan: vtp.PruningPlan, moments: Moments) -> nn.Module:
    """The dense model with biases that make up for the mean of the inputs that a plan removes, as VBP's cut
    does (arXiv 2507.12988)."""
    shifted = copy.deepcopy(dense)
    for name, kept in plan.kept.items():
        layer, (mean, _) = shifted.get_submodule(name), moments[name]
        gone = torch.ones(len(mean), dtype=torch.bool)
        gone[list(kept)] = False
        layer.bias += layer.weight[:, gone] @ mean[gone].to(layer.weight)
    return shifted


# --------------------------------------------------------------------------------------------- Torch-Pruning


def torch_pruning(setting: Setting, macs: float, how: str, labelled: tuple[Tensor, Tensor]) -> nn.Module:
    """What Torch-Pruning, as it is installed, leaves of the dense model at so many MACs at most.

    As in its examples for timm's ViTs: the embedding, hidden and head dimensions of all layers at one share,
    which is searched for, heads kept, the head of classes left alone.

    Args:
        how: "Taylor", from the labels' loss on all images, or "magnitude".
    """
    low, high = 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        if counted_macs(_torch_pruned(setting, middle, "magnitude", labelled)) <= macs:
            high = middle
        else:
            low = middle
    return _torch_pruned(setting, high, how, labelled)


def _torch_pruned(setting: Setting, share: float, how: str, labelled: tuple[Tensor, Tensor]) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(setting.model).requires_grad_(True)
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.forward = functools.partial(_attention, attention)
    importance = torch_pruning.importance
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # it says that it prunes the class token and the positions too
        pruner = torch_pruning.pruner.BasePruner(
            model,
            labelled[0][:1],
            importance=importance.GroupTaylorImportance()
            if how == "Taylor"
            else importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[model.head],
            num_heads={attention.qkv: attention.num_heads for attention in attentions},
            prune_head_dims=True,
        )
        if how == "Taylor":
            for images, labels in zip(labelled[0].split(100), labelled[1].split(100), strict=True):
                nn.functional.cross_entropy(model(images), labels).backward()
        for group in pruner.step(interactive=True):
            group.prune()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
    return model.requires_grad_(False)


def _attention(
    attention: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """timm's forward for whatever head_dim is left; the scale is that of PyTorch, head_dim ** -0.5."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    return attention.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def counted_macs(model: nn.Module) -> float:
    """Multiply-adds of one image, counted as `vtp.count` counts them, of a model that it does not know."""
    image = torch.zeros(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    # The counter does not know the CPU's fused attention, and hooks gradients of constant branches.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).requires_grad_(False)(image)
    return counter.get_total_flops() / 2


TORCH_PRUNING = {"Torch-Pruning, magnitude": "magnitude", "Torch-Pruning, Taylor (labels)": "Taylor"}


# ----------------------------------------------------------------------------------------------------- cases


def cases(setting: Setting) -> Iterator[tuple[str, Callable[[], tuple[nn.Module, float]]]]:
    """Name and maker of every model of one seed; the maker gives it with the seconds that it took."""
    labelled = setting.images(IMAGES)
    known: dict[int, vtp.Statistics] = {}

    def statistics_of(images: Tensor) -> vtp.Statistics:
        if len(images) not in known:
            known[len(images)] = vtp.calibrate(setting.model, images)
        return known[len(images)]

    def cut(make: Make, share: float, fitted: bool) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = make(setting, setting.macs(share), statistics_of(labelled[0]), labelled)
        small = vtp.compact(setting.model, plan, images=labelled[0] if fitted else None)
        return small, time.perf_counter() - start

    for name, make in RANKINGS.items():
        for share in shares_of(name, setting.model):
            for fitted in (False, True):
                if fitted or "optimal" not in name:
                    yield f"ranking/{name}/{share}/{fitted}", lambda a=(make, share, fitted): cut(*a)

    @functools.cache
    def moments() -> Moments:
        return input_moments(setting.model, vtp.sites(with_gates(setting.model)), labelled[0])

    def shifted(share: float) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = RANKINGS[VARIANCE](setting, setting.macs(share), statistics_of(labelled[0]))
        model = with_mean_shift(setting.model, plan, moments())
        return vtp.compact(model, plan), time.perf_counter() - start

    for share in SHARES:
        yield f"ranking/{MEAN_SHIFT}/{share}/False", lambda s=share: shifted(s)

    def compensated(protect: tuple[str, ...], share: float, fitted: bool) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = denoised_variance_plan(
            setting.model, setting.macs(share), moments(), len(labelled[0]), protect=protect
        )
        if fitted:  # the refit, in place of what makes up for the cut there
            small = vtp.compact(setting.model, plan, images=labelled[0])
        else:
            small = vtp.compact(with_compensation(setting.model, plan, moments()), plan)
        return small, time.perf_counter() - start

    for name, protect in OB2C.items():
        for share in shares_of(name, setting.model):
            for fitted in (False, True):
                yield f"ranking/{name}/{share}/{fitted}", lambda a=(protect, share, fitted): compensated(*a)

    @functools.cache
    def searched() -> tuple[Sensitivity, np.ndarray]:
        """On every other image the gradients, on the rest the search; once for all budgets, as there."""
        found = sensitivity(setting.model, labelled[0][::2], seed=setting.seed)
        budgets = [setting.macs(share) for share in SHARES]
        images = labelled[0][1::2]
        return found, searched_factors(setting.model, budgets, found, images, seed=setting.seed)

    def snapvit(share: float, fitted: bool) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = snapvit_plan(setting.model, setting.macs(share), *searched())
        small = vtp.compact(setting.model, plan, images=labelled[0] if fitted else None)
        return small, time.perf_counter() - start

    for share in SHARES:
        for fitted in (False, True):
            yield f"ranking/{SNAPVIT}/{share}/{fitted}", lambda a=(share, fitted): snapvit(*a)

    def pruned(how: str, share: float) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        model = torch_pruning(setting, setting.macs(share), how, labelled)
        return model, time.perf_counter() - start

    if importlib.util.find_spec("torch_pruning"):
        for name, how in TORCH_PRUNING.items():
            for share in SHARES:
                yield f"ranking/{name}/{share}/False", lambda a=(how, share): pruned(*a)

    if setting.seed:  # the rest is for one draw of the images
        return

    def optimal(images: Tensor, share: float, **options: Any) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = vtp.make_plan(
            setting.model, macs=setting.macs(share), statistics=statistics_of(images), scope="optimal"
        )
        small = vtp.compact(setting.model, plan, images=images[:16])  # its shapes; the weights come now
        refit(plain_copy(setting.model), small, plan, images, **options)
        return small, time.perf_counter() - start

    for share in SHARES[:2]:
        for count in COUNTS:
            yield f"images/{count}/{share}", lambda n=count, s=share: optimal(setting.images(n)[0], s)
        for damping in DAMPINGS:
            yield (
                f"damping/{damping}/{share}",
                lambda d=damping, s=share: optimal(labelled[0], s, damping=d),
            )
        for rows in ROWS:
            number = rows * setting.model.blocks[0].mlp.fc2.in_features
            yield f"rows/{rows}/{share}", lambda n=number, s=share: optimal(labelled[0], s, rows=n)
        yield f"feedback/False/{share}", lambda s=share: optimal(labelled[0], s, feedback=False)

    def narrow(rank: int) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        plan = vtp.make_plan(setting.model, rate=0.0, statistics=statistics_of(labelled[0]), key_width=rank)
        return vtp.compact(setting.model, plan, images=labelled[0]), time.perf_counter() - start

    def chosen(rank: int, mended: bool) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        small = choose_keys(setting.model, labelled[0], rank, mended=mended)
        return small, time.perf_counter() - start

    for rank in RANKS:
        yield f"rank/svd/{rank}", lambda r=rank: narrow(r)
        yield f"rank/chosen/{rank}", lambda r=rank: chosen(r, False)
        yield f"rank/mended/{rank}", lambda r=rank: chosen(r, True)


@torch.no_grad()
def choose_keys(dense: nn.Module, images: Tensor, rank: int, *, mended: bool = False) -> nn.Module:
    """The dense model with all but `rank` dimensions of each head's queries and keys at 0.

    Those are kept that carry most of the scores on their own: E q_j^2 E k_j^2, keys centred in each image.
    `mended`: what meets the kept queries q_S becomes B k_S, whose scores come closest to q'k by least squares
    for the second moments Q and K, `B = Q_SS^-1 Q_S: K_:S K_SS^-1`; as CORP (arXiv 2602.05243) makes up for
    scores that are removed by a linear map between those that are kept.
    """
    small = plain_copy(dense)
    tokens = small.norm_pre(small._pos_embed(small.patch_embed(images)))
    for block, own in zip(plain_copy(dense).blocks, small.blocks, strict=True):
        attn = block.attn
        qkv = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        query, key, _ = qkv.unbind(2)
        key = key - key.mean(1, keepdim=True)
        energy = query.square().mean((0, 1)) * key.square().mean((0, 1))  # [heads, head_dim]
        kept = energy.topk(rank).indices
        gone = torch.ones_like(energy, dtype=torch.bool).scatter_(1, kept, False).flatten()
        for head in range(attn.num_heads) if mended else ():
            _mend_queries(own.attn.qkv, head, kept[head], query[:, :, head], key[:, :, head])
        for part in (slice(0, len(gone)), slice(len(gone), 2 * len(gone))):
            own.attn.qkv.weight[part][gone] = 0
            if own.attn.qkv.bias is not None:
                own.attn.qkv.bias[part][gone] = 0
        tokens = block(tokens)
    return small


def _mend_queries(qkv: nn.Linear, head: int, kept: Tensor, query: Tensor, key: Tensor) -> None:
    """B of `choose_keys`, folded into the kept rows of one head's queries. query, key: [..., head_dim]."""
    queries, keys = (t.flatten(0, -2).double() for t in (query, key))
    queries, keys = queries.T @ queries, keys.T @ keys
    ridge = [1e-8 * own[kept][:, kept].diagonal().mean() * torch.eye(len(kept)) for own in (queries, keys)]
    left = torch.linalg.solve(queries[kept][:, kept] + ridge[0], queries[kept])
    right = torch.linalg.solve(keys[kept][:, kept] + ridge[1], keys[kept])
    mix = (left @ right.T).to(qkv.weight)
    rows = head * len(queries) + kept
    qkv.weight[rows] = mix.T @ qkv.weight[rows]
    if qkv.bias is not None:
        qkv.bias[rows] = mix.T @ qkv.bias[rows]


# --------------------------------------------------------------------------------------------------- running


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that are classified right."""
    hits = [model(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return 100 * torch.cat(hits).double().mean().item()


def run(out: Path, seeds: int, original_test: Path | None) -> None:
    """Measure every case that `out` does not have."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"records": {}}
    dense, data = open_model(FASHION_DEIT).eval(), open_data()
    tests = {"top1": data} | ({"top1_original": open_data(original_test)} if original_test else {})
    size, channels = dense.patch_embed.img_size[0], dense.patch_embed.proj.in_channels
    sets = {}
    for name, own in tests.items():
        # Normalised alike, whatever another folder's own statistics are.
        alike = dataclasses.replace(own, mean=data.mean, std=data.std)
        batches = list(test_loader(alike, image_size=size, in_chans=channels, batch_size=500))
        sets[name] = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    results["dense"] = {name: top1(dense, *own) for name, own in sets.items()}
    results |= description(torch.device("cpu")) | {"commit": commit()}
    for seed in range(seeds):
        for case, make in cases(Setting(dense, data, seed)):
            key = f"{seed}/{case}"
            if key in results["records"]:
                continue
            model, seconds = make()
            record = {name: top1(model, *own) for name, own in sets.items()} | {"seconds": round(seconds, 1)}
            results["records"][key] = record
            write_atomic(out, lambda path: path.write_text(json.dumps(results, indent=1)))
            print(key, record, flush=True)


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/one-shot.md."""
    records: dict[str, list[dict[str, Any]]] = {}
    for key, record in results["records"].items():
        records.setdefault(key.split("/", 1)[1], []).append(record)
    original = "top1_original" in results["dense"]

    def cell(case: str) -> str:
        own = records.get(case)
        if not own:
            return ""
        text = f"{statistics.mean(r['top1'] for r in own):.2f}"
        return text + (f" / {statistics.mean(r['top1_original'] for r in own):.2f}" if original else "")

    def table(first: str, columns: Iterable[str], rows: Iterable[tuple[str, list[str]]]) -> list[str]:
        columns = list(columns)
        lines = ["", f"| {first} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        return lines + [f"| {label} | {' | '.join(map(cell, own))} |" for label, own in rows]

    dense = f"{results['dense']['top1']:.2f}"
    dense += f" / {results['dense']['top1_original']:.2f}" if original else ""
    draws = max(map(len, records.values()))
    lines = [f"Dense: {dense}. Rankings: mean of {draws} draws of the images; the rest: one."]
    both = [(share, fitted) for share in SHARES for fitted in (False, True)]
    lines += table(
        "ranking",
        (f"{share:.0%}{', refit' if fitted else ''}" for share, fitted in both),
        (
            (name, [f"ranking/{name}/{share}/{fitted}" for share, fitted in both])
            for name in [*RANKINGS, MEAN_SHIFT, *OB2C, SNAPVIT, *TORCH_PRUNING]
        ),
    )
    budgets = [f"{share:.0%} of MACs" for share in SHARES[:2]]
    lines += table(
        "images", budgets, ((f"{n:,}", [f"images/{n}/{share}" for share in SHARES[:2]]) for n in COUNTS)
    )
    ways = [("OAS" if d is None else f"{d:g} of the mean variance", f"damping/{d}") for d in DAMPINGS]
    ways += [("OAS, without feedback", "feedback/False")]
    lines += table(
        "damping", budgets, ((label, [f"{way}/{share}" for share in SHARES[:2]]) for label, way in ways)
    )
    rows = [(str(n), [f"rows/{n}/{share}" for share in SHARES[:2]]) for n in ROWS]
    lines += table("rows for each input", budgets, rows)
    lines += table(
        "rank of q and k, of 32",
        map(str, RANKS),
        ((label, [f"rank/{kind}/{rank}" for rank in RANKS]) for kind, label in NARROWED.items()),
    )
    return "\n".join(lines)


def draw(results: dict[str, Any], file: Path) -> None:
    """Three plots side by side: top-1 against images, against damping, against the rank of q and k."""
    records: dict[str, list[float]] = {}
    for key, record in results["records"].items():
        records.setdefault(key.split("/", 1)[1], []).append(record["top1"])
    found = {case: statistics.mean(values) for case, values in records.items()}
    figure = Figure(figsize=(12.6, 3.4), dpi=120)
    counts, dampings, ranks = figure.subplots(1, 3)
    fixed = [damping for damping in DAMPINGS if damping is not None]
    for share, mark in zip(SHARES[:2], ("o-", "s-"), strict=True):
        label = f"{share:.0%} of MACs"
        counts.plot(COUNTS, [found[f"images/{n}/{share}"] for n in COUNTS], mark, label=label)
        (line,) = dampings.plot(fixed, [found[f"damping/{d}/{share}"] for d in fixed], mark, label=label)
        dampings.axhline(found[f"damping/None/{share}"], color=line.get_color(), ls="--", lw=1)
        dampings.axhline(found[f"feedback/False/{share}"], color=line.get_color(), ls=":", lw=1)
    for (kind, label), mark in zip(NARROWED.items(), ("o-", "s--", "^:"), strict=True):
        ranks.plot(RANKS, [found[f"rank/{kind}/{rank}"] for rank in RANKS], mark, label=label)
    for axes, title, where in (
        (counts, "unlabelled images", "images"),
        (dampings, "damping (dashed: OAS; dotted: without feedback)", "share of the mean variance"),
        (ranks, "queries and keys alone", "rank of a head, of 32"),
    ):
        axes.set(xscale="log", title=title, xlabel=where, ylabel="top-1, 2,000 test images")
        axes.axhline(results["dense"]["top1"], color="0.6", lw=0.8)
        axes.title.set_fontsize(9)
        axes.legend(fontsize=7)
    ranks.set_xticks(RANKS, map(str, RANKS))
    ranks.minorticks_off()
    figure.text(0.5, 0.005, in_one_line(results), ha="center", fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    write_atomic(file, lambda path: figure.savefig(path, format="png"))


def time_stages(name: str, images: int) -> None:
    """Calibrate a model of timm's, plan 55% of its MACs, cut it with the refit; print what each takes.

    Weights and images are random: time and memory depend on the shapes, and on what the plan leaves of each.
    """
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    inputs = torch.randn(images, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    macs = SHARES[0] * vtp.count(model).macs
    made: dict[str, Any] = {}
    stages: dict[str, Callable[[], Any]] = {
        "calibration": lambda: vtp.calibrate(model, inputs),
        "plan": lambda: vtp.make_plan(model, macs=macs, statistics=made["calibration"], scope="optimal"),
        "cut and refit": lambda: vtp.compact(model, made["plan"], images=inputs),
    }

    def timed() -> Tensor:
        for stage, make in stages.items():
            start = time.perf_counter()
            made[stage] = make()
            print(f"{stage}: {time.perf_counter() - start:.1f} s", flush=True)
        return inputs

    start = time.perf_counter()
    _, peak = peak_bytes(timed, torch.device("cpu"))
    memory = "" if peak is None else f", at most {peak / 1e9:.2f} GB in use"
    print(f"{name}, {images:,} images: {time.perf_counter() - start:.1f} s{memory}")
    print(in_one_line(description(torch.device("cpu")) | {"commit": commit()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_results_file(parser, Path("bench/results/one_shot.json"))
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration images")
    parser.add_argument(
        "--original-test", type=Path, help="folder with the original idx files, tested beside"
    )
    parser.add_argument("--plot", type=Path, help="draw the results file --out as a PNG; measure nothing")
    parser.add_argument(
        "--time",
        nargs=2,
        metavar=("MODEL", "IMAGES"),
        help="print the seconds and the memory that a model of timm's takes; write nothing",
    )
    options = parser.parse_args(arguments)
    if options.time:
        name, images = options.time
        if not timm.is_model(name) or not images.isdecimal() or int(images) < 1:
            wanted = "a model of timm's and a number of images"
            parser.error(f"argument --time: got {name} {images}, expected {wanted}")
        time_stages(name, int(images))
        return 0
    check_results_file(parser, options)
    if options.plot:
        draw(json.loads(options.out.read_text()), options.plot)
        return 0
    if options.markdown:
        return print_results(options.out, markdown)
    run(options.out, options.seeds, options.original_test)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
