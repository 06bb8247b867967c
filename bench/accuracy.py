"""Does it matter which dimensions go? Learned gates against random and weight-magnitude cutting.

For each seed the shipped baseline is sparse-trained once. At each rate the learned gates are cut first; the
other rankings then cut the same sparse-trained weights to the same MACs, and all are fine-tuned alike. So
only the choice of dimensions differs. Prints a Markdown table and writes results.json; started again with
the same --out, it continues where it stopped.

    python -m bench.accuracy --out runs/accuracy
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vtp
from vtp.files import write_atomic
from vtp.machine import environment
from vtp.pipeline import RECIPES
from vtp.training.config import TrainConfig
from vtp.training.data import Data, open_data
from vtp.training.loaders import Augment
from vtp.training.loop import evaluate, train
from vtp.zoo import FASHION_DEIT, open_model

RATES = (0.4, 0.6)


def gate_plan(sparse: nn.Module, budget: dict[str, float], seed: int) -> vtp.PruningPlan:
    """The paper's ranking: |g| over the whole model."""
    return vtp.make_plan(sparse, **budget)


def taylor_plan(sparse: nn.Module, budget: dict[str, float], seed: int) -> vtp.PruningPlan:
    """Mean square of g * dL/dg, collected during sparse training."""
    return vtp.make_plan(sparse, **budget, score="taylor")


def magnitude_plan(sparse: nn.Module, budget: dict[str, float], seed: int) -> vtp.PruningPlan:
    """L2 norm of the weight column that a dimension feeds, without the gate."""
    scores = {name: layer.weight.detach().norm(dim=0) for name, layer in vtp.sites(sparse).items()}
    return vtp.make_plan(sparse, **budget, score=scores)


def random_plan(sparse: nn.Module, budget: dict[str, float], seed: int) -> vtp.PruningPlan:
    """A plan at this budget whose scores are random, uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {
        name: torch.rand(layer.in_features, generator=generator) for name, layer in vtp.sites(sparse).items()
    }
    return vtp.make_plan(sparse, **budget, score=scores)


METHODS: dict[str, Callable[[nn.Module, dict[str, float], int], vtp.PruningPlan]] = {
    "learned gates": gate_plan,
    "learned gates, Taylor": taylor_plan,
    "weight magnitude": magnitude_plan,
    "random": random_plan,
}


def run_seed(seed: int, dense: nn.Module, data: Data, out: Path) -> list[dict]:
    """All cuts of one sparse-trained model; one record for each rate and method."""
    recipe = RECIPES["small"]()
    augment = Augment.preset(recipe.augment, dense.patch_embed.img_size[0])

    def trained(model: nn.Module, settings: TrainConfig, stage: str, folder: Path) -> vtp.CompactViT:
        settings = dataclasses.replace(settings, seed=seed)
        return train(
            model, data, settings, stage=stage, run_dir=folder, augment=augment, teacher=dense, resume=True
        ).model

    sparse = trained(vtp.insert_gates(dense), recipe.sparse, "sparse", out / f"seed{seed}")
    records = []
    for rate in RATES:
        macs = gate_plan(sparse, {"rate": rate}, seed).cost.macs
        for method, make in METHODS.items():
            folder = out / f"seed{seed}" / f"{rate}" / method.replace(" ", "_").replace(",", "")
            plan = make(sparse, {"rate": rate} if make is gate_plan else {"macs": macs}, seed)
            small = vtp.compact(sparse, plan)
            final = trained(small, recipe.finetune, "finetune", folder)
            records.append(
                {
                    "seed": seed, "rate": rate, "method": method, **dataclasses.asdict(plan.cost),
                    "top1_before": evaluate(small, data)[0], "top1": evaluate(final, data)[0],
                }
            )  # fmt: skip
    return records


def table(records: list[dict], dense_top1: float, dense_cost: vtp.Cost) -> str:
    """Markdown: mean and standard deviation over seeds for each rate and method."""
    seeds = len({record["seed"] for record in records})
    lines = [
        "| rate | ranking | MACs left | params left | top-1 before fine-tuning "
        f"| top-1 after ({seeds} seeds) | change |",
        "|---|---|---|---|---|---|---|",
        f"| 0 | dense | 100% | 100% | | {dense_top1:.2f} | |",
    ]
    for rate in RATES:
        for method in METHODS:
            own = [r for r in records if r["rate"] == rate and r["method"] == method]
            if not own:
                continue
            before, after = ([r[key] for r in own] for key in ("top1_before", "top1"))
            spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
            macs = statistics.mean(r["macs"] for r in own) / dense_cost.macs
            params = statistics.mean(r["params"] for r in own) / dense_cost.params
            lines.append(
                f"| {rate:.0%} | {method} | {macs:.1%} | {params:.1%} | {statistics.mean(before):.2f} "
                f"| {statistics.mean(after):.2f}{spread} | {statistics.mean(after) - dense_top1:+.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results.json")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data, dense = open_data(), open_model(FASHION_DEIT)
    dense_top1, _ = evaluate(dense, data)
    records: list[dict] = []
    for seed in range(options.seeds):
        records += run_seed(seed, dense, data, options.out)
        results = {"dense_top1": dense_top1, "records": records, "environment": environment()}
        write_atomic(
            options.out / "results.json", lambda path, r=results: path.write_text(json.dumps(r, indent=1))
        )
        print(table(records, dense_top1, vtp.count(dense)), flush=True)


if __name__ == "__main__":
    main()
