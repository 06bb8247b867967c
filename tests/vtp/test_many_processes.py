"""What several processes find together is what one finds: evaluation, frozen features, calibration, refit,
and the commands around them.

`find` computes everything that is compared. It runs in this process, and once on two ranks: their start is
what takes time.
"""

import contextlib
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import Dataset

import vtp
from tests.support.models import FAMILIES, TINY, build, image
from tests.support.processes import on_ranks
from vtp import cli
from vtp.group import RankError, place, share, world
from vtp.pruning import refit
from vtp.training.data import Data
from vtp.training.evaluation import evaluate, evaluate_batches
from vtp.training.frozen import evaluate_features
from vtp.training.loaders import calibration_images, test_images
from vtp.training.ranks import accelerator

STATISTICS = {"plain": 41, "features": 20, "rotary": 20, "no-biases": 1}  # images; of one a rank has none
CUT = ("plain", "layer-scale", "no-biases", "swiglu")


class Greys(Dataset):
    """Grey images of three classes in turn, all of them different."""

    def __init__(self, count: int, seed: int, several: bool = False) -> None:
        self.labels = np.arange(count) % 3
        self.images = np.random.default_rng(seed).integers(0, 150, (count, 8, 8)).astype("uint8")
        self.images += (50 * self.labels[:, None, None]).astype("uint8")
        self.several = several

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        label = int(self.labels[index])
        return Image.fromarray(self.images[index]), torch.eye(3)[label] if self.several else label


def greys(train: int = 41, test: int = 30, **kinds) -> Data:
    return Data(
        "greys", 3, ("a", "b", "c"), 1, 8, (0.5,), (0.5,), Greys(train, 1), Greys(test, 2, **kinds)
    )  # fmt: skip


def three_classes(dtype: torch.dtype = torch.float32, family: str = "plain") -> torch.nn.Module:
    return build(dataclasses.replace(FAMILIES[family], num_classes=3), dtype)


def find(process: Accelerator | None, folder: Path) -> dict:
    """Figures and tensors by name; of commands what they say."""
    with torch.random.fork_rng():
        return (
            of_evaluation(process)
            | of_features(process)
            | of_calibration()
            | of_refit()
            | of_commands(folder)
        )


def of_evaluation(process: Accelerator | None) -> dict:
    model = three_classes()
    small = vtp.compact(vtp.insert_gates(model), vtp.make_plan(vtp.insert_gates(model), rate=0.3))
    found = {
        "evaluate": evaluate(model, greys(), batch_size=7, process=process),
        "evaluate in one batch": evaluate(model, greys(test=29), process=process),
        "evaluate an image": evaluate(model, greys(test=1), process=process),
        "evaluate a packed model": evaluate(vtp.optimize(small), greys(), batch_size=7, process=process),
    }
    two_of_three = dataclasses.replace(greys(), labels_present=(0, 2))
    two_of_three.test.labels = two_of_three.test.labels // 2 * 2
    found["evaluate a subset"] = evaluate(model, two_of_three, batch_size=7, process=process)
    loader, gather = test_images(model, greys(several=True), batch_size=7), {}
    if process is not None:
        loader, gather = process.prepare_data_loader(loader), {"gather": process.gather_for_metrics}
    figures = evaluate_batches(model, loader, contextlib.nullcontext, **gather)
    found["evaluate several classes"] = [figures[name] for name in ("top1", "loss", "map")]
    return found


def of_features(process: Accelerator | None) -> dict:
    """On the first rank; the others have nothing to say."""
    model = build(FAMILIES["features"], torch.float32)
    found = evaluate_features(model, greys(), k=5, linear_probe=True, batch_size=7, process=process)
    return {f"features {name}": value for name, value in found.items()}


def own(images: torch.Tensor) -> torch.Tensor:
    """The share of this rank."""
    rank, ranks = place(world())
    assert len(images[rank::ranks]) == share(len(images), world())
    return images[rank::ranks]


def of_calibration() -> dict:
    found = {}
    for family, count in STATISTICS.items():
        model = build(FAMILIES[family])
        if family == "plain":
            images = calibration_images(model, greys(), count, batch_size=7, group=world())
        else:
            images = own(image(model, batch=count))
        statistics = vtp.calibrate(model, images, group=world())
        found |= {f"statistics {family} {name}": value for name, value in statistics.tensors.items()}
        found[f"statistics {family}"] = [statistics.images, statistics.change_images]
    return found


