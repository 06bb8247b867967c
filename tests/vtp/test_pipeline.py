"""All stages together: what a run leaves behind, what it refuses, and that it survives being killed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

import vtp
from tests.support.models import TINY, build
from tests.support.processes import on_ranks
from vtp import cli, pipeline
from vtp.model.images import class_names
from vtp.pipeline import RunConfig, run
from vtp.recipes import RECIPES, STAGES
from vtp.timing import interleaved_latency
from vtp.training.data import DataError, open_data
from vtp.training.evaluation import NonFiniteLossError
from vtp.training.loaders import calibration_images
from vtp.training.loop import TrainingInterrupted
from vtp.zoo import open_model

FILES = [
    "checkpoints", "compact.safetensors", "config.json", "dense.safetensors", "metrics.jsonl", "plan.json",
    "pruned.safetensors", "report.html", "results.json", "sparse.safetensors", "tensorboard", "timm",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder of three classes that differ in brightness: 48 training and 12 test images."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for label in range(3):
            path = root / split / f"class{label}"
            path.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (28, 28), dtype=np.uint8) + 80 * label
                Image.fromarray(pixels.astype(np.uint8)).save(path / f"{i}.png")
    return root


def small_config(folder, **changes) -> RunConfig:
    recipe = RECIPES["small"]()
    stages = {
        stage: dataclasses.replace(getattr(recipe, stage), epochs=1, batch_size=16, warmup_epochs=0.5)
        for stage in STAGES
    }
    recipe = dataclasses.replace(recipe, **stages)
    return dataclasses.replace(
        RunConfig(recipe, data=str(folder), from_scratch=True, new_head=True, latency_batch=2), **changes
    )


def measure_no_longer_than_it_must(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline, "interleaved_latency", lambda m, x: interleaved_latency(m, x, seconds=0.0))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        measure_no_longer_than_it_must(patch)
        run(small_config(folder), out, progress=False)
    return out


@pytest.fixture(scope="module")
def one_shot(folder, tmp_path_factory):
    """A one-shot run of a small dense model, interrupted before its recovery and then resumed."""
    out = tmp_path_factory.mktemp("runs") / "one-shot"
    dense = build(
        dataclasses.replace(TINY, img_size=(28, 28), patch_size=(14, 14), num_classes=3), torch.float32
    )
    vtp.save(dense, out.with_name("dense.safetensors"))
    config = one_shot_config(folder, out)

    def interrupted(*_, **__):
        raise TrainingInterrupted("stopped", signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        measure_no_longer_than_it_must(patch)
        with pytest.MonkeyPatch.context() as first, pytest.raises(TrainingInterrupted):
            first.setattr(pipeline, "train", interrupted)
            run(config, out, progress=False)
        for name in ("calibrate", "compact", "make_plan"):  # none is to be called again
            patch.setattr(pipeline, name, None)
        run(config, out, progress=False, resume=True)
    return out


def one_shot_config(folder, out, **changes) -> RunConfig:
    settings = {
        "model": str(out.with_name("dense.safetensors")), "from_scratch": False, "new_head": False,
        "one_shot": True, "images": 24, "budget": {"macs": 14e3, "scope": "optimal"},
    }  # fmt: skip
    return small_config(folder, **{**settings, **changes})


@pytest.mark.parametrize("name", ["dense", "sparse", "pruned", "compact"])
def test_every_model_of_a_run_says_what_its_images_and_classes_are(finished, name):
    model = vtp.load(finished / f"{name}.safetensors")
    assert class_names(model) == ("class0", "class1", "class2")
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["crop_pct"]) == ((1, 28, 28), 1.0)
    assert config["mean"] == pytest.approx([sum(timm.data.IMAGENET_DEFAULT_MEAN) / 3])


def test_one_shot_run_resumes_with_what_it_has_calibrated_and_cut(one_shot):
    expected = {*FILES, "statistics.safetensors"} - {"sparse.safetensors"}
    assert {path.name for path in one_shot.iterdir()} == expected
    plan = vtp.PruningPlan.load(one_shot / "plan.json")
    final, pruned = (vtp.load(one_shot / f"{name}.safetensors") for name in ("compact", "pruned"))
    assert final.plan == pruned.plan == plan and plan.scope == "optimal"
    assert vtp.count(final).macs <= 14e3
    assert not torch.equal(final.head.weight, pruned.head.weight), "there was no recovery"
    stages = {json.loads(line)["stage"] for line in (one_shot / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"finetune"}


def test_one_shot_cut_is_refitted_on_training_images(one_shot, folder):
    dense = vtp.load(one_shot / "dense.safetensors")
    images = calibration_images(dense, pipeline.fit_data(open_data(folder), dense), 24)
    pruned = vtp.load(one_shot / "pruned.safetensors")
    again = vtp.compact(dense, pruned.plan, images=images)
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_one_shot_results_and_report_have_the_front_and_no_sparse_stage(one_shot):
    results = json.loads((one_shot / "results.json").read_text())
    rows = ["dense", "compact before fine-tuning", "compact after", "compact, optimized"]
    assert [row["model"] for row in results["rows"]] == rows and "reslice" not in results
    plan, front = vtp.PruningPlan.load(one_shot / "plan.json"), results["pareto"]
    chosen = {"macs": plan.cost.macs, "params": plan.cost.params, "change": plan.predicted_change}
    assert front["chosen"] == chosen and front["change"] == "KL"
    macs, changes = ([point[name] for point in front["points"]] for name in ("macs", "change"))
    assert macs == sorted(macs) and changes == sorted(changes, reverse=True)
    report = (one_shot / "report.html").read_text()
    assert "Predicted change of the output (KL) over MACs" in report and ">this run</text>" in report
    assert ("Heads (key width)" in report) == plan.narrows_keys
    assert "sparse" not in report and "gates" not in report.split("<main>")[1].lower()


def test_one_shot_run_of_other_images_is_not_resumed(one_shot, folder):
    with pytest.raises(vtp.FileError, match="another images"):
        run(one_shot_config(folder, one_shot, images=25), one_shot, resume=True, progress=False)


def test_cut_of_a_run_without_refit_is_exact(finished, folder, tmp_path):
    sparse = vtp.load(finished / "sparse.safetensors")
    config = small_config(folder, refit=False)
    data, console = open_data(folder), Console(quiet=True)
    cut = pipeline._Cut(config, data, tmp_path, resume=False, memory_gb=None, console=console)
    cut.write(sparse)
    again = vtp.compact(sparse, vtp.PruningPlan.load(tmp_path / "plan.json"))
    for name, tensor in cut.read(sparse).state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_run_leaves_the_files_that_the_module_names(finished):
    assert sorted(path.name for path in finished.iterdir()) == FILES


def test_a_run_leaves_its_result_for_timm_with_what_it_measured(finished):
    model = timm.create_model(f"local-dir:{finished / 'timm'}", pretrained=True).eval()
    images = torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    assert torch.equal(model(images), vtp.load(finished / "compact.safetensors")(images))
    card, rows = (finished / "timm" / "README.md").read_text(), {}
    for row in json.loads((finished / "results.json").read_text())["rows"]:
        rows[row["model"]] = row
    for title in ("dense", "compact before fine-tuning", "compact after"):
        assert f"{rows[title]['top1']:.2f}" in card
    assert f"{rows['compact, optimized']['latency_ms']:.2f} by vtp.optimize" in card


def test_results_agree_with_the_files(finished):
    rows = {row["model"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    files = {
        "dense": "dense",
        "sparse": "sparse",
        "compact before fine-tuning": "pruned",
        "compact after": "compact",
        "compact, optimized": "compact",
    }
    assert list(rows) == list(files)
    for title, name in files.items():
        file = finished / f"{name}.safetensors"
        assert rows[title]["file_bytes"] == file.stat().st_size
        assert vtp.count(vtp.load(file)) == vtp.Cost(rows[title]["params"], rows[title]["macs"])
        assert 0 <= rows[title]["top1"] <= 100
        assert rows[title]["latency_ms"] > 0


def test_plan_file_is_the_plan_of_the_result(finished):
    plan = vtp.PruningPlan.load(finished / "plan.json")
    assert vtp.load(finished / "compact.safetensors").plan == plan
    assert plan.rate == pytest.approx(0.4, abs=1e-3)


def test_fine_tuning_started_from_the_refitted_cut_of_the_sparse_model(finished, folder):
    sparse, pruned = (vtp.load(finished / f"{name}.safetensors") for name in ("sparse", "pruned"))
    plan = vtp.PruningPlan.load(finished / "plan.json")
    assert plan == vtp.make_plan(sparse, rate=0.4, score="gate")
    data = pipeline.fit_data(open_data(folder), sparse)
    again = vtp.compact(sparse, plan, images=calibration_images(sparse, data, pipeline.CALIBRATION_IMAGES))
    for name, tensor in pruned.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_accuracy_is_given_at_ten_budgets(finished):
    points = json.loads((finished / "results.json").read_text())["reslice"]
    assert [point["rate"] for point in points] == list(pipeline.RESLICE_RATES)
    assert len(points) == 10
    macs = [point["macs"] for point in points]
    assert macs == sorted(macs, reverse=True)


def test_sparse_model_has_statistics_for_both_scores(finished):
    sparse = vtp.load(finished / "sparse.safetensors")
    by_gate, by_taylor = (vtp.make_plan(sparse, rate=0.5, score=score) for score in ("gate", "taylor"))
    assert by_gate.kept != by_taylor.kept


def test_second_run_in_the_same_folder_is_refused(folder, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    with pytest.raises(vtp.FileError, match="holds a run already"):
        run(small_config(folder), finished, progress=False)
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


def test_resuming_with_another_budget_is_refused(folder, finished):
    with pytest.raises(vtp.FileError, match="another budget"):
        run(small_config(folder, budget={"rate": 0.5}), finished, resume=True, progress=False)


class Begun(Exception):
    """Training was about to begin: nothing in the run folder stood against it."""


@pytest.fixture
def only_begin(monkeypatch):
    """Runs end where their first stage would begin."""

    def stop(*arguments, **options):
        raise Begun

    monkeypatch.setattr(pipeline, "train", stop)


def _one_shot_on_rank(rank: int, config: RunConfig, out) -> None:
    pipeline.interleaved_latency = lambda m, x: interleaved_latency(m, x, seconds=0.0)
    run(config, out, progress=False)


@pytest.mark.thorough  # two processes
def test_one_shot_run_of_two_processes_calibrates_and_cuts_as_one(one_shot, folder, tmp_path):
    assert on_ranks(2, _one_shot_on_rank, one_shot_config(folder, one_shot), tmp_path / "run") == [0, 0]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in one_shot.iterdir()}
    ours, theirs = (vtp.Statistics.load(f / "statistics.safetensors") for f in (tmp_path / "run", one_shot))
    assert (ours.images, ours.change_images, ours.parent) == (24, theirs.change_images, theirs.parent)
    for name in ("variance", "activation", "changes"):  # float32
        for key in (key for key in theirs.tensors if key.endswith(name)):
            torch.testing.assert_close(ours.tensors[key], theirs.tensors[key], rtol=1e-4, atol=1e-6)
    assert vtp.load(tmp_path / "run" / "compact.safetensors").plan.cost.macs <= 14e3


@pytest.mark.parametrize("name", ["deit", "short-deit"])
def test_recipes_load_with_no_more_processes_than_there_are_cores(name, monkeypatch):
    for cores, expected in ((2, 2), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        recipe = RECIPES[name]()
        assert {getattr(recipe, stage).workers for stage in STAGES} == {expected}


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    stages = {name: dataclasses.replace(getattr(config.recipe, name), workers=workers) for name in STAGES}
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **stages))


def test_a_run_is_resumed_with_its_data_elsewhere_and_any_number_of_workers(
    folder, finished, tmp_path, only_begin, monkeypatch
):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for data in ("moved", "moved/", tmp_path / "moved", folder):
        with pytest.raises(Begun):
            run(with_workers(small_config(data), 2), tmp_path / "run", resume=True, progress=False)
    file = tmp_path / "moved" / "train" / "class1" / "3.png"
    file.write_bytes(file.read_bytes() + b"longer")
    changes = (
        r"another data\.train; it cannot be resumed \(data\.train: the run has '48 images, \w+', now '48 "
    )
    with pytest.raises(vtp.FileError, match=changes):
        run(small_config("moved"), tmp_path / "run", resume=True, progress=False)


def test_a_run_is_resumed_with_its_model_elsewhere_but_not_with_another(folder, tmp_path, only_begin):
    dense = build(dataclasses.replace(TINY, num_classes=3), torch.float32)
    for name in ("model", "moved"):
        vtp.save(dense, tmp_path / f"{name}.safetensors")
    vtp.save(
        build(dataclasses.replace(TINY, num_classes=3), torch.float32, seed=9), tmp_path / "other.safetensors"
    )

    def begin(name, resume):
        config = small_config(folder, model=str(tmp_path / f"{name}.safetensors"))
        config = dataclasses.replace(config, from_scratch=False, new_head=False)
        run(config, tmp_path / "run", resume=resume, progress=False)

    with pytest.raises(Begun):
        begin("model", resume=False)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "sparse.safetensors").touch()
    with pytest.raises(Begun):
        begin("moved", resume=True)
    with pytest.raises(vtp.FileError, match="holds a run with another model"):
        begin("other", resume=True)


def test_a_try_that_failed_at_once_does_not_stand_in_the_way_of_the_next(folder, tmp_path):
    config = small_config(folder)
    bad = dataclasses.replace(config.recipe.dense, lr=1e30, min_lr=0.0)
    with pytest.raises(NonFiniteLossError):
        run(
            dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, dense=bad)),
            tmp_path / "run",
            progress=False,
        )
    assert (tmp_path / "run" / "config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train", lambda *_, **__: pytest.fail("stop here", pytrace=False))
        with pytest.raises(pytest.fail.Exception, match="stop here"):
            run(config, tmp_path / "run", progress=False)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["dense"]["lr"] == config.recipe.dense.lr


def test_settings_of_a_stage_that_has_not_begun_may_change(folder, finished, tmp_path, only_begin):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "finetune.safetensors").unlink()
    config = small_config(folder)
    smaller = dataclasses.replace(config.recipe.finetune, batch_size=8)
    changed = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, finetune=smaller))
    with pytest.raises(Begun):
        run(changed, tmp_path / "run", resume=True, progress=False)
    other = dataclasses.replace(config.recipe.sparse, weight_decay=0.3)
    changed = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, sparse=other))
    with pytest.raises(
        vtp.FileError, match=r"another sparse; it cannot be resumed \(sparse\.\w+: the run has"
    ):
        run(changed, tmp_path / "run", resume=True, progress=False)


def test_what_a_job_of_torchrun_has_begun_it_continues_and_no_run_that_it_finds(
    folder, finished, tmp_path, only_begin, monkeypatch
):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    shutil.copytree(finished, tmp_path / "run")
    for _ in range(2):  # and after a restart
        with pytest.raises(vtp.FileError, match="holds a run already"):
            run(small_config(folder), tmp_path / "run", progress=False)
    with pytest.raises(Begun):
        run(small_config(folder), tmp_path / "new", progress=False)
    shutil.copytree(finished, tmp_path / "new", dirs_exist_ok=True)
    with pytest.raises(Begun):  # restarted after some stages
        run(small_config(folder), tmp_path / "new", progress=False)


def test_run_folders_of_an_older_version_and_of_others_are_refused_with_what_to_do(
    folder, finished, tmp_path
):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    written = json.loads(file.read_text())
    del written["identity"]
    file.write_text(json.dumps(written))
    with pytest.raises(vtp.FileError, match=r"as that of an older vtp; .* name another folder"):
        run(small_config(folder), tmp_path / "run", resume=True, progress=False)
    foreign = tmp_path / "foreign" / "config.json"
    foreign.parent.mkdir()
    foreign.write_text('{"architectures": ["ViT"]}')
    with pytest.raises(vtp.FileError, match="holds a run already"):
        run(small_config(folder), foreign.parent, progress=False)
    assert foreign.read_text() == '{"architectures": ["ViT"]}'


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"new_head": False}, DataError, "10"),
        ({"budget": {"rate": 1.5}}, vtp.PlanError, "rate: got 1.5"),
        ({"budget": {"macs": 10.0}}, vtp.PlanError, "macs: 10 cannot be met"),
        ({"model": "resnet18"}, vtp.UnsupportedModelError, "ResNet"),
        ({"model": "no_such_model"}, vtp.FileError, "no_such_model"),
        ({"data": "/no/such/folder"}, DataError, "/no/such/folder"),
    ],
    ids=["classes", "rate", "macs", "family", "model", "data"],
)
def test_what_cannot_work_is_refused_before_anything_is_written(folder, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run(small_config(folder, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_open_model_draws_new_weights_from_the_seed():
    first, again, other = (open_model("fashion-deit", from_scratch=True, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.patch_embed.proj.weight, again.patch_embed.proj.weight)
    assert not torch.equal(first.patch_embed.proj.weight, other.patch_embed.proj.weight)


def test_shipped_baseline_loads_and_is_better_than_chance():
    from vtp.checkpoint import read_metadata

    model = open_model("fashion-deit")
    file = resources.files("vtp") / "baselines" / "fashion_deit.safetensors"
    assert read_metadata(file)["user"]["top1"] > 85
    assert vtp.count(model).params < 5_000_000 / 4


def arguments(folder, out, *more: str) -> list[str]:
    epochs = {"dense": 1, "sparse": 2, "finetune": 1}
    settings = [f"--set={stage}.epochs={number}" for stage, number in epochs.items()]
    settings += [f"--set={stage}.warmup_epochs=0.5" for stage in epochs]
    return [
        "run", "--data", str(folder), "--from-scratch", "--new-head",
        "--batch-size", "8", "--latency-batch", "1", "--out", str(out), *settings, *more,
    ]  # fmt: skip


@pytest.fixture
def one_thread():
    """As many as the process that is killed has: another number would give other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.thorough  # a killed stage resumes in test_loop.py, and takes a quarter of the time
