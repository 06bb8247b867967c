"""vtp.arguments: help, what does not parse, and what options say together."""

import re

import pytest

import vtp
from tests.support.command_line import run
from vtp import commands, pipeline
from vtp.arguments import as_typed, make_parser, recipe_of


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_of_a_command_shows_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].strip()
    assert example.startswith(f"vtp {command} ")
    make_parser().parse_args(example.split()[1:])


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} +\w", text, re.MULTILINE) for command in commands.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["cut"], "invalid choice: 'cut'"),
        (["prune"], "required: MODEL, --out"),
        (["prune", "a", "--out", "b", "--rate", "0.4", "--macs", "1e6"], "not allowed with argument --rate"),
        (["prune", "a", "--out", "b", "--rate", "much"], "--rate: invalid float value: 'much'"),
        (["prune", "a", "--out", "b", "--round-to", "1.5"], "--round-to: invalid int value"),
        (["prune", "a", "--out", "b", "--score", "magnitude"], "--score: invalid choice"),
        (["prune", "a", "--out", "b", "--scope", "head"], "--scope: invalid choice"),
        (["train", "finetune", "--out", "b"], "invalid choice: 'finetune'"),
        (["run"], "required: --out"),
        (["run", "--out", "b", "--recipe", "large"], "--recipe: invalid choice"),
        (["run", "--out", "b", "--precision", "int8"], "--precision: invalid choice"),
        (["eval", "--workers", "-1"], "--workers: got '-1', expected an integer of at least 0"),
        (["prune", "a", "--out", "b", "--workers", "-1"], "--workers: got '-1', expected an integer of at"),
        (["inspect"], "required: FILE"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
    ids=" ".join,
)
def test_arguments_that_do_not_parse_are_refused_by_name(misused, arguments, message):
    misused(message, *arguments)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sparse.epochs", "--set: got 'sparse.epochs', expected STAGE.FIELD=VALUE"),
        ("epochs=3", "expected STAGE.FIELD=VALUE with a stage of dense, sparse, finetune"),
        ("middle.epochs=3", "--set: got 'middle.epochs=3'"),
        ("sparse.epoch=3", r"--set: got 'sparse\.epoch=3'.* epochs, batch_size.*; did you mean epochs\?$"),
        ("=3", "--set: got '=3'"),
        ("", "--set: got ''"),
        ("sparse.epochs=", "epochs: got '', expected an integer"),
        ("sparse.epochs=0", "epochs: got 0, expected an integer of at least 1"),
        ("sparse.epochs=2.5", "epochs: got 2.5"),
        ("sparse.epochs=many", "epochs: got 'many'"),
        ("sparse.epochs=true", "epochs: got True"),
        ("sparse.lr=NaN", "lr: got nan"),
        ("sparse.l1=-1", "l1: got -1"),
        ("sparse.precision=int8", "precision: got 'int8'"),
        ("sparse.opt=none-such", "opt: got 'none-such'"),
        ("sparse.clip_grad=[1]", r"clip_grad: got \[1\]"),
        ("sparse.warmup_epochs=9", "--set sparse.warmup_epochs: got 9, expected between 0 and 4 epochs"),
    ],
)
@pytest.mark.parametrize("command", ["train", "run"])
def test_bad_setting_is_refused_before_anything_is_opened(
    files, tmp_path, refused, command, setting, message
):
    stage = ["sparse"] if command == "train" else []
    refused(message, command, *stage, "--out", tmp_path / "run", "--set", setting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sparse.epochs=8"], {"epochs": 8}),
        (["sparse.l1=3e-4", "sparse.l1_mode=proximal"], {"l1": 3e-4, "l1_mode": "proximal"}),
        (["sparse.clip_grad=null", "sparse.ema_decay=0.99"], {"clip_grad": None, "ema_decay": 0.99}),
        (["sparse.precision=bf16"], {"precision": "bf16"}),
        (["sparse.epochs=8", "sparse.epochs=9"], {"epochs": 9}),
        (
            ["sparse.l1=.5", "sparse.clip_grad=None", "sparse.compile=True"],
            {"l1": 0.5, "clip_grad": None, "compile": True},
        ),
        (["sparse.seed=5"], {"seed": 5}),
    ],
    ids=str,
)
def test_settings_reach_their_stage_only_and_win_over_common_options(settings, expected):
    arguments = ["run", "--out", "x", "--seed", "7"]
    for setting in settings:
        arguments += ["--set", setting]
    recipe = recipe_of(make_parser().parse_args(arguments))
    default = vtp.recipes.RECIPES["small"]()
    for name, value in expected.items():
        assert getattr(recipe.sparse, name) == value
    assert recipe.sparse.seed == expected.get("seed", 7)
    for stage in ("dense", "finetune"):
        for name in expected.keys() - {"seed"}:
            assert getattr(getattr(recipe, stage), name) == getattr(getattr(default, stage), name)
        assert getattr(recipe, stage).seed == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run --one-shot --set dense.epochs=1", "expected a setting of finetune, .*--new-head adds dense"),
        ("run --one-shot --set sparse.epochs=1", "setting of finetune, .*without --one-shot there is sparse"),
        ("run --set dense.lr=1", "got 'dense.lr=1', expected a setting of sparse or finetune, "),
    ],
)
def test_a_setting_of_a_stage_that_a_run_has_not_is_refused_with_those_that_it_has(
    refused, tmp_path, arguments, said
):
    refused(said, *arguments.split(), "--out", tmp_path / "run")