def of_refit() -> dict:
    """Of all rows, of one family also of some of them; with narrowed keys, turned values, a dead branch."""
    found = {}
    for family in CUT:
        model = build(FAMILIES[family])
        plan = vtp.make_plan(vtp.insert_gates(model), rate=0.3, score="gate", key_width=0.5)
        kept = dict(plan.kept) | {"blocks.0.mlp.fc2": ()}
        plan = dataclasses.replace(plan, kept=kept, value_basis="principal")
        for rows in (refit.LEAST_ROWS, 24) if family == "plain" else (refit.LEAST_ROWS,):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(refit, "LEAST_ROWS", rows)
                patch.setattr(refit, "ROWS_PER_INPUT", 1)
                small = vtp.compact(model, plan, images=own(image(model, batch=31)), group=world())
            found |= {f"refit {family} {rows} {name}": t for name, t in small.state_dict().items()}
    return found


def of_commands(folder: Path) -> dict:
    """What commands say, and what they write; of the ranks all are told the same files."""
    dense, cut, plan = folder / "dense.safetensors", folder / "cut.safetensors", folder / "plan.json"
    prune = [
        "prune",
        dense,
        "--calibrate",
        folder / "images",
        "--rate",
        "0.4",
        "--images",
        "30",
        "--out",
        cut,
    ]
    commands = {
        "prune": [*prune, "--plan", plan, "--statistics", folder / "statistics"],
        "prune again": [*prune, "--statistics", folder / "statistics", "--no-eval"],
        "eval": ["eval", "--model", cut, "--data", folder / "images"],
        "eval --knn": ["eval", "--model", cut, "--data", folder / "images", "--knn", "3", "--linear-probe"],
        "predict": ["predict", cut, folder / "images/val/a/0.png"],
        "inspect": ["inspect", plan],
    }
    found = {}
    for name, command in commands.items():
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = cli.main([str(argument) for argument in command])
        found[f"vtp {name}"] = out.getvalue() + err.getvalue().replace(str(folder), "FOLDER")
        found[f"vtp {name}: status"] = status
    return found


def write_files(folder: Path) -> None:
    """A dense model and an image folder, for the commands."""
    folder.mkdir()
    model = three_classes()
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "label_names": ["a", "b", "c"]}
    vtp.save(model, folder / "dense.safetensors")
    data = greys(train=36, test=11)
    for split, images in (("train", data.train), ("val", data.test)):
        for i in range(len(images)):
            pixels, label = images[i]
            path = folder / "images" / split / "abc"[label]
            path.mkdir(parents=True, exist_ok=True)
            pixels.save(path / f"{i}.png")


