"""What the accuracy of a cut depends on: ranking, refit, and the training before and after it.

For each seed, cuts of the shipped dense baseline recover for a short time; and the baseline is sparse-trained
once, whose cuts are fine-tuned: the three stages. At each share of the dense model's MACs every ranking cuts
the same weights to the same MACs, plainly and with the closed-form refit. What a plain cut leaves is trained
by the recipe `small`, whose higher rate brings a broken model back; what a refit leaves, which has little to
learn, by `short`. Writes the results after every cut; started again with the same --out, it continues where
it stopped.

    python -m bench.accuracy --out runs/accuracy.json
    python -m bench.accuracy --out bench/results/accuracy.json --markdown
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vtp
from bench import one_shot
from bench.results_file import add_results_file, check_results_file, print_results
from vtp.files import write_atomic
from vtp.machine import commit, description, in_one_line
from vtp.recipes import RECIPES
from vtp.training.config import TrainConfig
from vtp.training.data import Data, open_data
from vtp.training.evaluation import evaluate
from vtp.training.loop import train
from vtp.training.transforms import Augment
from vtp.zoo import FASHION_DEIT, open_model

# MACs of 40 and of 60% of the dimensions that sparse training leaves, over those of the dense model.
SHARES = (0.55, 0.354)
KEY_SHARE = 0.25  # of each head's queries and keys, where a ranking narrows them


BOTH = (False, True)


def learned(score: str, **options: Any) -> one_shot.Make:
    """Rankings by what sparse training has left in the gates."""

    def make(setting: one_shot.Setting, macs: float, *_: Any) -> vtp.PruningPlan:
        return vtp.make_plan(setting.model, macs=macs, score=score, **options)

    return make


OPTIMAL = {"optimal widths, narrow q, k, v": (one_shot.of_statistics("obs", "optimal"), (True,))}


@dataclasses.dataclass(frozen=True)
class Way:
    """From the dense model to a compact one.

    Attributes:
        sparse: whether it is sparse-trained first, by the recipe `small`.
        epochs: of training after the cut.
        rankings: makers of plans, and whether their cut is tried plain, with the refit, or both ways.
    """

    sparse: bool
    epochs: int
    rankings: dict[str, tuple[one_shot.Make, tuple[bool, ...]]]


WAYS = {
    "one-shot": Way(
        sparse=False,
        epochs=2,
        rankings={
            "weight magnitude, per site": (one_shot.magnitude, BOTH),
            "Taylor (labels)": (one_shot.taylor, BOTH),
            **OPTIMAL,
        },
    ),
    "one-shot, longer": Way(sparse=False, epochs=8, rankings=OPTIMAL),  # the epochs of the three stages
    "three stages": Way(
        sparse=True,
        epochs=4,
        rankings={
            "learned gates": (learned("gate"), BOTH),
            "learned gates, q and k at a quarter": (learned("gate", key_width=KEY_SHARE), (True,)),
            **OPTIMAL,
            "weight magnitude, per site": (one_shot.magnitude, BOTH),
            "random": (one_shot.random, BOTH),
        },
    ),
}


# --------------------------------------------------------------------------------------------------- running


@dataclasses.dataclass(frozen=True)
class Seed:
    """What all cuts of one seed share; `folder` is for their training, and what it has is not done again."""

    dense: nn.Module
    data: Data
    seed: int
    folder: Path

    def trained(
        self, model: nn.Module, stage: str, settings: TrainConfig, augment: str, name: str
    ) -> nn.Module:
        """The model behind a stage of training, taught by the dense model."""
        result = train(
            model,
            self.data,
            dataclasses.replace(settings, seed=self.seed),
            stage=stage,
            run_dir=self.folder / name,
            augment=Augment.preset(augment, self.dense.patch_embed.img_size[0]),
            teacher=self.dense,
            resume=True,
            progress=False,
        )
        return result.model.eval()

    def start(self, way: Way) -> nn.Module:
        """What is cut."""
        if not way.sparse:
            return self.dense
        recipe = RECIPES["small"]()
        return self.trained(vtp.insert_gates(self.dense), "sparse", recipe.sparse, recipe.augment, "sparse")

    def fine_tuned(self, small: nn.Module, fitted: bool, epochs: int, name: str) -> nn.Module:
        """The compact model behind its training, by the recipe that suits what is left."""
        recipe = RECIPES["short" if fitted else "small"]()
        settings = dataclasses.replace(recipe.finetune, epochs=epochs)
        return self.trained(small, "finetune", settings, recipe.augment_of("finetune"), name)


def run_seed(own: Seed, records: dict[str, Any], done: Callable[[], None]) -> None:
    """Measure every cut of a seed that `records` does not have; `done` is called behind each."""
    for way_name, way in WAYS.items():
        setting = one_shot.Setting(own.start(way), own.data, own.seed)
        labelled = setting.images(one_shot.IMAGES)
        known: list[vtp.Statistics] = []
        for ranking, (make, refits) in way.rankings.items():
            for share in SHARES:
                for fitted in refits:
                    key = f"{own.seed}/{way_name}/{ranking}/{share}/{fitted}"
                    if key in records:
                        continue
                    start = time.perf_counter()
                    if "optimal" in ranking and not known:
                        known.append(vtp.calibrate(setting.model, labelled[0]))
                    plan = make(setting, setting.macs(share), known[0] if known else None, labelled)
                    small = vtp.compact(setting.model, plan, images=labelled[0] if fitted else None).eval()
                    cut = time.perf_counter() - start
                    before = evaluate(small, own.data)[0]
                    start = time.perf_counter()
                    final = own.fine_tuned(small, fitted, way.epochs, key)
                    records[key] = {
                        **dataclasses.asdict(plan.cost),
                        "top1_before": before,
                        "top1": evaluate(final, own.data)[0],
                        "cut_seconds": round(cut, 1),
                        "training_seconds": round(time.perf_counter() - start, 1),
                    }
                    print(key, records[key], flush=True)
                    done()


def run(out: Path, seeds: Sequence[int]) -> None:
    """Measure every cut that `out` does not have; training states lie in a folder beside it."""
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"records": {}}
    dense, data = open_model(FASHION_DEIT).eval(), open_data()
    results["dense"] = {"top1": evaluate(dense, data)[0], **dataclasses.asdict(vtp.count(dense))}
    results["images"] = len(data.train)
    results |= description(torch.device("cpu")) | {"commit": commit()}
    for seed in seeds:
        own = Seed(dense, data, seed, out.with_suffix("") / str(seed))
        run_seed(
            own,
            results["records"],
            lambda: write_atomic(out, lambda path: path.write_text(json.dumps(results, indent=1))),
        )


def markdown(results: dict[str, Any]) -> str:
    """The table of docs/accuracy.md: mean and standard deviation over seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for key, record in results["records"].items():
        found.setdefault(key.split("/", 1)[1], []).append(record)
    seeds = max(map(len, found.values()))

    def cells(case: str) -> str:
        own = found.get(case)
        if not own:
            return " not measured | not measured |"
        before, after = ([record[name] for record in own] for name in ("top1_before", "top1"))
        spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
        fewer = f" ({len(own)} seeds)" if len(own) < seeds else ""
        return f" {statistics.mean(before):.2f} | {statistics.mean(after):.2f}{spread}{fewer} |"

    sides = " | ".join(f"{share:.0%}: cut | {share:.0%}: trained" for share in SHARES)
    lines = [
        f"| way | ranking | refit | labelled images seen | {sides} | minutes |",
        "|" + "---|" * (5 + 2 * len(SHARES)),
    ]
    for name, way in WAYS.items():
        epochs = way.epochs + (RECIPES["small"]().sparse.epochs if way.sparse else 0)
        for ranking, (_, refits) in way.rankings.items():
            for fitted in refits:
                cases = [f"{name}/{ranking}/{share}/{fitted}" for share in SHARES]
                seconds = [r["cut_seconds"] + r["training_seconds"] for c in cases for r in found.get(c, ())]
                minutes = f"{statistics.mean(seconds) / 60:.1f}" if seconds else ""
                seen = f"{epochs * results['images']:,}"
                row = "".join(map(cells, cases))
                lines.append(f"| {name} | {ranking} | {'yes' if fitted else ''} | {seen} |{row} {minutes} |")
    lines += [
        "",
        f"Dense: {results['dense']['top1']:.2f}. Mean of {seeds} seeds ± standard deviation. Minutes: cut "
        f"and training. {in_one_line(results)}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_results_file(parser, Path("bench/results/accuracy.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args(arguments)
    check_results_file(parser, options)
    if options.markdown:
        return print_results(options.out, markdown)
    run(options.out, options.seeds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
