"""What the commands do, each a function of the options that the parser has read: `COMMANDS`."""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import safe_open
from torch import nn
from torch.utils.data import DataLoader

from vtp import checkpoint
from vtp.arguments import WITH_CALIBRATION, budget_of, recipe_of
from vtp.choices import CALIBRATION_IMAGES, FASHION_DEIT
from vtp.comparison import exported, own_model
from vtp.comparison.comparison import Budget
from vtp.comparison.runtimes import DTYPES
from vtp.comparison.tables import print_table, reasons, runtimes_table
from vtp.files import FileError, refuse_unwritable, write_atomic
from vtp.group import first_makes, is_first, started_as_first, world
from vtp.hugging_face import PREFIX as TRANSFORMERS
from vtp.kinds import (
    COMPACT,
    DENSE,
    GATED,
    IMAGE,
    LATENCY_TABLE,
    PLAN,
    STATISTICS,
    TRAINING,
    Kind,
    kind_of,
    other_kind,
    refuse_other_kinds,
)
from vtp.machine import description, in_one_line
from vtp.model.architecture import describe
from vtp.model.cost import count
from vtp.model.images import (
    class_descriptions,
    class_names,
    image_config,
    knows_normalisation,
    new_head,
    set_imagenet_names,
)
from vtp.pipeline import (
    RunConfig,
    check_stage,
    classes_of,
    describe_images,
    fit_data,
    refuse_idle_teacher,
    run,
    teacher_for,
)
from vtp.pruning.calibration import Statistics, calibrate
from vtp.pruning.compact import CompactModel, compact
from vtp.pruning.expand import expand
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.latency_table import LatencyTable, make_cache_folder, store_table
from vtp.pruning.one_shot import check_budget, check_images, tokens_size
from vtp.pruning.plan import PlanError, PruningPlan
from vtp.pruning.selection import make_plan
from vtp.recipes import Recipe
from vtp.run_folder import run_folder
from vtp.runtime.export import TARGETS, ExportError
from vtp.runtime.latency_profile import profile_widths
from vtp.training.classes import in_short
from vtp.training.config import TrainConfig
from vtp.training.data import Data, DataError, check_data, is_multi_label, open_data
from vtp.training.evaluation import evaluate
from vtp.training.frozen import evaluate_features
from vtp.training.loaders import calibration_count, calibration_images, test_loader
from vtp.training.loop import train
from vtp.training.progress import share_bar
from vtp.training.ranks import accelerator
from vtp.training.sources import open_images
from vtp.training.sparsity import gate_statistics
from vtp.training.state import STATE_FORMAT
from vtp.training.transforms import Augment, image_pipeline
from vtp.words import counted
from vtp.zoo import open_model, open_without_weights, timm_name

_console = Console(highlight=False, markup=False, soft_wrap=True)