def test_run_killed_in_the_middle_of_sparse_training_resumes_to_the_same_bits(
    folder, tmp_path, monkeypatch, one_thread
):
    measure_no_longer_than_it_must(monkeypatch)
    command = [sys.executable, "-m", "vtp.cli", *arguments(folder, tmp_path / "killed")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics, deadline = tmp_path / "killed" / "metrics.jsonl", time.time() + 240
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and '"sparse"' in metrics.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "killed" / "compact.safetensors").exists()
    for out, more in (("killed", ["--resume"]), ("whole", [])):
        assert cli.main(arguments(folder, tmp_path / out, *more)) == 0
    for name in ("dense", "sparse", "pruned", "compact"):
        resumed, whole = (vtp.load(tmp_path / out / f"{name}.safetensors") for out in ("killed", "whole"))
        for key, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], tensor), (name, key)
    stages = [json.loads(line)["stage"] for line in (metrics).read_text().splitlines()]
    assert stages == ["dense", "sparse", "sparse", "finetune"]


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"batch_size": 100}], ids=["precision", "batch"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works where there is a GPU")
def test_settings_of_the_last_stage_are_refused_before_the_first(folder, tmp_path, change):
    config = small_config(folder)
    last = dataclasses.replace(config.recipe.finetune, **change)
    config = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, finetune=last))
    with pytest.raises(ValueError, match=rf"finetune\.{next(iter(change))}"):
        run(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no",
    ],
}  # fmt: skip


@pytest.mark.thorough  # two processes that share a stage, without the start of a launcher: test_loop.py
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_on_a_cpu_makes_one_run_of_two_processes(launcher, folder, tmp_path):
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "vtp.cli"]
    command += arguments(folder, tmp_path / "run")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    places = [(record["stage"], record["epoch"], record["step"]) for record in records]
    half = 48 // 8 // 2  # batches of an epoch, of which each process has every other
    assert places == [("dense", 1, half), ("sparse", 1, half), ("sparse", 2, 2 * half), ("finetune", 1, half)]
    assert done.stdout.count("report: ") == 1
    vtp.load(tmp_path / "run" / "compact.safetensors")