def on_rank(rank: int, folder: Path) -> None:
    """What is found together, and what becomes of errors of one rank."""
    process = accelerator()
    found = find(process, folder / "two")
    model = three_classes()
    broken = image(model)
    if rank == 1:
        broken[0, 0, 0, 0] = torch.nan
    other = build(dataclasses.replace(TINY, num_classes=3), torch.float32, seed=rank)
    calls = {
        "nan on rank 1": lambda: vtp.calibrate(model, broken, group=world()),
        "other models": lambda: vtp.calibrate(other, image(model), group=world()),
        "alone": lambda: vtp.calibrate(model, image(model)) if rank == 0 else None,
    }
    for name, call in calls.items():
        try:
            call()
            found[name] = "done"
        except (ValueError, RankError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What one process found, and what each of two ranks did."""
    folder = tmp_path_factory.mktemp("found")
    for name in ("one", "two"):
        write_files(folder / name)
    assert on_ranks(2, on_rank, folder) == [0, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = find(None, folder / "one")
    torch.set_num_threads(threads)
    return [alone, *(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))]


def these(of: dict, beginning: str) -> dict:
    chosen = {name: value for name, value in of.items() if name.startswith(beginning)}
    assert chosen
    return chosen


def test_every_image_counts_once_in_an_evaluation(found):
    one, first, second = (these(each, "evaluate") for each in found)
    assert first == second
    # float32, whose rounding of an image's loss may depend on the images beside it.
    assert {name: pytest.approx(values, rel=1e-5) for name, values in one.items()} == first
    assert len({tuple(values) for values in one.values()}) == len(one)


def test_frozen_features_are_judged_by_all_images_in_their_order(found):
    one, first = (these(each, "features") for each in found[:2])
    assert first == pytest.approx(one, rel=1e-6)
    assert not any(name.startswith("features") for name in found[2])


def same_bits(first: dict, second: dict) -> bool:
    return all(
        torch.equal(first[name], second[name])
        if torch.is_tensor(first[name])
        else first[name] == second[name]
        for name in first
    )


@pytest.mark.parametrize("family", STATISTICS)
def test_statistics_are_those_of_one_process_and_the_same_bits_on_all(found, family):
    """In float64 a sum of n numbers in another order differs by at most n 2^-53 of the sum of magnitudes,
    here of 41 x 5 rows 2e-14; what is solved from it, by that times its condition, here below 5e3."""
    one, first, second = (these(each, f"statistics {family}") for each in found)
    assert same_bits(first, second)
    assert one.pop(f"statistics {family}") == first.pop(f"statistics {family}")
    for name, expected in one.items():
        if name.endswith("order"):
            assert torch.equal(first[name], expected), name
        else:
            torch.testing.assert_close(
                first[name], expected, rtol=0, atol=1e-10 * expected.abs().max().item()
            )


@pytest.mark.parametrize("family", CUT)
def test_refit_is_that_of_one_process_and_the_same_bits_on_all(found, family):
    one, first, second = (these(each, f"refit {family}") for each in found)
    assert same_bits(first, second)
    for name, expected in one.items():
        torch.testing.assert_close(first[name], expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def test_a_refit_of_some_rows_is_another_one(found):
    one = these(found[0], "refit plain")
    weights = [value for name, value in one.items() if name.endswith("blocks.1.mlp.fc2.weight")]
    assert len(weights) == 2 and not torch.allclose(*weights)


def test_commands_say_what_they_say_alone_and_once(found):
    one, first, second = (these(each, "vtp ") for each in found)
    assert set(second.values()) == {"", 0}
    for name, said in one.items():
        assert (said.replace("one/", "two/") if isinstance(said, str) else said) == first[name], name
    assert "k-NN top-1" in one["vtp eval --knn"] and "statistics of 30 images from" in one["vtp prune again"]
    assert {value for value in one.values() if not isinstance(value, str)} == {0}


def prune_into_no_folder(rank: int, folder: Path) -> None:
    images = ["--calibrate", folder / "images", "--out", folder / "none" / "cut.safetensors"]
    with open(folder / f"said-by-{rank}", "w") as sys.stderr:
        status = cli.main([str(argument) for argument in ("prune", folder / "dense.safetensors", *images)])
    sys.exit(status)


@pytest.mark.thorough  # two processes
def test_what_only_rank_0_can_refuse_ends_all_and_is_said_once(tmp_path):
    write_files(tmp_path / "files")
    assert on_ranks(2, prune_into_no_folder, tmp_path / "files") == [2, 2]
    said = [(tmp_path / "files" / f"said-by-{rank}").read_text() for rank in range(2)]
    assert said[0].count("cannot write into") == 1 and said[1] == ""


def test_an_error_of_one_rank_ends_all_and_is_named(found):
    _, first, second = found
    assert second["nan on rank 1"] == "ImagesError: images: they contain NaN or infinity"
    assert first["nan on rank 1"] == "RankError: rank 1: images: they contain NaN or infinity"
    assert first["other models"] == second["other models"]
    assert first["other models"].startswith("ValueError: model: ranks [1] have another one than rank 0")


def test_a_rank_that_calls_alone_waits_for_nobody(found):
    assert found[1]["alone"] == found[2]["alone"] == "done"


def on_one_of_four(rank: int, folder: Path) -> None:
    accelerator()
    torch.save(of_calibration() | of_refit(), folder / f"rank{rank}.pt")


@pytest.mark.thorough  # four processes
def test_four_ranks_find_what_one_does(found, tmp_path):
    assert on_ranks(4, on_one_of_four, tmp_path) == [0] * 4
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(4)]
    assert all(same_bits(ranks[0], other) for other in ranks[1:])
    for name, got in ranks[0].items():
        expected = found[0][name]
        if torch.is_tensor(got):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-9 * expected.abs().max().item())
        else:
            assert got == expected
