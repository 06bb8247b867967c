"""vtp.training.mds: MosaicML Streaming data sets in our own order. Needs the optional mosaicml-streaming."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from tests.support.shards import noise
from vtp.training.data import DataError, check_data, open_data
from vtp.training.identity import data_identity
from vtp.training.loaders import set_epoch, test_loader, train_loader
from vtp.training.transforms import Augment

TRAIN, VAL = 41, 9
SIZE = {"image_size": 28, "in_chans": 1}


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "streaming.base.stream", None)
    with pytest.raises(DataError, match=r"needs the optional package mosaicml-streaming: vtp\[mds\]"):
        open_data(f"mds://{tmp_path}")


@pytest.fixture
def writer():
    return pytest.importorskip("streaming", reason="needs the optional package mosaicml-streaming").MDSWriter


def write(writer, folder: Path, image: str = "png") -> Path:
    """train/ and val/ of `noise(n)` with the label n % 3, in shards of a few images."""
    columns = {"name": "str", "x": image, "y": "int"}
    for split, count in (("train", TRAIN), ("val", VAL)):
        compression = {"compression": "zstd"} if image == "pil" else {}
        with writer(out=str(folder / split), columns=columns, size_limit=9000, **compression) as out:
            for number in range(count):
                out.write({"name": str(number), "x": noise(number), "y": number % 3})
    return folder


def labels_of(loader, epoch: int = 0, start: int = 0) -> list[list[int]]:
    set_epoch(loader, epoch, start)
    return [labels.tolist() for _, labels in loader]


def training(data, batch_size: int, **options):
    augment = Augment.preset("none", 28)
    return train_loader(data, batch_size=batch_size, augment=augment, seed=3, **SIZE, **options)


@pytest.mark.parametrize("image", ["png", "pil"])
def test_order_and_resuming_are_those_of_any_other_set(writer, tmp_path: Path, image: str) -> None:
    folder = write(writer, tmp_path / "set", image)
    cache = tmp_path / "cache" if image == "pil" else None  # compressed shards are unpacked there
    data = open_data(f"mds://{folder}", root=cache)
    check_data(data, num_classes=3)
    assert (len(data.train), len(data.test), data.num_classes, data.in_chans) == (TRAIN, VAL, None, 1)
    assert len(data.train.lengths) > 3
    for number in (0, 17, TRAIN - 1):
        stored, label = data.train[number]
        assert stored.tobytes() == noise(number).tobytes() and label == number % 3
    alone = [sorted(batch) for batch in labels_of(training(data, 8), 1)]
    assert alone == [sorted(batch) for batch in labels_of(training(data, 8, workers=2), 1)]
    assert labels_of(training(data, 8), 1, start=3) == labels_of(training(data, 8), 1)[3:]
    for processes in (2, 4):
        ranks = [
            labels_of(prepare_data_loader(training(data, 8 // processes), num_processes=processes,
                                          process_index=rank), 1)
            for rank in range(processes)
        ]  # fmt: skip
        assert [sorted(sum(step, [])) for step in zip(*ranks, strict=True)] == alone  # noqa: RUF017
    tested = torch.cat([labels for _, labels in test_loader(data, batch_size=4, **SIZE)])
    assert tested.tolist() == [number % 3 for number in range(VAL)]


def test_shards_of_an_address_are_fetched_once_and_whole(writer, tmp_path: Path) -> None:
    folder = write(writer, tmp_path / "far")
    remote, cache = f"mds://{folder}", tmp_path / "near"  # as an address, with a folder to fetch into
    here = data_identity(open_data(remote))
    data = open_data(remote, root=cache)
    assert data_identity(data) == here
    assert not list(cache.glob("train/*.mds")), "nothing is fetched before it is wanted"
    partial = cache / "train" / data.train.shards[0].raw_data.basename
    partial.write_bytes(b"what a killed process left")
    threads = [threading.Thread(target=data.train.__getitem__, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert data.train[0][0].tobytes() == noise(0).tobytes()
    assert len(list(cache.glob("train/*.mds"))) == 1
    shutil.rmtree(folder)
    assert data.train[1][0].tobytes() == noise(1).tobytes(), "from the cache"
    with pytest.raises(DataError, match=r"shard\.\d+\.mds: sample \d+: unreadable"):
        _ = data.train[TRAIN - 1]


def test_pickled_column_is_refused_before_anything_is_decoded(writer, tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (opened.touch, ())

    for split in ("train", "val"):
        with writer(out=str(tmp_path / "set" / split), columns={"x": "png", "y": "int", "z": "pkl"}) as out:
            out.write({"x": noise(0), "y": 0, "z": Trap()})
    assert pickle.dumps(Trap())[:1] == b"\x80"
    with pytest.raises(DataError, match="Column z contains an unsafe type: pkl"):
        open_data(f"mds://{tmp_path / 'set'}")
    assert not opened.exists()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"z": "int32"}, r"got 2 columns of integers among x \(png\), y \(int\), z \(int32\); expected one"),
        ({"label": "str"}, r"got 0 columns of integers"),
    ],
)
def test_columns_that_are_not_clear_are_refused(writer, tmp_path: Path, columns: dict, message: str) -> None:
    for split in ("train", "val"):
        named = {"x": "png", "y": "int", **columns} if "z" in columns else {"x": "png", **columns}
        with writer(out=str(tmp_path / split), columns=named) as out:
            out.write({name: noise(0) if name == "x" else 0 for name in named} | (
                {"label": "cat"} if "label" in named else {"z": np.int32(1)}))  # fmt: skip
    with pytest.raises(DataError, match=message):
        open_data(f"mds://{tmp_path}")


def test_what_cannot_be_read_is_named(writer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot open split 'train' of mds:///no/such/folder"):
        open_data("mds:///no/such/folder")
    folder = write(writer, tmp_path / "set")
    data = open_data(f"mds://{folder}")
    shard = folder / "train" / data.train.shards[1].raw_data.basename
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    place = data.train.lengths[0]
    with pytest.raises(DataError, match=rf"{shard.name}: sample 0: unreadable \(got .* bytes, expected"):
        _ = data.train[place]
    shard.write_bytes(whole.replace(b"IHDR", b"IHDX"))
    with pytest.raises(DataError, match=rf"{shard.name}: sample 0: unreadable"):
        _ = data.train[place]
    index = json.loads((folder / "val" / "index.json").read_text())
    (folder / "val" / "index.json").write_text(json.dumps(index | {"shards": []}))
    with pytest.raises(DataError, match="has no samples"):
        open_data(f"mds://{folder}", train=False)


def test_deep_images_are_refused(writer, tmp_path: Path) -> None:
    for split in ("train", "val"):
        with writer(out=str(tmp_path / split), columns={"x": "pil", "y": "int"}) as out:
            out.write({"x": Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)), "y": 0})
    with pytest.raises(DataError, match="more than 8 bits a channel"):
        open_data(f"mds://{tmp_path}")
