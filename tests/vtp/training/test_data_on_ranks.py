"""Shards and streams on several processes that train together."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.models import TINY, build
from tests.support.processes import forks
from tests.support.shards import write_shards
from vtp.training.config import TrainConfig
from vtp.training.data import DataError, open_data
from vtp.training.evaluation import evaluate
from vtp.training.loaders import epoch_in_words, prepared, set_epoch, train_loader
from vtp.training.loop import train
from vtp.training.progress import StageProgress
from vtp.training.ranks import accelerator
from vtp.training.transforms import Augment

TRAIN, VAL = [9, 12, 6, 8], [5, 4]
SIZE = {"image_size": 8, "in_chans": 1}
STEPS = 20
BATCH = 8  # images of an update, of however many processes


def on_ranks(function, ranks: int, folder: Path, *arguments) -> list:
    """What function(*arguments) returns, as JSON has it, on each of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        process = forks().Process(target=_rank, args=(rank, ranks, port, folder, function, arguments))
        process.start()
        started.append(process)
    for process in started:
        process.join(timeout=100)
    assert [process.exitcode for process in started] == [0] * ranks
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: Path, function, arguments) -> None:
    torch.set_num_threads(1)
    # A loader's workers are forks of this process, as in one that was not forked itself.
    multiprocessing.set_start_method("fork", force=True)
    if ranks > 1:  # what torchrun sets, on a machine without a GPU
        os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), "LOCAL_RANK": str(rank)}  # fmt: skip
    os.environ["VTP_CACHE"] = str(folder / "cache")
    (folder / f"{rank}.json").write_text(json.dumps(function(*arguments)))


def stage(data, ranks: int, run_dir: Path, **changes) -> dict:
    """Train a tiny model on the data: the loss of each step, and what the epochs' records say."""
    losses = []
    settled = StageProgress.settled
    StageProgress.settled = lambda self, loss, *more: losses.append(loss) or settled(self, loss, *more)
    torch.manual_seed(0)
    model = build(replace(TINY, num_classes=3), torch.float32)
    config = replace(
        TrainConfig(epochs=5, batch_size=BATCH // ranks, lr=3e-3, warmup_epochs=0.0, precision="no"),
        **changes,
    )
    augment = Augment.preset("light", 8)
    found = train(model, data, config, stage="dense", run_dir=run_dir, augment=augment, progress=False)
    top1, loss = evaluate(found.model, data)
    return {"losses": losses, "history": found.history, "alone": {"test_top1": top1, "test_loss": loss}}


def from_shards(ranks: int, folder: Path) -> dict:
    return stage(open_data(folder / "set"), ranks, folder / f"run{ranks}")


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_from_shards_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", {"train": TRAIN, "val": VAL})
    (alone,) = on_ranks(from_shards, 1, tmp_path, 1, tmp_path)
    expected = torch.tensor(alone["losses"])
    assert len(expected) == STEPS and expected.std() > 0.01
    for each in on_ranks(from_shards, ranks, tmp_path, ranks, tmp_path):
        torch.testing.assert_close(torch.tensor(each["losses"]), expected, atol=1e-6, rtol=0)
        for record, other in zip(each["history"], alone["history"], strict=True):
            # A padded duplicate that were counted would change a mean over 9 images by per cents.
            assert record["test_loss"] == pytest.approx(other["test_loss"], abs=1e-6)
            assert record["test_top1"] == other["test_top1"]


def stream(folder: Path, classes: int):
    """A stream of shards, as from an address."""
    if not (folder / "_info.json").exists():
        write_shards(folder, {"train": TRAIN, "val": VAL}, classes)
        splits = {
            split: {"name": split, "num_samples": sum(lengths), "shard_lengths": lengths,
                    "filenames": [f"{split}/{number:03d}.tar" for number in range(len(lengths))]}
            for split, lengths in (("train", TRAIN), ("val", VAL))
        }  # fmt: skip
        (folder / "_info.json").write_text(json.dumps({"splits": splits}))
    return open_data("wds/x", root=f"pipe:cat {folder}")


def numbers_of_stream(folder: Path) -> dict:
    """Which images each epoch has, and how that is told."""
    data, found = stream(folder / "numbered", 1000), {"epochs": []}
    options = {"batch_size": 2, "augment": Augment.preset("none", 8), "seed": 1, **SIZE}
    process = accelerator()
    for workers in (0, 2):
        loader = prepared(train_loader(data, workers=workers, **options), process)
        set_epoch(loader, 0)
        labels = [labels.tolist() for _, labels in loader]
        set_epoch(loader, 0, start=1)
        assert [labels.tolist() for _, labels in loader] == labels[1:]
        found["epochs"].append([len(loader), labels])
    found["words"] = epoch_in_words(loader, len(loader), 2 * process.num_processes)
    with pytest.raises(DataError) as error:
        train_loader(data, workers=3, **options)
    return found | {"error": str(error.value)}


def from_stream(ranks: int, folder: Path) -> dict:
    found = numbers_of_stream(folder)
    data = stream(folder / "set", 3)
    for workers in (0, 2):
        trained = stage(data, ranks, folder / f"run{workers}", epochs=1, workers=workers)
        record = trained["history"][-1]
        assert trained["alone"]["test_loss"] == pytest.approx(record["test_loss"], abs=1e-6)
        assert trained["alone"]["test_top1"] == record["test_top1"]
    return found


def test_processes_read_shards_of_their_own_of_a_stream_and_evaluate_each_image_once(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    stream(tmp_path / "numbered", 1000), stream(tmp_path / "set", 3)
    ranks = on_ranks(from_stream, 2, tmp_path, 2, tmp_path)
    for number, steps in enumerate((9, 10)):  # 35 images: 18 a reader, or 9 and one more for whole batches
        of_ranks = [set(itertools.chain(*rank["epochs"][number][1])) for rank in ranks]
        assert [rank["epochs"][number][0] for rank in ranks] == [steps, steps]
        assert all(len(rank["epochs"][number][1]) == steps for rank in ranks)
        assert not of_ranks[0] & of_ranks[1]
    assert ranks[0]["words"] == (
        "an epoch is 10 steps of 4 images, of a stream of 35 images, of which 4 readers have shards of "
        "their own: some images come twice, or not at all; the order depends on the numbers of processes and "
        "workers"
    )
    assert ranks[0]["error"].startswith(
        "workers: got 3 on each of 2 processes, expected as many in all as there are shards, 4, or fewer"
    )
