"""The command line: `vtp run` and its stages one by one."""

import argparse
import contextlib
import dataclasses
import functools
import json
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader

from vtp import checkpoint
from vtp.comparison import exported, own_model
from vtp.comparison.comparison import Budget
from vtp.comparison.runtimes import DTYPES
from vtp.comparison.tables import print_table, reasons, runtimes_table
from vtp.files import FileError, refuse_unwritable, write_atomic
from vtp.group import first_makes, is_first, started_as_first, world
from vtp.machine import description, in_one_line
from vtp.model.architecture import describe
from vtp.model.cost import count
from vtp.model.images import (
    class_descriptions,
    class_names,
    image_config,
    knows_normalisation,
    new_head,
    set_image_config,
    set_imagenet_names,
)
from vtp.options import positive, thread_count
from vtp.pipeline import RunConfig, classes_of, describe_images, fit_data, run
from vtp.pruning.calibration import Statistics, calibrate
from vtp.pruning.compact import CompactModel, compact
from vtp.pruning.expand import expand
from vtp.pruning.gates import insert_gates, sites
from vtp.pruning.latency_table import make_cache_folder, store_table
from vtp.pruning.one_shot import IMAGES, check_budget, check_images, tokens_size
from vtp.pruning.plan import PruningPlan
from vtp.pruning.scores import SCOPES, SCORES
from vtp.pruning.selection import make_plan
from vtp.recipes import RECIPES, STAGES, Recipe, short_recipe_for
from vtp.run_folder import run_folder
from vtp.runtime.export import TARGETS, ExportError
from vtp.runtime.export.onnx import OPSET, OPSETS
from vtp.runtime.latency_profile import profile_widths
from vtp.training.classes import in_short
from vtp.training.config import TrainConfig
from vtp.training.data import EMBEDDED, Data, DataError, check_data, open_data
from vtp.training.evaluation import NonFiniteLossError, evaluate
from vtp.training.frozen import NEIGHBOURS, evaluate_features
from vtp.training.loaders import calibration_count, calibration_images, test_loader
from vtp.training.loop import TrainingInterrupted, train
from vtp.training.progress import share_bar
from vtp.training.ranks import accelerator, blame, exit_now, rank
from vtp.training.sharding import wants_sharding
from vtp.training.signals import Terminated, ignore_signals, raised_signals
from vtp.training.sources import open_images
from vtp.training.sparsity import gate_statistics
from vtp.training.state import STATE_FORMAT
from vtp.training.transforms import Augment, image_pipeline
from vtp.zoo import FASHION_DEIT, open_model, open_teacher, open_without_weights

_console = Console(highlight=False, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 training failed, 2 bad input, 128 + signal.

    Of several processes that end by one error one says so, and names its rank.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(), raised_signals():
            warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, set())
            options.command(options)
    except TrainingInterrupted as error:  # which all ranks have agreed on
        if rank() is not None:
            ignore_signals()
        if not rank():
            print(f"vtp: {error}", file=sys.stderr)
        return 128 + error.signum
    except (Exception, KeyboardInterrupt, Terminated) as error:
        said = _said_of(error, hasattr(options, "resume"))
        if rank() is not None:
            _end_rank(error, said)
        if said is None:
            raise
        print(f"vtp: {said.text}", file=sys.stderr)
        return said.status
    return 0


class _Said(NamedTuple):
    """What a command that fails says, and its exit status."""

    text: str
    status: int


def _said_of(error: BaseException, resumable: bool) -> _Said | None:
    """Of an error that a user can do something about; None of others, which want a traceback."""
    if isinstance(error, NonFiniteLossError):
        return _Said(f"error: {error}", 1)
    if isinstance(error, (KeyboardInterrupt, Terminated)):  # outside of training: there is nothing to save
        number = signal.Signals(getattr(error, "signum", signal.SIGINT))
        hint = "; a run continues with --resume" if resumable else ""
        by = f" by {number.name}" if isinstance(error, Terminated) else ""
        return _Said(f"interrupted{by}{hint}", 128 + number)
    return _Said(f"error: {error}", 2) if isinstance(error, (ValueError, OSError)) else None