@pytest.mark.parametrize("setting", ["dense.epochs=9", "dense.distill_alpha=0.4"])
@pytest.mark.parametrize(("command", "stage"), [("train sparse", "sparse"), ("finetune a", "finetune")])
def test_a_setting_of_another_stage_is_said_to_be_without_effect(command, stage, setting):
    options = make_parser().parse_args([*command.split(), "--out", "x", "--set", setting])
    with pytest.warns(UserWarning, match=rf"^--set {setting}: without effect on the stage {stage}$"):
        recipe_of(options)


def test_settings_of_every_stage_of_a_run_are_taken():
    for arguments in ("--new-head", "--from-scratch"):
        recipe = recipe_of(make_parser().parse_args(f"run --out x {arguments} --set dense.epochs=9".split()))
        assert recipe.dense.epochs == 9


def test_a_setting_that_is_wrong_because_of_the_recipes_others_names_its_stage(refused, tmp_path):
    known = ["run", "--out", tmp_path / "run", "--new-head", "--recipe", "deit", "--set", "dense.epochs=1"]
    refused(r"error: dense.warmup_epochs: got 5\.0, expected between 0 and 1 epoch", *known)


@pytest.mark.parametrize(
    "arguments",
    [
        "run --new-head --set dense.distill_alpha=0.4",
        "run --from-scratch --one-shot --set dense.distill_alpha=0.4",
        "train dense --set dense.distill_alpha=0.4",
        "train sparse --set sparse.distill_alpha=0.4",
        "finetune small.safetensors --set finetune.distill_alpha=0.4",
    ],
)
def test_distillation_without_a_teacher_is_refused_before_data_are_opened(
    refused, monkeypatch, tmp_path, arguments
):
    for module in (commands, pipeline):
        monkeypatch.setattr(module, "open_data", None)
    refused(r"--set \w+\.distill_alpha: got 0\.4, .*--teacher", *arguments.split(), "--out", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_one_shot_run_takes_the_short_recipe_of_its_kind_of_data(tmp_path):
    def recipe(*more):
        return recipe_of(make_parser().parse_args(["run", "--out", "x", *more]))

    assert recipe("--one-shot") == vtp.recipes.RECIPES["short"]()
    assert recipe("--one-shot", "--data", str(tmp_path)) == vtp.recipes.RECIPES["short-deit"]()
    assert recipe("--one-shot", "--recipe", "deit") == vtp.recipes.RECIPES["deit"]()
    assert recipe() == vtp.recipes.RECIPES["small"]()


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("TrainConfig.epochs: got 0", ["--set", "sparse.epochs=0"], "--set sparse.epochs: got 0"),
        ("config.l1: got 1", ["--set=dense.l1=1"], "--set dense.l1: got 1"),
        ("finetune.lr: got 1", ["--set=dense.lr=1", "--set=finetune.lr=1"], "--set finetune.lr: got 1"),
        ("TrainConfig.batch_size: got 0", ["--batch-size=0"], "--batch-size: got 0"),
        ("TrainConfig.effective_batch: got -7", ["--eff", "-7"], "--effective-batch: got -7"),
        (
            "TrainConfig.epochs: got 0, expected 1",
            ["--set", "sparse.epochs=5", "--set", "dense.epochs=0"],
            "--set dense.epochs: got 0, expected 1",
        ),
        (
            "TrainConfig.batch_size: got 0",
            ["--batch-size", "0", "--set", "finetune.batch_size=4"],
            "--batch-size: got 0",
        ),
        ("TrainConfig.opt: got 'x'", ["--set", "dense.opt=x"], "--set dense.opt: got 'x'"),
        ("TrainConfig.lr: got -1.0,", ["--set", "dense.lr=-1"], "--set dense.lr: got -1.0,"),
        ("min_keep: got -1.0", ["--min-keep", "-1"], "--min-keep: got -1.0"),
        ("protect: got 'head'", ["--keep", "head"], "--keep: got 'head'"),
        ("k: got 20", ["--knn"], "--knn: got 20"),
        ("sparse.batch_size: got 128", ["run"], "sparse.batch_size: got 128"),  # the recipe's
        ("model: got 'a'", ["bench", "a"], "MODEL: got 'a'"),
        ("model: got 'a'", ["inspect", "a"], "FILE: got 'a'"),
        ("model: got 'a'", ["eval", "--model", "a"], "--model: got 'a'"),
        ("model: got 'a'", ["eval"], "model: got 'a'"),
        ("data: 'a' is no", ["prune", "m", "--calibrate", "a"], "--calibrate: 'a' is no"),
        ("data: 'a' is no", ["eval", "--data", "a"], "--data: 'a' is no"),
        ("/data/images: no image", ["--data", "/data/images"], "/data/images: no image"),
        ("architecture.depth: got 9", ["--depth"], "architecture.depth: got 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_error_names_the_option_that_was_typed(text, arguments, said):
    assert as_typed(text, arguments) == said
