"""What the command line takes: the parser of all commands, and what options say together.

`make_parser` has the options of every command; `recipe_of` and `budget_of` make settings of training, and
arguments of `make_plan`, of several that belong together; `as_typed` names the option behind an error.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import json
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

from vtp.choices import (
    CALIBRATION_IMAGES,
    EMBEDDED,
    EXPORTED_DTYPES,
    FASHION_DEIT,
    NEIGHBOURS,
    OPSET,
    OPSETS,
    SCOPES,
    SCORES,
    TARGETS,
    TIMED_DTYPES,
)
from vtp.options import at_least_0, positive, thread_count
from vtp.recipes import RECIPES, STAGES, Recipe, short_recipe_for, stages_of_run
from vtp.training.config import TrainConfig

# Of TrainConfig, with options of their own that are for all stages.
_COMMON_SETTINGS = (
    "seed", "batch_size", "effective_batch", "precision", "workers", "fsdp", "grad_checkpointing", "compile",
)  # fmt: skip
# Of `vtp prune`, without effect where nothing is calibrated.
WITH_CALIBRATION = (
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
_IMAGES_HELP = f"training images that calibration and refit take (default {CALIBRATION_IMAGES})"
_MEMORY_HELP = "what their tokens may take; the rest lies in a temporary file (default: no limit)"
_MODEL_HELP = (
    f"{FASHION_DEIT!r} (default); a timm model name, also as timm/NAME, hf-hub:OWNER/NAME or "
    "local-dir:FOLDER; hf:OWNER/NAME or hf:FOLDER of Hugging Face's transformers; or a file of ours"
)
_CHECKPOINT_HELP = (
    "weights for a timm model name: a checkpoint of DeiT's or timm's training (of several sets the averaged "
    "one), torch.save(model.state_dict(), FILE), or plain safetensors; no pickle is executed"
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `command` of what it reads is the name of one."""
    parser = argparse.ArgumentParser(
        prog="vtp", description="Prune a vision transformer, and actually run it faster."
    )
    version = sys.modules["vtp"].__version__  # not imported: the package is above this file
    parser.add_argument("--version", action="version", version=f"vtp {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
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


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps names such as hf-hub:OWNER/NAME in one line, for them to be copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _command(commands: Any, name: str, help: str, example: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=_Formatter,
    )


def _add_run(commands: Any) -> None:
    parser = _command(
        commands, "run", "sparse training, cut, fine-tuning, comparison and report",
        "vtp run --model deit_base_patch16_224 --data /data/imagenet --recipe deit --out runs/deit_b",
    )  # fmt: skip
    _model_options(parser)
    _data_options(parser)
    _training_options(parser)
    _budget_options(parser)
    _teacher_option(parser, "without it the dense baseline is the teacher")
    parser.add_argument(
        "--latency-batch",
        type=int,
        default=64,
        metavar="IMAGES",
        help="images of a pass when latencies are compared (default 64)",
    )
    parser.add_argument(
        "--one-shot", action="store_true",
        help="calibrate and refit in closed form instead of sparse training, then a short recovery",
    )  # fmt: skip
    parser.add_argument(
        "--refit", action=argparse.BooleanOptionalAction, default=True,
        help="refit the sparse-trained model in closed form after the cut, before fine-tuning",
    )  # fmt: skip
    parser.add_argument("--images", type=positive(int), default=CALIBRATION_IMAGES, help=_IMAGES_HELP)
    parser.add_argument("--memory", type=positive(float), metavar="GB", help=_MEMORY_HELP)


def _add_train(commands: Any) -> None:
    parser = _command(
        commands, "train", "one stage: a dense model, or sparse training of a gated one",
        "vtp train sparse --model runs/demo/dense.safetensors --set sparse.epochs=8 --out runs/sparse",
    )  # fmt: skip
    parser.add_argument(
        "stage", choices=("dense", "sparse"), help="what is trained: a model, or a model with gates"
    )
    _model_options(parser)
    _data_options(parser)
    _training_options(parser)
    _teacher_option(parser, "without it there is no distillation")


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands, "prune", "cut a dense or sparse-trained model to a budget, without training",
        "vtp prune deit_base_patch16_224 --calibrate /data/imagenet --macs 10e9 --out small.safetensors",
    )  # fmt: skip
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a file with a gated model, such as sparse.safetensors of a run; with --calibrate also one with "
        f"a dense or compact model, {FASHION_DEIT!r}, a timm model name, hf:OWNER/NAME or hf:FOLDER",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the compact model")
    parser.add_argument("--plan", metavar="FILE", help="also write the plan as JSON to this file")
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
    group.add_argument("--workers", type=at_least_0, help="processes that load images (default 0)")
    group.add_argument("--memory", type=positive(float), metavar="GB", help=_MEMORY_HELP)
    group.add_argument(
        "--statistics", metavar="FILE", help="what calibration found: read if there is one, else written"
    )
    group.add_argument(
        "--no-eval", action="store_true", help="no top-1 before and after; labels are not looked at"
    )