def say_note(text: str) -> None:
    """Say on stderr what a user should know; of several processes the first says it."""
    if not _console.quiet:
        print(f"vtp: note: {text}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ processes


def _joined() -> Accelerator | None:
    """Join the processes that torchrun has started beside this one, of which the first speaks; None where
    there are no others."""
    process = accelerator()
    _console.quiet = not process.is_main_process
    return process if process.num_processes > 1 else None


def _device(process: Accelerator | None) -> torch.device:
    """Where a model runs: on the GPU, of several processes each on one of its own; else on the CPU."""
    if process is not None:
        return process.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _once(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """A command that has nothing to share out: the first of several processes does it, and the others are
    done. So no two write one file."""

    @functools.wraps(command)
    def done_once(options: argparse.Namespace) -> None:
        if started_as_first():
            command(options)

    return done_once


# ------------------------------------------------------------------------------------------------ commands


def _run(options: argparse.Namespace) -> None:
    config = RunConfig(
        recipe=recipe_of(options),
        model=options.model,
        data=options.data,
        data_root=options.data_root,
        class_map=options.class_map,
        from_scratch=options.from_scratch,
        new_head=options.new_head,
        budget=budget_of(options, calibrated=options.one_shot),
        latency_batch=options.latency_batch,
        one_shot=options.one_shot,
        refit=options.refit,
        images=options.images,
        checkpoint=options.checkpoint,
        teacher=options.teacher,
        teacher_checkpoint=options.teacher_checkpoint,
    )
    run(config, options.out, resume=options.resume, memory_gb=options.memory)


def _train(options: argparse.Namespace) -> None:
    _joined()  # first, so that an error is said by one process of several
    recipe = recipe_of(options)
    data = _open_data(options)
    seed = recipe.dense.seed
    classes = classes_of(data) if options.new_head else None
    model = open_model(
        options.model,
        from_scratch=options.from_scratch,
        num_classes=classes,
        seed=seed,
        checkpoint=options.checkpoint,
    )
    if options.stage == "sparse" and isinstance(model, CompactModel):
        model = _expanded(model, options.model)
    if options.stage == "dense" and _is_gated(model):
        raise ValueError(f"--model: {options.model} has gates; the stage for it is sparse")
    if options.stage == "sparse" and not _is_gated(model):
        model = insert_gates(model)
    _train_stage(options, recipe, options.stage, model, data)


def _finetune(options: argparse.Namespace) -> None:
    _joined()
    recipe = recipe_of(options)
    model = _load(options.model, COMPACT)
    data = _open_data(options)
    if options.new_head:
        torch.manual_seed(recipe.finetune.seed)
        new_head(model, classes_of(data))
    _train_stage(options, recipe, "finetune", model, data)


def _train_stage(
    options: argparse.Namespace, recipe: Recipe, stage: str, model: nn.Module, data: Data
) -> None:
    opened, data = data, _fit_data(data, model)
    teacher = teacher_for(model, opened, options.teacher, options.teacher_checkpoint)
    settings: TrainConfig = getattr(recipe, stage)
    if teacher is None:
        settings = dataclasses.replace(settings, distill_alpha=0.0)
    else:
        _console.print(f"teacher {options.teacher}: {_images_and_classes(teacher)}")
        refuse_idle_teacher(recipe, (stage,))
    # Refuses before anything is written.
    check_stage(stage, settings, data, accelerator(settings.precision).num_processes)
    with run_folder(options.out) as run_dir:
        result = train(
            model, data, settings, stage=stage, run_dir=run_dir, resume=options.resume, teacher=teacher,
            augment=Augment.preset(recipe.augment_of(stage), max(model.patch_embed.img_size)),
        )  # fmt: skip
        if not accelerator(settings.precision).is_main_process:
            return
        file = run_dir / ("compact.safetensors" if stage == "finetune" else f"{stage}.safetensors")
        checkpoint.save(result.model, file, metadata={"top1": result.top1, "data": Path(data.name).name})
    precision = result.history[-1].get("test_map")
    several = "" if precision is None else f", mean average precision {precision:.2f}"
    _console.print(f"top-1 {result.top1:.2f}{several}; {count(result.model)}; wrote {file}")


def _prune(options: argparse.Namespace) -> None:
    if options.calibrate is not None:
        _prune_calibrated(options)
    else:
        _prune_gated(options)


@_once
def _prune_gated(options: argparse.Namespace) -> None:
    """Cut by the gates alone."""
    for name in WITH_CALIBRATION:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')}: without effect without --calibrate DATA")
    _refuse_unwritable(options, "out", "plan")
    gated = _load(options.model, GATED)
    with warnings.catch_warnings(record=True) as told:
        plan = make_plan(gated, **budget_of(options))
    small = compact(gated, plan)
    checkpoint.save(small, options.out)
    if options.plan is not None:
        plan.save(options.plan)
    _console.print(f"{plan}\nwrote {options.out}")
    _warn_again(told)


def _prune_calibrated(options: argparse.Namespace) -> None:
    """From a dense or gated model and images to a compact one, without training.

    Several processes share the images, of the evaluation too; the first chooses, says and writes.
    """
    check_images(options.images or CALIBRATION_IMAGES)
    process, group = _joined(), world()
    first_makes(group, lambda: _refuse_unwritable(options, "out", "plan", "statistics"))
    model = open_model(options.model, checkpoint=options.checkpoint)
    if isinstance(model, CompactModel):
        model = _expanded(model, options.model)
    data, budget = _calibration_data(options, model), budget_of(options, calibrated=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan itself warns of the same
        first_makes(group, lambda: check_budget(model, budget, calibrated=True, refitted=True))
    loader = calibration_images(
        model, data, options.images or CALIBRATION_IMAGES, seed=options.seed or 0,
        workers=options.workers or 0, group=group,
    )  # fmt: skip
    model = model.to(_device(process)).eval()
    statistics = _statistics(options, model, data, loader)
    with warnings.catch_warnings(record=True) as told:
        plan = first_makes(group, lambda: make_plan(model, statistics=statistics, **budget))
    with share_bar(_console, "refit") as bar:
        small = compact(model, plan, images=loader, memory_gb=options.memory, progress=bar, group=group)
    notes: dict[str, Any] = {"data": Path(data.name).name}
    accuracy = ""
    if not options.no_eval:
        with _console.status("evaluating"):
            workers = options.workers or 0
            before, after = (evaluate(m, data, workers=workers, process=process)[0] for m in (model, small))
        notes["top1"], accuracy = after, f"top-1 {before:.2f} before, {after:.2f} after\n"
    if not is_first(group):
        return
    checkpoint.save(small, options.out, metadata=notes)
    if options.plan is not None:
        plan.save(options.plan)
    _console.print(f"{plan}\n{accuracy}wrote {options.out}")
    _warn_again(told)


def _calibration_data(options: argparse.Namespace, model: nn.Module) -> Data:
    """The data as the model takes them; checked for their labels where these are used."""
    data = open_data(options.calibrate, root=options.data_root, class_map=options.class_map)
    if not options.no_eval:
        try:
            return _fit_data(data, model, subset=True)
        except DataError as error:
            raise DataError(f"{error}; --no-eval looks at no labels") from error
    data = data.for_model(getattr(model, "pretrained_cfg", None))
    describe_images(model, dataclasses.replace(data, class_names=()))
    return data


def _statistics(options: argparse.Namespace, model: nn.Module, data: Data, loader: DataLoader) -> Statistics:
    """From --statistics where there is such a file; else of the model and images, and saved there."""
    file, group = options.statistics, world()
    found = first_makes(group, lambda: _known_statistics(options, model))
    if found is not None:
        _console.print(f"statistics of {counted(found.images, 'image')} from {file}")
    images = calibration_count(data, options.images or CALIBRATION_IMAGES)
    _console.print(tokens_size(describe(model), images, options.memory))
    if found is not None:
        return found
    with share_bar(_console, "calibration") as bar:
        found = calibrate(
            model, loader, multi_label=is_multi_label(data), memory_gb=options.memory, progress=bar,
            group=group,
        )  # fmt: skip
    if file is not None and is_first(group):
        found.save(file)
    return found


def _known_statistics(options: argparse.Namespace, model: nn.Module) -> Statistics | None:
    """From --statistics; None where there is no such file."""
    if options.statistics is None or not Path(options.statistics).exists():
        return None
    with _naming("--statistics"):
        found = Statistics.load(options.statistics)
    try:
        found.check_model(model)
    except ValueError as error:
        raise FileError(
            f"--statistics: {options.statistics} is of another model than {options.model}"
        ) from error
    return found


def _eval(options: argparse.Namespace) -> None:
    process = _joined()
    model = open_model(options.model, checkpoint=options.checkpoint)
    if options.knn is not None or options.linear_probe:
        _eval_features(options, model, process)
        return
    data = _fit_data(_open_data(options, train=False), model, subset=True)
    model = model.to(_device(process)).eval()
    top1, loss = evaluate(model, data, workers=options.workers, process=process)
    _console.print(f"top-1 {top1:.2f}, cross-entropy {loss:.4f}; {count(model)}")


def _eval_features(options: argparse.Namespace, model: nn.Module, process: Accelerator | None) -> None:
    """What frozen features tell of the classes of any data, which need not be those of the model."""
    data = _open_data(options).for_model(getattr(model, "pretrained_cfg", None))
    for note in data.notes:
        say_note(note)
    if data.num_classes is not None:  # as a stream may not say
        check_data(data, data.num_classes)
    with _console.status("evaluating"):
        found = evaluate_features(
            model.to(_device(process)).eval(), data,
            k=options.knn, linear_probe=options.linear_probe, workers=options.workers, process=process,
        )  # fmt: skip
    if not found:  # the first of several processes has them
        return
    said = []
    if options.knn is not None:
        said.append(f"k-NN top-1 {found['knn']:.2f} (k {options.knn})")
    if options.linear_probe:
        said.append(f"linear probe top-1 {found['linear_probe']:.2f} (penalty {found['penalty']:g})")
    _console.print(f"{', '.join(said)}; {count(model)}")


@_once
def _predict(options: argparse.Namespace) -> None:
    model = open_model(options.model).float().eval()
    if model.num_classes < 1:
        raise FileError(f"model: {options.model} has no classes: its outputs are features")
    if not knows_normalisation(model):
        raise FileError(
            f"model: {options.model} does not say how its images are normalised; say it once: model = "
            "vtp.load(FILE); model.pretrained_cfg = {'mean': ..., 'std': ..., 'label_names': ...}; "
            "vtp.save(model, FILE)"
        )
    pipeline = image_pipeline(image_config(model))
    if class_names(model) is None:
        set_imagenet_names(model)
        guess = "numbered from 0" if class_names(model) is None else "taken to be ImageNet's, as timm does"
        say_note(f"{options.model} does not name its classes: {guess}")
    names, words = class_names(model), class_descriptions(model)
    unread: list[str] = []
    for path in options.images:
        try:
            (image,) = open_images([path])
        except DataError as error:  # the others are predicted nevertheless
            unread.append(other_kind(path, IMAGE) or str(error))
            continue
        with torch.inference_mode():
            probabilities = model(pipeline.batch([pipeline.pixels(image)]))[0].float().softmax(dim=0)
        if not probabilities.isfinite().all():
            raise ValueError(f"model: {options.model} gives NaN or infinite outputs, expected finite ones")
        _console.print(f"{path}:")
        best = probabilities.topk(min(5, len(probabilities)))
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name = f"class {label}" if names is None else names[label]
            more = "" if words is None or words[label] == name else f" ({words[label]})"
            _console.print(f"  {probability:7.2%}  {name}{more}")
    if len(unread) == 1:
        raise DataError(unread[0])
    if unread:
        of = f"{len(unread)} of {counted(len(options.images), 'image')} cannot be read"
        raise DataError("\n  ".join([f"{of}:", *unread]))


@_once
def _bench(options: argparse.Namespace) -> None:
    _refuse_unwritable(options, "json")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.profile_widths:
        _profile_widths(options)
        return
    small = _load(options.model, COMPACT)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = small.float().eval().to(device)
    budget = Budget(options.rounds, options.seconds, warm_up_seconds=min(5.0, options.seconds))
    with _console.status("") as status:
        record = own_model.compare(
            small, options.batch, options.dtypes, budget, compilers=options.compile, report=status.update
        )
    results = {**description(device), "file": Path(options.model).name, "models": record}
    ours = f"ours, {options.dtypes[0]}"
    print_table(
        _console, f"{options.model}: {count(small)}, batch {options.batch}", runtimes_table(record, ours)
    )
    for line in reasons(record):
        _console.print(line)
    for label in record["runtimes"]:
        if label.startswith("dense: "):
            _console.print(own_model.verdict(record, label.removeprefix("dense: ")))
    gain, attribution = own_model.realised(record, ours), []
    if gain is not None and gain[1] < own_model.PAID:
        brief = dataclasses.replace(budget, warm_up_seconds=0.5)
        results["branches"] = own_model.compare_branches(small, options.batch, options.dtypes[0], brief)
        attribution = own_model.attribution_table(small, results["branches"])
    if len(attribution) > 1:
        print_table(_console, "Where our engine loses most of what MACs promise", attribution)
    _console.print(f"measured on {in_one_line(results)}")
    if options.json is not None:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        write_atomic(options.json, lambda path: path.write_text(text, encoding="utf-8"))


def _profile_widths(options: argparse.Namespace) -> None:
    if options.json is not None or options.compile:
        raise ValueError("--json, --compile: without effect with --profile-widths")
    if len(options.dtypes) > 1:
        raise ValueError(f"--dtypes: got {options.dtypes}, expected one with --profile-widths")
    is_name = not Path(options.model).is_file()  # of which only the widths matter
    model = open_model(options.model, from_scratch=is_name)
    architecture = model.plan.architecture if isinstance(model, CompactModel) else describe(model)
    make_cache_folder()
    with Progress(console=_console, transient=True) as bar:
        task = bar.add_task("measuring", total=1.0)
        table = profile_widths(
            architecture,
            batch_size=options.batch,
            dtype=DTYPES[options.dtypes[0]],
            seconds=options.seconds,
            progress=lambda share: bar.update(task, completed=share),
        )
    file = store_table(table)
    dense = make_plan(insert_gates(architecture.build("cpu", weight_init="skip")), rate=0.0)
    _console.print(
        f"{counted(table.rounds, 'round')} on {table.engine}: the dense model takes "
        f"{table.predict(dense):.2f} ms for a batch of {options.batch}\n"
        f"wrote {file}; make_plan(gated, latency_ms=...) and `vtp prune --latency-ms` use it"
    )


@_once
def _export(options: argparse.Namespace) -> None:
    target, export = TARGETS[options.to]
    arguments: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    if options.opset is not None:
        if options.to != "onnx":
            raise ValueError(f"--opset: ONNX alone has one, got it with --to {options.to}")
        arguments["opset"] = options.opset
    try:
        target.check_packages()
    except ModuleNotFoundError as error:
        raise ValueError(f"--to: {error}") from error
    named = Path(options.model)
    default = named.with_suffix("") if named.is_file() else _bare_name(options.model)
    out = Path(options.out or f"{default}{target.suffix}")
    _refuse_unwritable(argparse.Namespace(model=options.model, out=out), "out")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if kind_of(options.model) == GATED:
        refuse_other_kinds(options.model, DENSE, COMPACT, name="model")
    model = open_model(options.model).float().eval()
    images = _images_to_check(options, model, max(options.batch, 5))
    with _console.status(f"writing {out} and checking it"):
        error = export(model, out, images=images, **arguments)
    _console.print(
        f"wrote {out}: {target.size(out):,} bytes; relative error {error:.1e} against float64, on 1 and on 5 "
        f"images of {Path(options.data).name}"
    )
    if not isinstance(model, CompactModel):
        return
    try:
        with _console.status("timing it beside the dense model"):
            rows = exported.beside_dense(
                model, target, out, functools.partial(export, **arguments),
                images[: options.batch].to(arguments["dtype"]), seconds=options.seconds,
            )  # fmt: skip
    except ExportError as failure:
        _console.print(f"not timed beside the dense model: {failure}")
        return
    print_table(_console, f"{exported.runtime_version(target)}, {options.dtype}", rows)
    _console.print("dense: the model before the cut, with random weights, as the file has no others")
    _console.print("speed: median of the ratios of two times of one round")
    _console.print(f"measured on {in_one_line(description(torch.device('cpu')))}")


def _bare_name(name: str) -> str:
    """Of a model's name what a file can be called by: hf:OWNER/NAME without hf: and OWNER."""
    return Path(name.rpartition(":")[2]).name


def _images_to_check(options: argparse.Namespace, model: nn.Module, count: int) -> torch.Tensor:
    """Test images as the model takes them, `count` or as many as there are."""
    data = open_data(options.data, root=options.data_root, train=False)
    data = data.for_model(getattr(model, "pretrained_cfg", None))
    patch = model.patch_embed
    size, channels = tuple(patch.img_size), patch.proj.in_channels
    loader = test_loader(data, image_size=size, in_chans=channels, batch_size=count)
    return next(iter(loader))[0]


@_once
def _inspect(options: argparse.Namespace) -> None:
    path = Path(options.file)
    if not path.exists() and path.suffix not in (".json", ".safetensors"):
        _inspect_named(options.file)
        return
    kind = kind_of(path)
    with _naming("model"):
        if kind == LATENCY_TABLE:
            _console.print(_table_summary(LatencyTable.load(path)))
        elif kind == PLAN or path.suffix == ".json":
            _console.print(str(PruningPlan.load(path)))
        elif kind == STATISTICS:
            _console.print(_statistics_summary(Statistics.load(path)))
        elif kind == TRAINING:
            _console.print(_training_summary(path))
        else:
            _inspect_model(path)


def _inspect_model(path: Path) -> None:
    description = checkpoint.read_metadata(path)
    model = checkpoint.load(path)
    versions = ", ".join(f"{name} {number}" for name, number in description["versions"].items())
    _console.print(f"{path}: {description['kind']} model, format {description['format_version']}, {versions}")
    _console.print(f"{count(model)}, {path.stat().st_size:,} bytes")
    baseline = (description["pretrained_cfg"] or {}).get("architecture")
    if baseline:
        _console.print(f"baseline: {baseline}")
    _console.print(_images_and_classes(model))
    for name, value in description["user"].items():
        _console.print(f"{name}: {value}")
    if isinstance(model, CompactModel):
        _console.print(f"cut from the model with fingerprint {model.plan.parent[:16]}\n{model.plan}")
    elif description["kind"] == "gated":
        _console.print(_gate_table(model), soft_wrap=False)
    else:
        _console.print(json.dumps(description["architecture"]))


def _inspect_named(name: str) -> None:
    """What is known of a model by its name, without its weights."""
    model = open_without_weights(name)
    _console.print(f"{name}: {count(model)}; its weights are not read")
    _console.print(_images_and_classes(model))
    if isinstance(model, CompactModel):
        _console.print(f"cut from the model with fingerprint {model.plan.parent[:16]}\n{model.plan}")
    else:
        _console.print(json.dumps(dataclasses.asdict(describe(model))))


# ------------------------------------------------------------------------------------------------ helpers


def _open_data(options: argparse.Namespace, *, train: bool = True) -> Data:
    return open_data(options.data, root=options.data_root, class_map=options.class_map, train=train)


def _fit_data(data: Data, model: nn.Module, *, subset: bool = False) -> Data:
    """`fit_data`, with what there is to say about the data on stderr."""
    fitted = fit_data(data, model, subset=subset)
    for note in fitted.notes:
        say_note(note)
    return fitted


def _images_and_classes(model: nn.Module) -> str:
    """What the file of a model says of its images and classes, in two lines."""
    config, names = image_config(model), class_names(model)
    size = "x".join(map(str, config["input_size"]))
    images = f"images: {size} (channels, height, width)"
    if knows_normalisation(model):
        mean, std = ("/".join(f"{value:.4g}" for value in config[name]) for name in ("mean", "std"))
        images += (
            f", mean {mean}, std {std}, {config['crop_mode']} crop of {config['crop_pct']:.1%}, "
            f"{config['interpolation']}"
        )
    else:
        images += "; how they are normalised is not known"
    known = "not known" if names is None else f"{len(names)}: {in_short(names)}"
    if getattr(model, "num_classes", None) == 0:
        known = "none, its outputs are features"
    return f"{images}\nclasses: {known}"


def _expanded(small: CompactModel, name: str) -> nn.Module:
    """A compact model as a dense one, to be cut again."""
    _console.print(f"{name} is cut already, {count(small)}: what is gone stays so, and counts as removed")
    return expand(small)


def _statistics_summary(found: Statistics) -> str:
    own = found.architecture
    return (
        f"statistics of {counted(found.images, 'image')}; changes are {found.change}, measured on "
        f"{found.change_images} of them\nof the model with fingerprint {found.parent[:16]}: "
        f"{counted(own.depth, 'block')} of width {own.embed_dim}, {counted(own.num_heads, 'head')}\n"
        "taken by `vtp prune MODEL --calibrate DATA --statistics FILE`"
    )


def _table_summary(table: LatencyTable) -> str:
    own = table.geometry
    return (
        f"time against width for a batch of {table.batch_size} in {table.dtype} on {table.engine}, "
        f"{counted(table.rounds, 'round')}, {table.date}\nof models of width {own['embed_dim']} with "
        f"{counted(own['num_heads'], 'head')}, of any depth\n{json.dumps(dict(table.machine))}"
    )


def _load(name: str, kind: Kind) -> nn.Module:
    """A model from a file, which has to be of this kind. Raises FileError, which says what to do instead."""
    if not Path(name).exists():
        if name != FASHION_DEIT and not name.startswith(TRANSFORMERS):
            timm_name(name)  # refuses what is no name
        use = DENSE.use.replace("FILE", name)
        raise FileError(f"model: {name} is no file, expected one with {kind.name}; {use}")
    with _naming("model"):
        refuse_other_kinds(name, kind)
        return checkpoint.load(name)


def _warn_again(told: Sequence[warnings.WarningMessage]) -> None:
    """Warn of what was recorded while a plan was made, behind the plan's table, which is long."""
    for each in told:
        warnings.showwarning(each.message, each.category, each.filename, each.lineno)


def _refuse_unwritable(options: argparse.Namespace, *names: str) -> None:
    """Raise FileError, which names the option, where a file that is to be written cannot be, is written by
    another option too, or is the model or its checkpoint, which would be lost."""
    taken = {}
    for name, shown in (("model", "MODEL"), ("checkpoint", "--checkpoint")):
        file = getattr(options, name, None)
        if file is not None and Path(file).is_file():
            taken[Path(file).resolve()] = shown
    for name in names:
        if (file := getattr(options, name)) is None:
            continue
        with _naming(f"--{name}"):
            refuse_unwritable(file)
        other = taken.setdefault(Path(file).resolve(), f"--{name}")
        if other != f"--{name}":
            raise FileError(f"--{name}: {file} is {other} too, expected a file of its own")


@contextlib.contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Let an error of a file name the argument that it came by."""
    try:
        yield
    except (FileError, PlanError) as error:
        raise type(error)(f"{argument}: {str(error).removeprefix('path: ')}") from error


def _is_gated(model: nn.Module) -> bool:
    with contextlib.suppress(ValueError):
        return bool(sites(model))
    return False


def _training_summary(path: Path) -> str:
    """How far a checkpoint of training has come, and the settings that it needs to go on."""
    with safe_open(path, framework="pt") as file:
        text = file.metadata()[STATE_FORMAT]
    try:
        state = json.loads(text)
        identity, position = state["identity"], state["position"]
        done, epochs = position["epoch"], identity["config.epochs"]
        place = f"{done} of {counted(epochs, 'epoch')} done, finished"
        if done < epochs:
            place = (
                f"{done} of {counted(epochs, 'epoch')} done, next step {position['step'] + 1} of "
                f"{identity['steps']}; continue with --resume"
            )
        return f"training state of stage {identity['stage']}: {place}\n{json.dumps(identity, indent=1)}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileError(f"path: the training state in {path} is damaged ({error!r})") from error


def _gate_table(model: nn.Module) -> Table:
    table = Table(title="gates |g|", title_justify="left")
    for column in ("site", "mean", "zero", "below half the mean"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for name, layer in sites(model).items():
        figures = gate_statistics([layer.gate], 0.0)
        shares = (f"{figures['gates_zero']:.1%}", f"{figures['gates_below']:.1%}")
        table.add_row(name, f"{figures['gates_mean']:.4f}", *shares)
    return table


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "run": _run,
    "train": _train,
    "prune": _prune,
    "finetune": _finetune,
    "eval": _eval,
    "predict": _predict,
    "bench": _bench,
    "export": _export,
    "inspect": _inspect,
}
