"""What training tells of its loader: which images an epoch has, and how long it waits for them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from tests.support.models import TINY, build
from tests.support.shards import noise
from vtp.training import progress
from vtp.training.config import TrainConfig
from vtp.training.data import Data
from vtp.training.loaders import epoch_in_words, train_loader
from vtp.training.loop import train
from vtp.training.progress import LoaderWait, loader_warning
from vtp.training.transforms import Augment


class Images(list):
    """Images that take so many seconds each to read."""

    seconds = 0.0

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        time.sleep(self.seconds)
        return super().__getitem__(index)


def data(train_images: int = 18, seconds: float = 0.0) -> Data:
    images = Images((noise(number, (8, 8)), number % 3) for number in range(train_images))
    images.seconds = seconds
    return Data("noise", 3, ("a", "b", "c"), 1, 8, (0.5,), (0.5,), images, images[:3])


def lines_of(tmp_path: Path, capsys: pytest.CaptureFixture, **options) -> tuple[list[str], list[dict]]:
    """What two epochs of 18 images in batches of 4 print, and their metrics."""
    model = build(replace(TINY, num_classes=3), torch.float32)
    config = TrainConfig(epochs=2, batch_size=4)
    augment = Augment.preset("none", 8)
    train(model, data(**options), config, stage="dense", run_dir=tmp_path, augment=augment)
    metrics = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return capsys.readouterr().out.splitlines(), [json.loads(line) for line in metrics]


def test_slow_loader_is_told_with_figures_once_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(progress, "LONG_EPOCH", 0.5)
    lines, metrics = lines_of(tmp_path, capsys, seconds=0.05)  # a batch takes 0.2 s, a step some milliseconds
    assert lines[1] == (
        "dense: an epoch is 4 steps of 4 images: of 18 images 2 are left out, in each epoch others"
    )
    for epoch, record in enumerate(metrics, 1):
        assert 0.5 < record["loader_wait"] <= 1.0
        assert record["loader_wait"] * record["seconds"] >= 4 * 0.2 * 0.9
        share = f"{record['loader_wait']:.0%}"
        assert any(f"dense {epoch}/2 done" in line and f"{share} waiting" in line for line in lines)
        assert (
            f"dense: the loader is the bottleneck: {share} of the time of epoch {epoch} went by waiting for "
            "images at 0 workers; this machine has 6 cores: try --workers 2"
        ) in lines
    assert len(lines) == 6


def test_quick_loader_is_not_complained_of(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        progress, "WAITING_BOUND", 0.99
    )  # steps on so small a model take no longer than images
    lines, metrics = lines_of(tmp_path, capsys)
    assert not any("bottleneck" in line for line in lines)
    assert all(0 < record["loader_wait"] < 0.99 for record in metrics)


def test_warning_says_what_there_is_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert loader_warning(0.2, 60.0, 1, workers=4, processes=1) is None
    assert loader_warning(0.9, 0.8, 1, workers=4, processes=1) is None, "a note each second"
    assert "43% of the time of epoch 3 " in loader_warning(0.43, 60.0, 3, workers=4, processes=1)
    assert loader_warning(0.43, 60.0, 3, workers=4, processes=1).endswith("try --workers 8")
    assert loader_warning(0.43, 60.0, 3, workers=12, processes=1).endswith("try --workers 16")
    assert loader_warning(0.43, 60.0, 3, workers=3, processes=4).endswith("try --workers 4")
    in_use = loader_warning(0.43, 60.0, 3, workers=4, processes=4)
    assert "all 16 cores are in use; smaller image files" in in_use


def test_wait_that_a_gpu_spends_computing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        done = False

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.done

    def slow():
        for number in range(3):
            time.sleep(0.01)
            yield number

    monkeypatch.setattr(torch.cuda, "Event", Asked)
    for done in (False, True):
        wait = LoaderWait(torch.device("cuda"))
        wait.asked.done = done
        assert list(wait.batches(slow())) == [0, 1, 2]
        assert wait.seconds == 0 if not done else wait.seconds >= 0.03
    computing = LoaderWait(torch.device("cpu"))
    for _ in computing.batches([1, 2, 3]):
        time.sleep(0.01)
    assert computing.seconds < 0.01, "the time of a step is not the loader's"


@pytest.mark.parametrize(
    ("images", "processes", "words"),
    [
        (16, 1, "an epoch is 4 steps of 4 images, all 16 of them"),
        (18, 2, "an epoch is 2 steps of 8 images: of 18 images 2 are left out, in each epoch others"),
        (17, 4, "an epoch is 1 step of 16 images: of 17 images 1 is left out, in each epoch another one"),
        (31, 4, "an epoch is 1 step of 16 images: of 31 images 15 are left out, in each epoch others"),
    ],
)
def test_images_that_an_epoch_leaves_out_are_counted(images: int, processes: int, words: str) -> None:
    loader = train_loader(
        data(images), image_size=8, in_chans=1, batch_size=4, augment=Augment.preset("none", 8), seed=0
    )
    shared = prepare_data_loader(loader, num_processes=processes, process_index=0)
    assert epoch_in_words(shared, len(shared), 4 * processes) == words