def _add_finetune(commands: Any) -> None:
    parser = _command(
        commands, "finetune", "fine-tune a compact model",
        "vtp finetune small.safetensors --teacher runs/demo/dense.safetensors --out runs/small",
    )  # fmt: skip
    parser.add_argument(
        "model", metavar="MODEL", help="a file with a compact model, as `vtp prune` writes it"
    )
    parser.add_argument("--new-head", action="store_true", help="a new head for the data's classes")
    _data_options(parser)
    _training_options(parser)
    _teacher_option(parser, "without it there is no distillation")


def _add_eval(commands: Any) -> None:
    parser = _command(
        commands, "eval", "accuracy and cost of a model",
        "vtp eval --model runs/demo/compact.safetensors",
    )  # fmt: skip
    parser.add_argument("--model", default=FASHION_DEIT, help=_MODEL_HELP)
    parser.add_argument("--checkpoint", metavar="FILE", help=_CHECKPOINT_HELP)
    _data_options(parser)
    parser.add_argument(
        "--workers", type=at_least_0, default=0, help="processes that load images (default 0)"
    )
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
        commands, "predict", "the most probable classes of images",
        "vtp predict runs/demo/compact.safetensors cat.jpg dog.webp",
    )  # fmt: skip
    _model_argument(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")


def _add_bench(commands: Any) -> None:
    parser = _command(
        commands, "bench", "time a compact model by every runtime, and say whether pruning paid",
        "vtp bench runs/demo/compact.safetensors --batch 8",
    )  # fmt: skip
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a file with a compact model; with --profile-widths a file with any model, or a name",
    )
    parser.add_argument("--batch", type=positive(int), default=1, help="images in a call (default 1)")
    parser.add_argument(
        "--dtypes",
        choices=TIMED_DTYPES,
        nargs="+",
        default=["float32"],
        help="what runtimes compute in (default float32)",
    )
    parser.add_argument(
        "--rounds", type=positive(int), default=30, help="rounds of measurement, at most (default 30)"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=60.0, help="time for all rounds (default 60)"
    )
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: those PyTorch takes)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes minutes")
    parser.add_argument("--json", metavar="FILE", help="also write all times to this file")
    parser.add_argument(
        "--profile-widths", action="store_true",
        help="instead: measure time against width on this machine, for budgets in milliseconds",
    )  # fmt: skip


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", "write a model for another runtime, checked by that runtime",
        "vtp export runs/demo/compact.safetensors --to onnx --out small.onnx",
    )  # fmt: skip
    _model_argument(parser)
    parser.add_argument("--to", choices=TARGETS, required=True, help="the format")
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: MODEL with the suffix of the format)"
    )
    parser.add_argument(
        "--dtype", choices=EXPORTED_DTYPES, default="float32",
        help="what the file computes in; of OpenVINO, what it stores weights in (default float32)",
    )  # fmt: skip
    parser.add_argument(
        "--opset",
        type=int,
        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]} (default {OPSET})",
    )
    parser.add_argument(
        "--data",
        default=EMBEDDED,
        help=f"images to check outputs on, as `vtp eval` takes them (default {EMBEDDED!r})",
    )
    parser.add_argument("--data-root", help=_DATA_ROOT_HELP)
    parser.add_argument(
        "--batch", type=positive(int), default=1, help="images in a call that is timed (default 1)"
    )
    parser.add_argument(
        "--seconds", type=positive(float), default=8.0, help="time for the comparison of speed (default 8)"
    )
    parser.add_argument("--threads", type=thread_count, help="CPU threads (default: those PyTorch takes)")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands, "inspect", "show what a file of ours holds",
        "vtp inspect runs/demo/compact.safetensors",
    )  # fmt: skip
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a model, a checkpoint of training, a plan.json, statistics of a calibration or a table of "
        f"latencies; or the name of a model, of which no weights are read: {FASHION_DEIT!r}, a timm model "
        "name, hf-hub:OWNER/NAME, local-dir:FOLDER or hf:NAME",
    )


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"a file of ours, {FASHION_DEIT!r}, a timm model name, hf-hub:OWNER/NAME, local-dir:FOLDER or "
        "hf:NAME",
    )  # fmt: skip


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
    parser.add_argument("--out", required=True, metavar="FOLDER", help="run folder")
    parser.add_argument(
        "--resume", action="store_true", help="continue what was interrupted in the run folder"
    )
    parser.add_argument(
        "--recipe", choices=RECIPES,
        help="training settings (default small; with --one-shot short, or short-deit for image folders)",
    )  # fmt: skip
    parser.add_argument(
        "--augment", choices=("none", "light", "deit"), help="augmentation, instead of the recipe's"
    )
    parser.add_argument("--seed", type=int, help="of all that is random (default 0)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="IMAGES",
        help="images of a pass of a process (default: the recipe's)",
    )
    parser.add_argument(
        "--effective-batch", type=int, metavar="IMAGES",
        help="images of an update on any number of processes, in as many passes of at most --batch-size as "
        "that takes (default: one pass of every process)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("no", "bf16", "fp16"),
        help="mixed precision of training, fp16 on a GPU alone; no: float32 (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, help="processes that load images (default: the recipe's)")
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


def _teacher_option(parser: argparse.ArgumentParser, without: str) -> None:
    parser.add_argument(
        "--teacher",
        metavar="MODEL",
        help="model to distil from: any timm name, such as regnety_160.deit_in1k, hf:NAME, or a file of "
        f"ours; {without}",
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
    parser.add_argument("--round-to", type=int, default=1, help="make widths a multiple of this (default 1)")
    parser.add_argument(
        "--keep", nargs="+", action="extend", metavar="PART",
        help="parts that are never cut, such as attn, mlp.fc2 or blocks.0; the rest meets the budget",
    )  # fmt: skip
    parser.add_argument(
        "--min-keep",
        type=float,
        default=0.05,
        help="share (or number) of each gate vector that always stays (default 0.05)",
    )


# ------------------------------------------------------------------------------------------------ values


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe with the common options and every --set applied to it.

    Raises:
        ValueError: a setting is out of range, of a stage that the command does not train, or asks for a
            distillation without a teacher.
    """
    usual = short_recipe_for(options.data) if getattr(options, "one_shot", False) else "small"
    recipe = RECIPES[options.recipe or usual]()
    if options.augment is not None:
        recipe = dataclasses.replace(recipe, augment=options.augment, finetune_augment=None)
    common = {name: getattr(options, name) for name in _COMMON_SETTINGS if getattr(options, name) is not None}
    changes: dict[str, dict[str, Any]] = {stage: dict(common) for stage in STAGES}
    trained = _stages_of(options)
    for setting in options.set:
        stage, field, value = _parse_setting(setting)
        if stage not in trained and options.command == "run":
            raise ValueError(_other_stage(setting, stage, trained))
        if stage not in trained:  # so that one list of settings does for several commands
            warnings.warn(f"--set {setting}: without effect on the stage {trained[0]}", stacklevel=2)
        if (
            stage in trained
            and field == "distill_alpha"
            and value
            and options.command != "run"
            and options.teacher is None
        ):
            raise ValueError(f"{stage}.distill_alpha: got {value}, expected --teacher MODEL with it")
        changes[stage][field] = value
    stages = {stage: _changed(getattr(recipe, stage), stage, changes[stage]) for stage in STAGES}
    return dataclasses.replace(recipe, **stages)


def _stages_of(options: argparse.Namespace) -> tuple[str, ...]:
    """The stages that a command trains."""
    if options.command == "run":
        return stages_of_run(new_weights=options.from_scratch or options.new_head, one_shot=options.one_shot)
    return (options.stage,) if options.command == "train" else ("finetune",)


def _other_stage(setting: str, stage: str, trained: Sequence[str]) -> str:
    """What to say of a setting of a stage that a run does not train."""
    how = (
        "--from-scratch or --new-head adds dense"
        if stage == "dense"
        else "without --one-shot there is sparse"
    )
    return (
        f"--set: got {setting!r}, expected a setting of {' or '.join(trained)}, the stages of this run; {how}"
    )


def _changed(settings: TrainConfig, stage: str, changes: dict[str, Any]) -> TrainConfig:
    try:
        return dataclasses.replace(settings, **changes)
    except ValueError as error:  # one setting may be wrong because of another one of its stage
        raise ValueError(f"{stage}.{str(error).removeprefix('TrainConfig.')}") from error


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    """ "sparse.epochs=8" to ("sparse", "epochs", 8)."""
    name, equals, text = setting.partition("=")
    stage, _, field = name.partition(".")
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    if not equals or stage not in STAGES or field not in fields:
        close = difflib.get_close_matches(field, fields, n=1)
        hint = f"; did you mean {close[0]}?" if close and field not in fields else ""
        raise ValueError(
            f"--set: got {setting!r}, expected STAGE.FIELD=VALUE with a stage of {', '.join(STAGES)} and a "
            f"field of {', '.join(fields)}{hint}"
        )
    return stage, field, _value(text)


def _value(text: str) -> Any:
    """Of a setting: JSON, also as Python writes it; else a word, such as bf16."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(text)
    return text


def budget_of(options: argparse.Namespace, *, calibrated: bool = False) -> dict[str, Any]:
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


# What an error's text begins with: a setting or an argument, of what it is.
_SETTING = re.compile(r"(?:(?P<of>\w+)\.)?(?P<name>\w+)(?=: )")
_TYPED_SETTING = re.compile(rf"(?:--set=)?(?P<stage>{'|'.join(STAGES)})\.(?P<name>\w+)=(?P<value>.*)")
_GOT = re.compile(r": got (?P<value>[^,\s]+)")
_OTHER_NAMES = {"protect": "--keep", "k": "--knn"}
_MODEL_ARGUMENTS = {  # of commands that take a model without an option
    **dict.fromkeys(("prune", "finetune", "predict", "bench", "export"), "MODEL"),
    "inspect": "FILE",
}


def as_typed(text: str, arguments: Sequence[str]) -> str:
    """An error's text that begins with the option as it was typed, not with the setting that it became.

    "TrainConfig.epochs: got 0, ..." becomes "--set sparse.epochs: got 0, ..." where that is in `arguments`,
    the command line; a text about anything else stays as it is.
    """
    found = _SETTING.match(text)
    if found is None or found["of"] not in (None, "TrainConfig", "config", *STAGES):
        return text
    name, rest = found["name"], text[found.end() :]
    got = _GOT.match(rest)
    for setting in filter(None, map(_TYPED_SETTING.match, arguments)):
        if found["of"] in STAGES:
            meant = setting["stage"] == found["of"]
        else:  # an error does not always name the stage: others may have other values
            meant = got is None or _are_equal(setting["value"], got["value"])
        if setting["name"] == name and meant:
            return f"--set {setting['stage']}.{name}{rest}"
    command = next(iter(arguments), "")
    if name == "model" and command in _MODEL_ARGUMENTS:
        return _MODEL_ARGUMENTS[command] + rest
    option = _OTHER_NAMES.get(name, f"--{name.replace('_', '-')}")
    if name == "data" and command == "prune":
        option = "--calibrate"
    typed = {each.partition("=")[0] for each in arguments if each.startswith("--")}
    # Or a beginning of it, which the parser takes where no other option begins so.
    return option + rest if any(option.startswith(each) for each in typed - {"--"}) else text


def _are_equal(typed: str, got: str) -> bool:
    """Whether a setting as it was typed is what an error got: 0 is 0.0, and a text may be in quotes."""
    with contextlib.suppress(ValueError):
        return float(typed) == float(got) or typed == got
    return typed == got.strip("'")