def _end_rank(error: BaseException, said: _Said | None) -> NoReturn:
    """End this process, one of several, with what is to be said of an error, unless another one says it."""
    ignore_signals()
    signalled = isinstance(error, (KeyboardInterrupt, Terminated))
    text, status = said or _Said(f"{type(error).__name__}: {error}", 1)
    loss = blame(text, status, certain=said is not None)
    if loss is not None and (said is None or signalled):  # a consequence
        if not rank() or loss.why is None:
            print(f"vtp: error: {loss}; rank {rank()} ends too", file=sys.stderr)
        exit_now(loss.status)
    if loss is None or loss.why != text:
        print(f"vtp: rank {rank()}: {text}", file=sys.stderr)
        if said is None:
            traceback.print_exception(error)
    exit_now(status)


def _show_warning(
    usual: Callable[..., None],
    said: set[str],
    message: Warning,
    category: type[Warning],
    filename: str,
    *rest: Any,
) -> None:
    """Warnings of our own as notes, each `said` once; others as usual, with the line of code that they are
    about."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parent):
        if str(message) not in said:
            said.add(str(message))
            _note(str(message))
    else:
        usual(message, category, filename, *rest)


def _note(text: str) -> None:
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
        recipe=_recipe(options),
        model=options.model,
        data=options.data,
        data_root=options.data_root,
        class_map=options.class_map,
        from_scratch=options.from_scratch,
        new_head=options.new_head,
        budget=_budget(options, calibrated=options.one_shot),
        latency_batch=options.latency_batch,
        one_shot=options.one_shot,
        refit=options.refit,
        images=options.images,
        checkpoint=options.checkpoint,
    )
    run(config, options.out, resume=options.resume, memory_gb=options.memory)


def _train(options: argparse.Namespace) -> None:
    accelerator()  # first, so that an error is said by one process of several
    recipe = _recipe(options)
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
    accelerator()
    recipe = _recipe(options)
    model = checkpoint.load(options.file)
    if not isinstance(model, CompactModel):
        raise FileError(
            f"file: {options.file} holds no compact model; `vtp prune` makes one from a gated model"
        )
    data = _open_data(options)
    if options.new_head:
        torch.manual_seed(recipe.finetune.seed)
        new_head(model, classes_of(data))
    _train_stage(options, recipe, "finetune", model, data)


def _train_stage(
    options: argparse.Namespace, recipe: Recipe, stage: str, model: nn.Module, data: Data
) -> None:
    if options.teacher is None and options.teacher_checkpoint is not None:
        raise ValueError("--teacher-checkpoint: without effect without --teacher NAME")
    teacher = None
    if options.teacher is not None:
        teacher = open_teacher(options.teacher, checkpoint=options.teacher_checkpoint)
        if not knows_normalisation(teacher):
            # One of ours, which was trained on images normalised as the data are.
            set_image_config(teacher, mean=data.mean, std=data.std)
    data = _fit_data(data, model)
    settings: TrainConfig = getattr(recipe, stage)
    if teacher is not None:
        _refuse_other_classes(teacher, model)
        _console.print(f"teacher {options.teacher}: {_images_and_classes(teacher)}")
    if teacher is not None and not settings.distill_alpha:
        raise ValueError(
            f"--teacher: it has no effect as {stage}.distill_alpha is 0; add --set {stage}.distill_alpha=0.5"
        )
    if teacher is None and settings.distill_alpha:
        settings = dataclasses.replace(settings, distill_alpha=0.0)
    processes = accelerator(settings.precision).num_processes
    wants_sharding(settings, processes)  # refuses, as the next line does, before anything is written
    settings.split(processes)
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
    for name in _WITH_CALIBRATION:
        if getattr(options, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')}: without effect without --calibrate DATA")
    gated = checkpoint.load(options.file)
    if not _is_gated(gated):
        raise ValueError(
            f"file: {options.file} has no gates; train some (`vtp train sparse`), or cut a dense model with "
            "--calibrate DATA"
        )
    plan = make_plan(gated, **_budget(options))
    small = compact(gated, plan)
    checkpoint.save(small, options.out)
    if options.plan is not None:
        plan.save(options.plan)
    _console.print(f"{plan}\nwrote {options.out}")


def _prune_calibrated(options: argparse.Namespace) -> None:
    """From a dense or gated model and images to a compact one, without training.

    Several processes share the images, of the evaluation too; the first chooses, says and writes.
    """
    check_images(options.images or IMAGES)
    process, group = _joined(), world()
    files = filter(None, (options.out, options.plan, options.statistics))
    first_makes(group, lambda: [refuse_unwritable(file) for file in files])
    model = open_model(options.file, checkpoint=options.checkpoint)
    if isinstance(model, CompactModel):
        model = _expanded(model, options.file)
    data, budget = _calibration_data(options, model), _budget(options, calibrated=True)
    first_makes(group, lambda: check_budget(model, budget, calibrated=True, refitted=True))
    loader = calibration_images(
        model, data, options.images or IMAGES, seed=options.seed or 0, workers=options.workers or 0,
        group=group,
    )  # fmt: skip
    model = model.to(_device(process)).eval()
    statistics = _statistics(options, model, data, loader)
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
        _console.print(f"statistics of {found.images:,} images from {file}")
    images = calibration_count(data, options.images or IMAGES)
    _console.print(tokens_size(describe(model), images, options.memory))
    if found is not None:
        return found
    with share_bar(_console, "calibration") as bar:
        found = calibrate(model, loader, memory_gb=options.memory, progress=bar, group=group)
    if file is not None and is_first(group):
        found.save(file)
    return found


def _known_statistics(options: argparse.Namespace, model: nn.Module) -> Statistics | None:
    """From --statistics; None where there is no such file."""
    if options.statistics is None or not Path(options.statistics).exists():
        return None
    found = Statistics.load(options.statistics)
    try:
        found.check_model(model)
    except ValueError as error:
        raise FileError(
            f"--statistics: {options.statistics} is of another model than {options.file}"
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
        _note(note)
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
    model = open_model(options.file).float().eval()
    if model.num_classes < 1:
        raise FileError(f"file: {options.file} has no classes: its outputs are features")
    if not knows_normalisation(model):
        raise FileError(
            f"file: {options.file} does not say how its images are normalised; say it once: model = "
            "vtp.load(FILE); model.pretrained_cfg = {'mean': ..., 'std': ..., 'label_names': ...}; "
            "vtp.save(model, FILE)"
        )
    pipeline = image_pipeline(image_config(model))
    if class_names(model) is None:
        set_imagenet_names(model)
        guess = "numbered from 0" if class_names(model) is None else "taken to be ImageNet's, as timm does"
        _note(f"{options.file} does not name its classes: {guess}")
    names, words = class_names(model), class_descriptions(model)
    unread: list[str] = []
    for path in options.images:
        try:
            (image,) = open_images([path])
        except DataError as error:  # the others are predicted nevertheless
            unread.append(str(error))
            continue
        with torch.inference_mode():
            probabilities = model(pipeline.batch([pipeline.pixels(image)]))[0].float().softmax(dim=0)
        if not probabilities.isfinite().all():
            raise ValueError(f"file: {options.file} gives NaN or infinite outputs, expected finite ones")
        _console.print(f"{path}:")
        best = probabilities.topk(min(5, len(probabilities)))
        for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            name = f"class {label}" if names is None else names[label]
            more = "" if words is None or words[label] == name else f" ({words[label]})"
            _console.print(f"  {probability:7.2%}  {name}{more}")
    if unread:
        raise DataError("; ".join(unread))


@_once
def _bench(options: argparse.Namespace) -> None:
    if options.json is not None:
        try:
            refuse_unwritable(options.json)
        except FileError as error:
            raise ValueError(f"--json: {error}") from error
    torch.set_num_threads(options.threads)
    if options.profile_widths:
        _profile_widths(options)
        return
    small = checkpoint.load(options.model)
    if not isinstance(small, CompactModel):
        raise FileError(
            f"model: {options.model} holds no compact model; `vtp prune` makes one from a gated model"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = small.float().eval().to(device)
    budget = Budget(rounds=options.rounds, seconds=options.seconds, warm_up_seconds=5.0)
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
        f"{table.rounds} rounds on {table.engine}: the dense model takes {table.predict(dense):.2f} ms for a "
        f"batch of {options.batch}\n"
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
    named = Path(options.file)
    default = named.with_suffix("") if named.is_file() else _bare_name(options.file)
    out = Path(options.out or f"{default}{target.suffix}")
    refuse_unwritable(out)
    torch.set_num_threads(options.threads)
    model = open_model(options.file).float().eval()
    if _is_gated(model):
        raise FileError(f"file: {options.file} has gates; cut it first, with `vtp prune`")
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
    if path.suffix == ".json":
        _console.print(str(PruningPlan.load(path)))
        return
    state = _training_state(path)
    if state is not None:
        _console.print(_training_summary(path, state))
        return
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
        _note(note)
    return fitted


def _refuse_other_classes(teacher: nn.Module, model: nn.Module) -> None:
    """Logits are compared place by place: a teacher with other classes, or in another order, misleads."""
    theirs, names = class_names(teacher), class_names(model)
    if theirs is not None and names is not None and theirs != names:
        raise ValueError(
            "--teacher: expected the model's classes in their order: the teacher has "
            f"{in_short(theirs)}; the model has {in_short(names)}"
        )


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


def _is_gated(model: nn.Module) -> bool:
    with contextlib.suppress(ValueError):
        return bool(sites(model))
    return False


def _training_state(path: Path) -> dict[str, Any] | None:
    """The header of a training checkpoint; None if the file is something else."""
    if not path.is_file():
        raise FileError(f"path: no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(STATE_FORMAT)
    except (OSError, SafetensorError) as error:
        raise FileError(f"path: {path} is no safetensors file, or it is cut off ({error})") from error
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"path: the training state in {path} is damaged ({error})") from error


def _training_summary(path: Path, state: dict[str, Any]) -> str:
    try:
        identity, position = state["identity"], state["position"]
        done, epochs = position["epoch"], identity["config.epochs"]
        place = f"{done} of {epochs} epochs done, finished"
        if done < epochs:
            place = (
                f"{done} of {epochs} epochs done, next step {position['step'] + 1} of {identity['steps']}; "
                "continue with --resume"
            )
        return f"training state of stage {identity['stage']}: {place}\n{json.dumps(identity, indent=1)}"
    except (KeyError, TypeError) as error:
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


def _recipe(options: argparse.Namespace) -> Recipe:
    """The recipe with the common options and every --set applied to it."""
    usual = short_recipe_for(options.data) if getattr(options, "one_shot", False) else "small"
    recipe = RECIPES[options.recipe or usual]()
    if options.augment is not None:
        recipe = dataclasses.replace(recipe, augment=options.augment, finetune_augment=None)
    common = {name: getattr(options, name) for name in _COMMON_SETTINGS if getattr(options, name) is not None}
    changes: dict[str, dict[str, Any]] = {stage: dict(common) for stage in STAGES}
    for setting in options.set:
        stage, field, value = _parse_setting(setting)
        changes[stage][field] = value
    stages = {stage: dataclasses.replace(getattr(recipe, stage), **changes[stage]) for stage in STAGES}
    return dataclasses.replace(recipe, **stages)


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    """ "sparse.epochs=8" to ("sparse", "epochs", 8)."""
    name, equals, text = setting.partition("=")
    stage, _, field = name.partition(".")
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    if not equals or stage not in STAGES or field not in fields:
        raise ValueError(
            f"--set: got {setting!r}, expected STAGE.FIELD=VALUE with a stage of {', '.join(STAGES)} and a "
            f"field of {', '.join(fields)}"
        )
    try:
        return stage, field, json.loads(text)
    except ValueError:
        return stage, field, text  # a word, such as bf16


def _budget(options: argparse.Namespace, *, calibrated: bool = False) -> dict[str, Any]:
    """Arguments of `make_plan`; what was not given is decided by whether there are statistics."""
    budget = {
        name: getattr(options, name)
        for name in ("rate", "macs", "params", "latency_ms")
        if getattr(options, name) is not None
    }
    ranking = {name: getattr(options, name) for name in ("per_mac", "round_to", "min_keep")}
    usual = {"score": None, "scope": "optimal"} if calibrated else {"score": "gate", "scope": "global"}
    for name in ("score", "scope", "key_width"):
        value = getattr(options, name)
        if value is None:
            value = usual.get(name)
        if value is not None:
            ranking[name] = value
    if options.keep:
        ranking["protect"] = options.keep
    return {**(budget or {"rate": 0.4}), **ranking}


# ------------------------------------------------------------------------------------------------ arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtp", description="Prune a vision transformer, and actually run it faster."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_train(commands)
    _add_prune(commands)
    _add_finetune(commands)
    _add_eval(commands)
    _add_predict(commands)
    _add_bench(commands)
    _add_export(commands)
    _add_inspect(commands)
    return parser


def _command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], None], help: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _add_run(commands: Any) -> None:
    parser = _command(
        commands, "run", _run, "sparse training, cut, fine-tuning, comparison and report",
        "vtp run --model deit_base_patch16_224 --data /data/imagenet --recipe deit --out runs/deit_b",
    )  # fmt: skip
    _model_options(parser)
    _data_options(parser)
    _training_options(parser)
    _budget_options(parser)
    parser.add_argument(
        "--latency-batch", type=int, default=64, help="images per pass when latency is compared"
    )
    parser.add_argument(
        "--one-shot", action="store_true",
        help="calibrate and refit in closed form instead of sparse training, then a short recovery",
    )  # fmt: skip
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=RunConfig.refit,
        help="refit the sparse-trained model in closed form after the cut, before fine-tuning",
    )  # fmt: skip
    parser.add_argument("--images", type=positive(int), default=IMAGES, help=_IMAGES_HELP)
    parser.add_argument("--memory", type=positive(float), metavar="GB", help=_MEMORY_HELP)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", _train, "one stage: a dense model, or sparse training of a gated one",
        "vtp train sparse --model runs/demo/dense.safetensors --set sparse.epochs=8 --out runs/sparse",
    )  # fmt: skip
    parser.add_argument("stage", choices=("dense", "sparse"))
    _model_options(parser)
    _data_options(parser)
    _training_options(parser)
    _teacher_option(parser)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands, "prune", _prune, "cut a dense or sparse-trained model to a budget, without training",
        "vtp prune deit_base_patch16_224 --calibrate /data/imagenet --macs 10e9 --out small.safetensors",
    )  # fmt: skip
    parser.add_argument(
        "file",
        help="a gated model, such as sparse.safetensors of a run; with --calibrate dense and compact ones "
        f"too: {FASHION_DEIT!r}, a timm model name, hf:OWNER/NAME or hf:FOLDER, or a file of ours",
    )
    parser.add_argument("--out", required=True, help="file for the compact model")
    parser.add_argument("--plan", help="also write the plan as JSON to this file")
    _budget_options(parser)
    group = parser.add_argument_group("calibration, on unlabelled training images")
    group.add_argument(
        "--calibrate",
        metavar="DATA",
        help="measure on these data (as --data of `vtp run` takes them) what a cut may take, and refit what "
        "is left",
    )
    group.add_argument("--checkpoint", metavar="FILE", help=_CHECKPOINT_HELP)
    group.add_argument("--data-root", help=_DATA_ROOT_HELP)
    group.add_argument("--class-map", metavar="FILE", help=_CLASS_MAP_HELP)
    group.add_argument("--images", type=positive(int), help=_IMAGES_HELP)
    group.add_argument("--seed", type=int, help="which images are drawn (default 0)")
    group.add_argument("--workers", type=int, help="processes that load images (default 0)")
    group.add_argument("--memory", type=positive(float), metavar="GB", help=_MEMORY_HELP)
    group.add_argument(
        "--statistics", metavar="FILE", help="what calibration found: read if there is one, else written"
    )
    group.add_argument(
        "--no-eval", action="store_true", help="no top-1 before and after; labels are not looked at"
    )


def _add_finetune(commands: Any) -> None:
    parser = _command(
        commands, "finetune", _finetune, "fine-tune a compact model",
        "vtp finetune small.safetensors --teacher runs/demo/dense.safetensors --out runs/small",
    )  # fmt: skip
    parser.add_argument("file", help="a compact model")
    parser.add_argument("--new-head", action="store_true", help="a new head for the data's classes")
    _data_options(parser)
    _training_options(parser)
    _teacher_option(parser)


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", _eval, "accuracy and cost of a model",
        "vtp eval --model runs/demo/compact.safetensors",
    )  # fmt: skip
    parser.add_argument("--model", default=FASHION_DEIT, help=_MODEL_HELP)
    parser.add_argument("--checkpoint", metavar="FILE", help=_CHECKPOINT_HELP)
    _data_options(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    group = parser.add_argument_group(
        "frozen features, of models with and without a head", "of training images with any classes; no top-1"
    )
    group.add_argument(
        "--knn", type=positive(int), nargs="?", const=NEIGHBOURS, metavar="K",
        help=f"accuracy by the vote of the K (default {NEIGHBOURS}) nearest training images",
    )  # fmt: skip
    group.add_argument(
        "--linear-probe", action="store_true", help="accuracy of a logistic regression of the features"
    )


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands, "predict", _predict, "the most probable classes of images",
        "vtp predict runs/demo/compact.safetensors cat.jpg dog.webp",
    )  # fmt: skip
    parser.add_argument("file", help=f"{FASHION_DEIT!r}, a timm model name, hf:NAME, or a file of ours")
    parser.add_argument("images", nargs="+", help="image files")


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", _bench, "time a compact model by every runtime, and say whether pruning paid",
        "vtp bench runs/demo/compact.safetensors --batch 8",
    )  # fmt: skip
    parser.add_argument("model", help="a file with a compact model; to profile, any file or model name")
    parser.add_argument("--batch", type=positive(int), default=1, help="images in a call (default 1)")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32"], help="default float32")
    parser.add_argument("--rounds", type=positive(int), default=30, help="at most (default 30)")
    parser.add_argument("--seconds", type=positive(float), default=60.0, help="budget of them (default 60)")
    parser.add_argument(
        "--threads", type=thread_count, default=torch.get_num_threads(), help="CPU threads (default: all)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--json", help="also write all times to this file")
    parser.add_argument(
        "--profile-widths", action="store_true",
        help="instead: measure time against width on this machine, for budgets in milliseconds",
    )  # fmt: skip


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "write a model for another runtime, checked by that runtime",
        "vtp export runs/demo/compact.safetensors --to onnx --out small.onnx",
    )  # fmt: skip
    parser.add_argument("file", help=f"a file of ours, {FASHION_DEIT!r}, a timm model name or hf:NAME")
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument("--out", help="file to write (default: FILE with the suffix of the format)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="that it computes in; OpenVINO: that it stores weights in (default float32)",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default {OPSET})")
    parser.add_argument(
        "--data", default=EMBEDDED, help=f"to check outputs on, as for `vtp eval` (default {EMBEDDED!r})"
    )
    parser.add_argument("--data-root", help=_DATA_ROOT_HELP)
    parser.add_argument(
        "--batch", type=positive(int), default=1, help="images in a call that is timed (default 1)"
    )
    parser.add_argument("--seconds", type=positive(float), default=8.0, help="of timing (default 8)")
    parser.add_argument(
        "--threads", type=thread_count, default=torch.get_num_threads(), help="CPU threads (default: all)"
    )


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", _inspect, "show what a file of ours holds",
        "vtp inspect runs/demo/compact.safetensors",
    )  # fmt: skip
    parser.add_argument(
        "file",
        help="a model, a training checkpoint or a plan.json; or a timm model name, hf-hub:OWNER/NAME, "
        "local-dir:FOLDER or hf:NAME, of which no weights are read",
    )


# Of TrainConfig, with options of their own that are for all stages.
_COMMON_SETTINGS = (
    "seed", "batch_size", "effective_batch", "precision", "workers", "fsdp", "grad_checkpointing", "compile",
)  # fmt: skip
_WITH_CALIBRATION = (
    "checkpoint", "data_root", "class_map", "images", "seed", "workers", "memory", "statistics", "no_eval",
    "key_width",
)  # fmt: skip
_DATA_ROOT_HELP = (
    "folder of data sets that timm or torchvision open by name, or address of one of webdataset shards; "
    "folder to fetch the shards of mds:// into"
)
_CLASS_MAP_HELP = (
    "text file with one class name a line, in the order of the labels (default: that of the model's classes, "
    "or of the folders' names as text)"
)
_IMAGES_HELP = f"training images that calibration and refit take (default {IMAGES})"
_MEMORY_HELP = "what their tokens may take; the rest lies in a temporary file (default: no limit)"
_MODEL_HELP = (
    f"{FASHION_DEIT!r} (default); a timm model name, also as timm/NAME, hf-hub:OWNER/NAME or "
    "local-dir:FOLDER; hf:OWNER/NAME or hf:FOLDER of Hugging Face's transformers; or a file of ours"
)
_CHECKPOINT_HELP = (
    "weights for a timm model name: a checkpoint of DeiT's or timm's training (of several sets the averaged "
    "one), torch.save(model.state_dict(), FILE), or plain safetensors; no pickle is executed"
)


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=FASHION_DEIT, help=_MODEL_HELP)
    parser.add_argument("--checkpoint", metavar="FILE", help=_CHECKPOINT_HELP)
    parser.add_argument("--from-scratch", action="store_true", help="new weights, trained first")
    parser.add_argument(
        "--new-head", action="store_true", help="a new head for the data's classes, trained first"
    )


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=EMBEDDED,
        help=f"{EMBEDDED!r} (default, in the package), a folder of idx files, an image folder with train/ "
        "and val/ (eval: val/ is enough), a folder or pattern of webdataset shards "
        "('set-{train,val}-*.tar'), mds://FOLDER (MosaicML Streaming), or a name that "
        "timm.data.create_dataset knows",
    )
    parser.add_argument("--data-root", help=_DATA_ROOT_HELP)
    parser.add_argument("--class-map", metavar="FILE", help=_CLASS_MAP_HELP)


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="run folder")
    parser.add_argument(
        "--resume", action="store_true", help="continue what was interrupted in the run folder"
    )
    parser.add_argument(
        "--recipe", choices=RECIPES,
        help="training settings (default small; with --one-shot short, or short-deit for image folders)",
    )  # fmt: skip
    parser.add_argument("--augment", choices=("none", "light", "deit"), help="instead of the recipe's")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch-size", type=int, help="images of a pass of a process")
    parser.add_argument(
        "--effective-batch", type=int, metavar="IMAGES",
        help="images of an update on any number of processes, in as many passes of at most --batch-size as "
        "that takes (default: one pass of every process)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"))
    parser.add_argument("--workers", type=int, help="processes that load images")
    group = parser.add_argument_group("large models, and speed")
    group.add_argument(
        "--fsdp", action="store_true", default=None,
        help="shard weights, gradients and optimizer state over the processes (FSDP2)",
    )  # fmt: skip
    group.add_argument(
        "--grad-checkpointing", action="store_true", default=None,
        help="compute blocks again in the backward pass instead of keeping what they computed",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", default=None, help="train through torch.compile")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="any training setting, e.g. sparse.l1=3e-4 or finetune.epochs=30; can be repeated",
    )


def _teacher_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--teacher",
        help="model to distil from: any timm name, such as regnety_160.deit_in1k, hf:NAME, or a file of "
        "ours; without it there is no distillation",
    )
    parser.add_argument(
        "--teacher-checkpoint",
        metavar="FILE",
        help="your own weights for a teacher of a timm name: a checkpoint of DeiT's or timm's training, or "
        "plain safetensors; no pickle is executed",
    )


def _budget_options(parser: argparse.ArgumentParser) -> None:
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--rate", type=float, help="share of dimensions to remove (default 0.4)")
    budget.add_argument("--macs", type=float, help="multiply-adds per image that may remain, e.g. 10e9")
    budget.add_argument("--params", type=float, help="parameters that may remain, e.g. 48e6")
    budget.add_argument(
        "--latency-ms", type=float,
        help="milliseconds that one image may take on this machine: see vtp bench MODEL --profile-widths",
    )  # fmt: skip
    parser.add_argument(
        "--score", choices=SCORES, help="what ranks the dimensions (default gate; calibrated obs)"
    )
    parser.add_argument(
        "--scope", choices=(*SCOPES, "optimal"),
        help="which dimensions compete (default global; calibrated optimal, the best widths there are)",
    )  # fmt: skip
    parser.add_argument(
        "--key-width", type=float,
        help="share (or number) of the query and key dimensions of every head that stay; takes a refit",
    )  # fmt: skip
    parser.add_argument("--per-mac", action="store_true", help="divide the score by the MACs it saves")
    parser.add_argument("--round-to", type=int, default=1, help="make widths a multiple of this")
    parser.add_argument(
        "--keep", nargs="+", action="extend", metavar="PART",
        help="parts that are never cut, such as attn, mlp.fc2 or blocks.0; the rest meets the budget",
    )  # fmt: skip
    parser.add_argument(
        "--min-keep", type=float, default=0.05, help="share (or number) of each gate vector that always stays"
    )


if __name__ == "__main__":
    sys.exit(main())
