"""The stages in order: dense baseline, sparse training, cut, fine-tuning, comparison, report.

Or, with `one_shot`, without sparse training: dense baseline, calibration, the best widths for the budget, cut
and refit, a short recovery as the stage finetune, comparison, report.

A run is one folder:

    config.json          what was asked for
    metrics.jsonl        one line an epoch; tensorboard/ has the same as curves
    checkpoints/         training state of each stage, for resuming
    dense.safetensors    the baseline
    sparse.safetensors   the gated model after sparse training: can be cut again at any budget
    statistics.safetensors  one-shot, instead: what calibration found, for plans at any budget
    plan.json            what is kept, and why
    pruned.safetensors   the compact model before fine-tuning
    compact.safetensors  the compact model after fine-tuning: the result
    results.json         the comparison and the accuracy at other budgets
    report.html          all of it, to look at
    timm/                the result as timm opens it ("local-dir:RUN/timm"), with a model card
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from vtp.checkpoint import load, save
from vtp.choices import CALIBRATION_IMAGES, EMBEDDED, FASHION_DEIT
from vtp.files import fingerprint, write_atomic
from vtp.group import Group, first_makes, is_first, take_from_first, world
from vtp.hub import save_pretrained
from vtp.kinds import DENSE, GATED, kind_of, other_kind
from vtp.machine import environment
from vtp.model.architecture import describe
from vtp.model.cost import count
from vtp.model.images import (
    awaits_classes,
    class_descriptions,
    class_names,
    image_config,
    imagenet_classes,
    knows_normalisation,
    set_image_config,
    set_imagenet_names,
)
from vtp.pruning.calibration import Statistics, calibrate
from vtp.pruning.compact import CompactModel, compact
from vtp.pruning.gates import insert_gates
from vtp.pruning.one_shot import check_budget, check_images, tokens_size
from vtp.pruning.plan import PlanError
from vtp.pruning.selection import make_plan, pareto
from vtp.recipes import STAGES, Recipe, stages_of_run
from vtp.report import comparison_table, write_report
from vtp.run_folder import begin_run, run_folder
from vtp.runtime.optimize import optimize
from vtp.timing import interleaved_latency
from vtp.training.classes import in_short
from vtp.training.config import TrainConfig
from vtp.training.data import (
    Data,
    DataError,
    check_data,
    is_multi_label,
    match_classes,
    open_data,
)
from vtp.training.evaluation import evaluate
from vtp.training.identity import data_identity
from vtp.training.loaders import calibration_count, calibration_images
from vtp.training.loop import train
from vtp.training.progress import share_bar
from vtp.training.ranks import accelerator
from vtp.training.sharding import wants_sharding
from vtp.training.transforms import Augment
from vtp.words import counted
from vtp.zoo import open_model, open_teacher

RESLICE_RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PARETO_POINTS = 15


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything a run is determined by, beside the machine.

    Attributes:
        model: "fashion-deit", a timm name (released weights), or a file that `vtp.save` wrote.
        checkpoint: a file with weights for a model of timm's name, as `open_model` takes it; None for none.
        data, class_map: as `open_data` takes them; data_root: for data sets that keep their files elsewhere.
        from_scratch: new weights, and a dense training stage, instead of a released baseline.
        new_head: keep the baseline's weights but give it a new head for the classes of `data`, and train
            that first.
        budget: arguments of `make_plan`: one of rate, macs, params, and score, scope, per_mac, ...
        recipe: training settings.
        latency_batch: images per forward pass in the latency comparison.
        one_shot: calibrate and refit instead of sparse training; `budget` may then have the scope "optimal".
        refit: of the sparse-trained model, in closed form, between the cut and fine-tuning; a one-shot cut
            always has it.
        images: training images that calibration and refit take.
        teacher, teacher_checkpoint: a model to distil from, and weights of one's own for it, as
            `open_teacher` takes them; None distils from the dense baseline.
    """

    recipe: Recipe
    model: str = FASHION_DEIT
    data: str = EMBEDDED
    data_root: str | None = None
    class_map: str | None = None
    from_scratch: bool = False
    new_head: bool = False
    budget: dict[str, Any] = dataclasses.field(default_factory=lambda: {"rate": 0.4})
    latency_batch: int = 64
    one_shot: bool = False
    refit: bool = True
    images: int = CALIBRATION_IMAGES
    checkpoint: str | None = None
    teacher: str | None = None
    teacher_checkpoint: str | None = None

    def __post_init__(self) -> None:
        if self.latency_batch < 1:
            raise ValueError(f"latency_batch: got {self.latency_batch}, expected at least 1")
        check_images(self.images)
        alpha = self.recipe.dense.distill_alpha
        if alpha and self.teacher is None and "dense" in self.stages:
            raise ValueError(
                f"dense.distill_alpha: got {alpha}, expected 0 without --teacher: there is no model yet that "
                "the stage dense could learn from"
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that train, in order."""
        return stages_of_run(new_weights=self.from_scratch or self.new_head, one_shot=self.one_shot)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; stages stand at the top level so that the report shows them side by side."""
        fields = dataclasses.asdict(self)
        recipe = fields.pop("recipe")
        first, last = (self.recipe.augment_of(self.stages[i]) for i in (0, -1))
        augments = {"augment": first} | ({} if first == last else {"finetune_augment": last})
        names = self.stages if self.one_shot else STAGES
        return json.loads(json.dumps({**fields, **augments, **{name: recipe[name] for name in names}}))


def run(
    config: RunConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    progress: bool = True,
    memory_gb: float | None = None,
) -> Path:
    """Run all stages and write the run folder. Returns the path of the report.

    Args:
        resume: continue what an interrupted run with the same configuration left in `run_dir`. What the same
            job of torchrun has begun there is continued without it.
        memory_gb: as `vtp.calibrate` and `vtp.compact` take it.

    Raises:
        FileError: `run_dir` holds another run, is in use by one, or cannot be written.
        DataError, PlanError, UnsupportedModelError: before the first step, wherever that can be known.
        TrainingInterrupted, NonFiniteLossError: see `vtp.training.loop.train`.
        RankError, RankLostError: another process of the run failed, or has ended.
    """
    process = accelerator()
    # A log file has no width of its own; 80 columns would break the final table.
    width = None if sys.stdout.isatty() else 120
    console = Console(quiet=not (progress and process.is_main_process), width=width)
    model, data, teacher = _open(config)
    _check_before_training(config, model, data, process.num_processes)
    with run_folder(run_dir) as folder:
        resume = first_makes(
            world(), lambda: begin_run(folder, _wanted(config, model, data, teacher), resume, data)
        )
        _run_stages(config, folder, model, data, teacher, process, console, resume, progress, memory_gb)
    return folder / "report.html"


def _wanted(config: RunConfig, model: nn.Module, data: Data, teacher: nn.Module | None) -> dict[str, Any]:
    """What config.json says of a run: its configuration, and what is in its model, data and teacher."""
    taught_by = None if teacher is None else fingerprint(teacher.state_dict())
    identity = {"model": fingerprint(model.state_dict()), "teacher": taught_by, **data_identity(data)}
    return config.to_dict() | {"identity": identity}


def _run_stages(
    config: RunConfig,
    run_dir: Path,
    model: nn.Module,
    data: Data,
    teacher: nn.Module | None,
    process: Accelerator,
    console: Console,
    resume: bool,
    progress: bool,
    memory_gb: float | None,
) -> None:
    _say(console, f"model {config.model}: {count(model)}; data {data.name}: {_size(data)}")
    for note in data.notes:
        _say(console, f"note: {note}")
    if teacher is not None:
        _say(console, f"teacher {config.teacher}")
    image_size = max(model.patch_embed.img_size)

    def stage(name: str, start: nn.Module, dense: nn.Module | None = None) -> nn.Module:
        settings = getattr(config.recipe, name)
        augment = Augment.preset(config.recipe.augment_of(name), image_size)
        _say(console, f"stage {name}: {counted(settings.epochs, 'epoch')}")
        trained = train(
            start, data, settings, stage=name, run_dir=run_dir, augment=augment,
            teacher=dense if teacher is None else teacher, resume=resume, progress=progress,
        )  # fmt: skip
        return trained.model

    def keep(name: str, finished: nn.Module) -> nn.Module:
        if process.is_main_process:
            save(finished, run_dir / f"{name}.safetensors", metadata={"data": Path(data.name).name})
        return finished.eval()

    dense = keep("dense", stage("dense", model) if "dense" in config.stages else model)
    models = {"dense": dense}
    if not config.one_shot:
        models["sparse"] = keep("sparse", stage("sparse", insert_gates(dense), dense))
    cut = _Cut(config, data, run_dir, resume, memory_gb, console, world())
    start = models.get("sparse", dense).to(process.device)
    cut.write(start)
    first_makes(world(), lambda: None)  # the others read what it writes
    models["pruned"] = cut.read(start)
    models["compact"] = keep("compact", stage("finetune", models["pruned"], dense))
    if process.is_main_process:
        _say(console, "comparing")
        results = _results(models, data, run_dir, config)
        if config.one_shot:
            alone = dataclasses.replace(cut, group=None)
            results["pareto"] = _pareto(models, alone.statistics(start))
        write_atomic(run_dir / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
        console.print(comparison_table(results))
        write_report(run_dir)
        save_pretrained(models["compact"], run_dir / "timm", metadata=_for_the_card(results, data))
        _say(console, f"report: {run_dir / 'report.html'}")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """From the dense model, or from the sparse-trained one, to the compact model before fine-tuning.

    The processes of a group share the images; the first chooses, says and writes. All of them and a resumed
    run go on with what it writes to the run folder: calibrated or refitted anew, on another number of threads
    or processes say, a model would not be the same to the last bit.
    """

    config: RunConfig
    data: Data
    run_dir: Path
    resume: bool
    memory_gb: float | None
    console: Console
    group: Group = None

    def write(self, start: nn.Module) -> None:
        """Write plan.json and pruned.safetensors, unless a run that is resumed has done so."""
        if first_makes(self.group, lambda: self._is_written(start)):
            return
        # On unlike machines the processes may have trained to other last bits; one model is cut.
        take_from_first(self.group, *start.state_dict().values())
        config = self.config
        statistics = self.statistics(start) if config.one_shot else None
        plan = first_makes(self.group, lambda: make_plan(start, statistics=statistics, **config.budget))
        _say(self.console, str(plan))
        options: dict[str, Any] = {}
        if config.one_shot or config.refit:
            options = {"images": self._images(start), "memory_gb": self.memory_gb}
        with share_bar(self.console, "refit") as bar:
            small = compact(start, plan, progress=bar, group=self.group, **options)
        if is_first(self.group):
            plan.save(self.run_dir / "plan.json")
            save(small, self._file, metadata={"data": Path(self.data.name).name})

    def read(self, start: nn.Module) -> CompactModel:
        """The compact model, where `start` is."""
        return load(self._file).to(next(start.parameters()).device).eval()

    def statistics(self, start: nn.Module) -> Statistics:
        """Of the dense model; from the run folder if it has them, else written there."""
        known = first_makes(self.group, lambda: self._known_statistics(start))
        if known is not None:
            return known
        images = calibration_count(self.data, self.config.images)
        size = tokens_size(describe(start), images, self.memory_gb)
        _say(self.console, f"calibrating on {size}")
        options: dict[str, Any] = {"memory_gb": self.memory_gb, "group": self.group}
        options["multi_label"] = is_multi_label(self.data)
        with share_bar(self.console, "calibration") as bar:
            found = calibrate(start, self._images(start), progress=bar, **options)
        if is_first(self.group):
            found.save(self._statistics_file)
        return found

    def _known_statistics(self, start: nn.Module) -> Statistics | None:
        if not self._statistics_file.is_file():
            return None
        found = Statistics.load(self._statistics_file)
        found.check_model(start)
        return found

    @property
    def _statistics_file(self) -> Path:
        return self.run_dir / "statistics.safetensors"

    @property
    def _file(self) -> Path:
        return self.run_dir / "pruned.safetensors"

    def _is_written(self, start: nn.Module) -> bool:
        """Whether the run that is resumed has left the cut of just this model, and its plan."""
        if not self.resume:
            self._statistics_file.unlink(missing_ok=True)  # of another run
            return False
        if not self._file.is_file() or not (self.run_dir / "plan.json").is_file():
            return False
        return load(self._file).plan.parent == fingerprint(start.state_dict())

    def _images(self, start: nn.Module) -> DataLoader:
        settings = self.config.recipe.finetune
        return calibration_images(
            start, self.data, self.config.images, seed=settings.seed, workers=settings.workers,
            group=self.group,
        )  # fmt: skip


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _size(data: Data) -> str:
    lengths = [
        counted(len(s), f"{split} image")
        for split, s in (("train", data.train), ("test", data.test))
        if hasattr(s, "__len__")
    ]
    return ", ".join(lengths) or "a stream"


def _open(config: RunConfig) -> tuple[nn.Module, Data, nn.Module | None]:
    """Model, data and teacher, which fit each other."""
    if kind_of(config.model) == GATED:
        raise ValueError(
            f"model: {other_kind(config.model, DENSE)}; a run that was interrupted continues with --resume"
        )
    data = open_data(config.data, root=config.data_root, class_map=config.class_map)
    seed = config.recipe.dense.seed
    classes = classes_of(data) if config.new_head else None
    model = open_model(
        config.model,
        from_scratch=config.from_scratch,
        num_classes=classes,
        seed=seed,
        checkpoint=config.checkpoint,
    )
    if isinstance(model, CompactModel):
        raise ValueError(
            f"model: {config.model} is cut already, expected a dense one; `vtp finetune {config.model}` "
            f"trains it further, and `vtp prune {config.model} --calibrate DATA` cuts it again"
        )
    fitted = fit_data(data, model)
    return model, fitted, teacher_for(model, data, config.teacher, config.teacher_checkpoint)


def teacher_for(
    model: nn.Module, data: Data, name: str | None, checkpoint: str | None = None
) -> nn.Module | None:
    """The model to distil from, None for the name None.

    Args:
        model: the student, which says what its classes are called.
        data: as they were opened; a teacher that does not say how its images are normalised has seen them so.
        name, checkpoint: as `open_teacher` takes them.

    Raises:
        FileError: there is no such teacher.
        ValueError: it has other classes than the student, or in another order.
    """
    if name is None:
        if checkpoint is not None:
            raise ValueError("teacher_checkpoint: without effect without --teacher MODEL")
        return None
    teacher = open_teacher(name, checkpoint=checkpoint)
    if not knows_normalisation(teacher):
        set_image_config(teacher, mean=data.mean, std=data.std)
    # Logits are compared place by place.
    theirs, names = class_names(teacher), class_names(model)
    if theirs is not None and names is not None and theirs != names:
        raise ValueError(
            "teacher: expected the model's classes in their order: the teacher has "
            f"{in_short(theirs)}; the model has {in_short(names)}"
        )
    if (count := getattr(teacher, "num_classes", model.num_classes)) != model.num_classes:
        raise ValueError(f"teacher: classes {count}, expected the model's {model.num_classes}")
    return teacher


def refuse_idle_teacher(recipe: Recipe, stages: Sequence[str]) -> None:
    """Raise ValueError where a teacher is asked in none of these stages."""
    if not any(getattr(recipe, stage).distill_alpha for stage in stages):
        weights = " and ".join(f"{stage}.distill_alpha" for stage in stages)
        are = "are" if len(stages) > 1 else "is"
        raise ValueError(
            f"teacher: it has no effect as {weights} {are} 0; add --set {stages[-1]}.distill_alpha=0.5"
        )


def classes_of(data: Data) -> int:
    """Number of classes for a new head. Raises DataError for a stream, which does not say it."""
    if data.num_classes is None:
        raise DataError(f"new_head: {data.name} does not say how many classes it has; --class-map names them")
    return data.num_classes


def fit_data(data: Data, model: nn.Module, *, subset: bool = False) -> Data:
    """The data with labels that are the model's outputs and images as it expects them; checked.

    What the model does not say yet of its images and classes it takes from the data, for its files to say it.

    Args:
        subset: whether the data may have only some of the model's classes.

    Raises:
        DataError: the data cannot be used with this model.
    """
    if class_names(model) is None and not awaits_classes(model):
        synsets = imagenet_classes(model)
        if synsets is not None and data.class_names and set(data.class_names) <= set(synsets):
            set_imagenet_names(model)
            data = data.noting(
                "the model does not name its classes: taken to be ImageNet's, as the data's are"
            )
    fitted = match_classes(
        data.for_model(getattr(model, "pretrained_cfg", None)),
        class_names(model),
        descriptions=class_descriptions(model),
        is_new=awaits_classes(model),
        subset=subset,
    )
    check_data(fitted, model.num_classes)
    describe_images(model, fitted)
    return fitted


def describe_images(model: nn.Module, data: Data) -> None:
    """Let a model say of its images and classes, where it does not yet, what they are in these data."""
    fields = {name: getattr(data, name) for name in ("mean", "std", "crop_mode", "interpolation")}
    set_image_config(model, **fields)
    set_image_config(model, **image_config(model))
    if class_names(model) is None and data.class_names:
        set_image_config(model, label_names=data.class_names)


def _check_before_training(config: RunConfig, model: nn.Module, data: Data, processes: int) -> None:
    """Refuse now what would stop a later stage: the model, a budget no plan can meet, settings of a stage."""
    if config.teacher is not None:
        refuse_idle_teacher(config.recipe, config.stages)
    insert_gates(model)  # refuses a model that has some, or that is not supported
    cut = {"calibrated": config.one_shot, "refitted": config.one_shot or config.refit}
    first_makes(world(), lambda: check_budget(model, config.budget, **cut))
    for name in config.stages:
        check_stage(name, getattr(config.recipe, name), data, processes)


def check_stage(name: str, config: TrainConfig, data: Data, processes: int) -> None:
    """Refuse now what would stop a stage of training, on so many processes, once it begins.

    Raises:
        ValueError: a setting does not fit the machine, the data or another setting.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError(f"{name}.precision: got 'fp16', expected 'no' or 'bf16' as there is no GPU")
    wants_sharding(config, processes)
    images = len(data.train) if hasattr(data.train, "__len__") else None
    field, shares = ("batch_size", processes) if config.effective_batch is None else ("effective_batch", 1)
    wanted = getattr(config, field)
    if images is not None and wanted * shares > images:
        each = f" on each of {processes} processes" if shares > 1 else ""
        raise ValueError(
            f"{name}.{field}: got {wanted}{each}, expected at most {images // shares}, as there are "
            f"{counted(images, 'image')} to train on"
        )
    config.split(processes, images)


def _results(models: dict[str, nn.Module], data: Data, run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """Accuracy, cost, file size and latency of each model, and accuracy at other budgets."""
    titles = {
        "pruned": "compact before fine-tuning",
        "compact": "compact after",
        "optimized": "compact, optimized",
    }
    device = next(models["compact"].parameters()).device
    models = {name: model.to(device) for name, model in models.items()}
    dense = models["dense"]
    timed = models | {"optimized": optimize(models["compact"])}
    saved_as = {"optimized": "compact"}  # a packed model has no file of its own, and the same cost
    images = torch.randn(config.latency_batch, dense.in_chans, *dense.patch_embed.img_size, device=device)
    latency = interleaved_latency(timed, images)
    rows = [
        {
            "model": titles.get(name, name),
            "top1": evaluate(model, data)[0],
            **dataclasses.asdict(count(models[saved_as.get(name, name)])),
            "file_bytes": (run_dir / f"{saved_as.get(name, name)}.safetensors").stat().st_size,
            "latency_ms": latency[name].median_ms,
            "speedup": latency[name].speedup,
        }
        for name, model in timed.items()
    ]
    environment_ = environment() | {"latency_batch": config.latency_batch, "device": str(device)}
    results = {"rows": rows, "environment": environment_}
    if "sparse" in models:
        results["reslice"] = _reslice(models["sparse"], data, config)
    return results


def _for_the_card(results: dict[str, Any], data: Data) -> dict[str, str]:
    """What a run has measured, for the model card: accuracy on the way, and latency."""
    top1 = {row["model"]: f"{row['top1']:.2f}" for row in results["rows"]}
    ms = {row["model"]: f"{row['latency_ms']:.2f}" for row in results["rows"]}
    about = results["environment"]
    return {
        "top-1": (
            f"{top1['compact after']} after fine-tuning, {top1['compact before fine-tuning']} at the cut, "
            f"{top1['dense']} dense; test images of {Path(data.name).name}"
        ),
        "milliseconds": (
            f"{ms['compact, optimized']} by vtp.optimize, {ms['compact after']} by PyTorch, which takes "
            f"{ms['dense']} for the dense model; batch {about['latency_batch']}, {about['device']}, "
            f"{about['cpu']}, {counted(about['threads'], 'thread')}, torch {about['torch']}, {about['date']}"
        ),
    }


def _pareto(models: dict[str, nn.Module], statistics: Statistics) -> dict[str, Any]:
    """The front that the calibration predicts, and where on it the model of this run is."""
    plan = models["pruned"].plan
    options = {"round_to": plan.round_to, "min_keep": plan.min_keep}
    points = pareto(models["dense"], statistics, points=PARETO_POINTS, **options)
    return {
        "change": statistics.change,
        "points": [{"macs": p.macs, "params": p.params, "change": p.change} for p in points],
        "chosen": {"macs": plan.cost.macs, "params": plan.cost.params, "change": plan.predicted_change},
    }


def _reslice(sparse: nn.Module, data: Data, config: RunConfig) -> list[dict[str, Any]]:
    """Cost and accuracy of the one sparse run cut at other rates, without training."""
    others = ("rate", "macs", "params", "latency_ms", "latency_table", "key_width")
    settings = {name: value for name, value in config.budget.items() if name not in others}
    points = []
    for rate in RESLICE_RATES:
        try:
            small = compact(sparse, make_plan(sparse, rate=rate, **settings))
        except PlanError:  # more than min_keep lets go
            break
        points.append({"rate": rate, **dataclasses.asdict(count(small)), "top1": evaluate(small, data)[0]})
    return points
