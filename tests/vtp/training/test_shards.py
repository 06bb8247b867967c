"""vtp.training.shards: webdataset shards are read as a folder of images is."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image

from tests.support.shards import encoded, noise, write_shards, write_tar
from vtp.training import loaders, shards
from vtp.training.data import DataError, check_data, open_data
from vtp.training.identity import data_identity
from vtp.training.loaders import EpochSampler, set_epoch, test_loader, train_loader
from vtp.training.sources import FileImages
from vtp.training.transforms import Augment

TRAIN, VAL = [10, 7, 12], [5, 4]
SIZE = {"image_size": 28, "in_chans": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", {"train": TRAIN, "val": VAL})


def training(data, batch_size: int = 4, augment: str = "light", **options):
    augment = Augment.preset(augment, 28)
    return train_loader(data, batch_size=batch_size, augment=augment, seed=3, **SIZE, **options)


def epoch_of(loader, epoch: int, start: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    set_epoch(loader, epoch, start)
    return list(loader)


def equal(first, second) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )


def numbers(batches) -> list[int]:
    """Which of the images of `write_shards` are in batches that were not augmented."""
    data = torch.cat([images for images, _ in batches])[:, 0]
    known = torch.stack([torch.from_numpy(np.array(noise(n))) for n in range(sum(TRAIN))]).float()
    known = (known - known.mean((1, 2), keepdim=True)).flatten(1)
    return (data.flatten(1) @ known.T).argmax(1).tolist()


# What is read


def test_folder_of_shards_is_a_set_of_its_images(folder: Path) -> None:
    data = open_data(folder)
    check_data(data, num_classes=3)
    assert (data.num_classes, data.in_chans, data.image_size, data.notes) == (3, 1, 28, ())
    for images, count in ((data.train, sum(TRAIN)), (data.test, sum(VAL))):
        assert images.labels.tolist() == [number % 3 for number in range(count)]
        for number, (image, label) in enumerate(images[i] for i in range(count)):
            assert image.tobytes() == noise(number).tobytes() and label == number % 3
    assert data.train.filename(12) == f"{folder}/train/001.tar: 00012"
    evaluated = open_data(folder, train=False)
    assert evaluated.train is None and len(evaluated.test) == sum(VAL)


@pytest.mark.parametrize("spelling", ["names", "info", "braces", "stars"])
def test_shards_are_found_by_their_names_or_timms_info(folder: Path, spelling: str) -> None:
    expected = data_identity(open_data(folder))
    spec, root, other = str(folder), None, folder.parent / "other"
    if spelling in ("names", "info"):  # flat, as on the hub
        other.mkdir()
        for file in folder.glob("*/*.tar"):
            shutil.copy(file, other / f"in1k-{file.parent.name}-{file.name}")
        spec = str(other)
    if spelling == "info":
        splits = {
            split: {"name": split, "num_samples": sum(lengths), "shard_lengths": lengths,
                    "filenames": [f"in1k-{name}-{n:03d}.tar" for n in range(len(lengths))]}
            for split, name, lengths in (("train", "train", TRAIN), ("validation", "val", VAL))
        }  # fmt: skip
        (other / "_info.json").write_text(json.dumps({"splits": splits}))
        spec, root = "wds/any", other
    if spelling == "braces":
        pytest.importorskip("braceexpand", reason="needs the optional package webdataset")
        spec = f"{folder}/{{train/{{000..002}},val/{{000..001}}}}.tar"
    if spelling == "stars":
        spec = f"{folder}/*/*.tar"
    found = data_identity(open_data(spec, root=root))
    if spelling in ("braces", "stars"):
        assert found == expected
    assert {n: v for n, v in found.items() if n not in ("data.train", "data.test")} == {
        n: v for n, v in expected.items() if n not in ("data.train", "data.test")
    }
    opened = open_data(spec, root=root)
    assert (len(opened.train), len(opened.test)) == (sum(TRAIN), sum(VAL))


def test_images_and_classes_are_those_that_timms_reader_gives(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    from timm.data import create_dataset

    picture = noise(0, (8, 8))
    members = []
    for number, (ending, kind) in enumerate((("jpg", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP"))):
        members += [
            (f"deep.er/{number}.{ending}", encoded(picture, kind)),
            (f"deep.er/{number}.json", json.dumps({"wnid": 5 + number, "label": 1}).encode()),
            (f"deep.er/{number}.cls", b"2\n"),
            (f"deep.er/{number}.seg.png", b"a mask"),
        ]
    members += [("__meta__.json", b"{"), ("deep.er/x.json", json.dumps({"wnid": -1}).encode()),
                ("deep.er/x.png", encoded(picture)), ("deep.er/x.cls", b"1")]  # fmt: skip
    for name in ("train", "val"):
        write_tar(tmp_path / f"{name}.tar", members)
    for field, expected in (("", [2, 2, 2, 1]), ("wnid", [5, 6, 7])):  # by .cls, and by a field of .json
        splits = {
            name: {"name": name, "filenames": [f"{name}.tar"], "num_samples": 4, "shard_lengths": [4],
                   "alt_label": field}
            for name in ("train", "val")
        }  # fmt: skip
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
        data = open_data(tmp_path)
        by_timm = list(create_dataset("wds/x", root=str(tmp_path), split="val", input_img_mode="L"))
        assert [label for _, label in by_timm] == data.test.labels.tolist() == expected
        ours = [data.test[i][0].convert("L").tobytes() for i in range(len(expected))]
        assert [image.tobytes() for image, _ in by_timm] == ours
    left_out = "1 sample without an image, 1 image with a negative class"
    assert data.notes[0].startswith(f"train: left out of the shards: {left_out}")


def test_no_pickle_of_a_shard_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self):
            return (opened.touch, ())

    trap = pickle.dumps(Trap())
    for split in ("train", "val"):
        members = [(f"{n}.{end}", content) for n in range(3) for end, content in (
            ("pyd", trap), ("pkl", trap), ("png", encoded(noise(n))), ("cls", str(n).encode()))]  # fmt: skip
        write_tar(tmp_path / f"{split}-0.tar", members)
    data = open_data(tmp_path)
    check_data(data, 3)
    assert len(epoch_of(training(data, 3), 0)) == 1 and not opened.exists()


# Order, parts and resuming


def test_epoch_of_shards_does_not_depend_on_workers_or_on_the_start(folder: Path) -> None:
    data = open_data(folder)
    whole = epoch_of(training(data, augment="deit"), 2)
    assert len(whole) == sum(TRAIN) // 4
    loader = training(data, augment="deit", workers=2)
    assert equal(whole[3:], epoch_of(loader, 2, start=3))
    assert not equal(whole, epoch_of(loader, 3))


@pytest.mark.parametrize("source", ["shards", "folder"])
def test_any_number_of_processes_sees_every_image_once_and_the_same_ones_in_each_step(
    source: str, folder: Path
) -> None:
    if source == "folder":
        for split, lengths in (("train", TRAIN), ("val", VAL)):
            for number in range(sum(lengths)):
                file = folder / "images" / split / str(number % 3) / f"{number:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                noise(number).save(file)
        folder = folder / "images"
    data = open_data(folder)
    alone = [sorted(numbers([batch])) for batch in epoch_of(training(data, 8, augment="none"), 1)]
    assert len(alone) == 3 and len({n for step in alone for n in step}) == 24, "5 of 29 are left out"
    for processes in (1, 2, 4):
        ranks = []
        for rank in range(processes):
            loader = training(data, 8 // processes, augment="none")
            shared = prepare_data_loader(loader, num_processes=processes, process_index=rank)
            assert len(shared) == len(alone)
            ranks.append([numbers([batch]) for batch in epoch_of(shared, 1)])
            assert ranks[-1][2:] == [numbers([batch]) for batch in epoch_of(shared, 1, start=2)]
        assert [sorted(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == alone


def test_samples_of_shards_are_shuffled_among_a_few_shards_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "WINDOW", 25)
    lengths = [10, 3, 0, 12, 10, 9, 11]
    sampler = EpochSampler(sum(lengths), seed=1, shards=lengths)
    shard_of = np.repeat(range(len(lengths)), lengths)
    orders = []
    for epoch in (0, 1):
        sampler.position(epoch, skip=0)
        order = [index for _, index in sampler]
        assert sorted(order) == list(range(sum(lengths)))
        for skip in (1, 24, 31, 55):
            sampler.position(epoch, skip=skip)
            assert [index for _, index in sampler] == order[skip:]
        orders.append(order)
        # Each shard is left behind before the window after the next is reached.
        for shard in np.unique(shard_of):
            places = [place for place, index in enumerate(order) if shard_of[index] == shard]
            assert max(places) - min(places) < 25 + max(lengths)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert Counter(shard_of[orders[0][:20]]).most_common(1)[0][1] < 20, "several shards are mixed"


# The index that is kept


def test_index_is_made_once_and_again_where_the_shard_is_another(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    expected = data_identity(open_data(folder))
    assert f"reading what is in 3 of 3 shards of {folder}/train" in capsys.readouterr().err
    assert len(list(cache.glob("*.npz"))) == 5
    read = shards._read_index
    made = []
    monkeypatch.setattr(shards, "_read_index", lambda path, field: made.append(path) or read(path, field))
    assert data_identity(open_data(folder)) == expected and made == []
    assert capsys.readouterr().err == ""
    members = [("7.png", encoded(noise(7))), ("7.cls", b"0")]
    changed = write_tar(folder / "val" / "001.tar", members)
    assert data_identity(open_data(folder)) != expected and made == [str(changed)]
    kept = max(cache.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(open_data(folder).test) == VAL[0] + 1 and made == [str(changed)] * 2
    assert not list(cache.glob(".*")), "nothing is left half written"


@pytest.mark.parametrize("content", [b"", b"PK", b"no index"])
def test_damaged_index_is_made_again(folder: Path, cache: Path, content: bytes) -> None:
    expected = open_data(folder).train.reader.labels
    for file in cache.glob("*.npz"):
        file.write_bytes(content)
    assert np.array_equal(open_data(folder).train.reader.labels, expected)


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TGZ"])
def test_compressed_shard_beside_others_is_refused(folder: Path, name: str) -> None:
    (folder / "train" / name).write_bytes(b"")
    with pytest.raises(DataError, match=f"got 1 compressed shard in .*{name}"):
        open_data(folder)


def test_shard_of_any_size_is_whole(tmp_path: Path) -> None:
    image, label = ("a.png", encoded(noise(0))), ("a.cls", b"0")
    for split in ("train", "val"):
        for i in range(20):  # what fills up its last record is all that there can be
            write_tar(tmp_path / split / f"{i}.tar", [image, label, ("a.txt", b"x" * 512 * i)])
    assert len(open_data(tmp_path).train) == 20


def test_link_that_leads_nowhere_is_no_shard_fewer(folder: Path) -> None:
    (folder / "train" / "99.tar").symlink_to(folder / "missing.tar")
    with pytest.raises(DataError, match=r"got 1 shard with no file behind it: .*99\.tar"):
        open_data(folder)


def test_folder_that_cannot_be_written_is_no_obstacle(folder: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder would be")
    assert len(open_data(folder).train) == sum(TRAIN)


def test_moved_shards_are_the_same_data(folder: Path) -> None:
    expected = data_identity(open_data(folder))
    assert data_identity(open_data(folder.rename(folder.parent / "moved"))) == expected


# What is refused


def damage(file: Path, how) -> None:
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda raw: raw[:7000], r"train/001\.tar: .*damaged or cut short"),
        (lambda raw: raw[:5120], r"train/001\.tar: .*damaged or cut short"),
        (lambda raw: raw[:2560] + bytes([1]) * 512 + raw[3072:], r"train/001\.tar: .*damaged or cut short"),
        (lambda raw: raw[:3072] + bytes(len(raw) - 3072), r"train/001\.tar: damaged or cut short"),
        (lambda raw: raw + raw, r"train/001\.tar: .*several in one"),
        (lambda raw: b"", r"train/001\.tar: .*no uncompressed tar file.*empty file"),
        (lambda raw: b"\x1f\x8b" + raw, r"train/001\.tar: .*no uncompressed tar file"),
    ],
)
def test_damaged_shard_is_named(folder: Path, how, message: str) -> None:
    damage(folder / "train" / "001.tar", how)
    with pytest.raises(DataError, match=message):
        open_data(folder)


@pytest.mark.parametrize("image", [b"no image", encoded(noise(0))[:300], encoded(noise(0), "JPEG")[:300]])
def test_damaged_image_is_named_with_its_shard_before_the_first_step(tmp_path: Path, image: bytes) -> None:
    good = [("a.jpg", encoded(noise(0), "JPEG")), ("a.cls", b"0")]
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}-0.tar", good)
    intact = open_data(tmp_path)
    write_tar(tmp_path / "train-0.tar", [*good, ("b.png", image), ("b.cls", b"0")])
    for _ in range(2):  # found, and kept
        with pytest.raises(DataError, match=r"train-0\.tar: b(: unreadable image)? \("):
            check_data(open_data(tmp_path), num_classes=1)
    reader = shards.ShardReader.open(shards.find_shards(tmp_path)["train"])
    assert len(reader.examined[0]) == 1
    data = replace(intact, train=FileImages(reader))
    with pytest.raises(DataError, match=r"train-0\.tar: b: unreadable or truncated image"):
        epoch_of(training(data, 2), 0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], r"train-0\.tar: a: has no class, expected a number in a \.cls, or .*'label'"),
        ([("a.png", b"x"), ("a.cls", b"cat")], r"train-0\.tar: a: has no class.*got 'cat'"),
        ([("a.png", b"x"), ("a.cls", b"1_0")], r"train-0\.tar: a: has no class.*got '1_0'"),
        ([("a.png", b"x"), ("a.json", b'{"label": [1, 2]}')], r"train-0\.tar: a: has no class"),
        ([("a.png", b"x"), ("a.json", b'{"label": 1e999}')], r"train-0\.tar: a: has no class.*infinity"),
        ([("a.png", b"x"), ("a.cls", b"9" * 30)], r"train-0\.tar: a: has no class.*got '999"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], r"train-0\.tar: a: has no class"),
        ([("a.png", b"x"), ("a.json", b"{")], r"train-0\.tar: a: has no class"),
        ([("a.png", b"x"), ("a.json", b"[" * 100_000)], r"train-0\.tar: a: has no class"),
        ([("a.png", b"x"), ("a.png", b"x"), ("a.cls", b"0")], r"train-0\.tar: a: has two files \.png"),
        (
            [("a.png", b"x"), ("a.cls", b"0"), ("a.jpg", b"x")],
            r"train-0\.tar: a: has the images \.jpg and \.png,",
        ),
        ([("a.txt", b"x"), ("a.cls", b"0")], r"train-0\.tar: no image in these shards"),
        ([("7.left.png", b"x"), ("7.left.cls", b"0")], r"no image .* behind the first dot of their names"),
    ],
)
def test_sample_that_cannot_be_used_is_named(tmp_path: Path, members: list, message: str) -> None:
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", [("a.png", encoded(noise(0))), ("a.cls", b"0")])
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("kind", "link"),
    [(tarfile.LNKTYPE, "a hard link"), (tarfile.SYMTYPE, "a symbolic link")],
    ids=("hard", "symbolic"),
)
def test_image_or_class_that_is_a_link_is_refused_by_name(tmp_path: Path, kind: bytes, link: str) -> None:
    sample = [("a.png", encoded(noise(0))), ("a.cls", b"0")]
    write_tar(tmp_path / "val-0.tar", sample)
    for ending in ("png", "cls", "txt"):  # what is not read may be anything
        write_tar(tmp_path / "train-0.tar", sample)
        with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
            member = tarfile.TarInfo(f"b.{ending}")
            member.type, member.linkname = kind, "a.png"
            tar.addfile(member)
        if ending == "txt":
            assert len(open_data(tmp_path).train) == 1
            continue
        message = rf"train-0\.tar: b\.{ending}: is {link} to a\.png, expected a file: .*--hard-dereference"
        with pytest.raises(DataError, match=message):
            open_data(tmp_path)


def test_shard_that_was_cut_after_it_was_indexed_is_named(folder: Path) -> None:
    data = open_data(folder)
    damage(folder / "train" / "002.tar", lambda raw: raw[:4000])
    with pytest.raises(DataError, match=r"002\.tar: 000\d\d: unreadable.*the shard was changed or cut"):
        epoch_of(training(data), 0)


def test_shards_of_which_the_split_is_not_known_are_refused(folder: Path) -> None:
    shutil.copy(folder / "val" / "000.tar", folder / "more.tar")
    with pytest.raises(
        DataError, match=r"got 1 shard whose name does not tell the split: .*more\.tar; expected train or"
    ):
        open_data(folder)
    (folder / "more.tar").unlink()
    shutil.rmtree(folder / "train")
    with pytest.raises(DataError, match="has shards to test, but none to train"):
        open_data(folder)
    assert len(open_data(folder / "val", train=False).test) == sum(VAL)
    with pytest.raises(DataError, match=r"there is no shard .*none\.tar"):
        open_data(folder / "none.tar")


def test_number_of_images_that_timms_info_tells_is_checked(folder: Path) -> None:
    said = {"name": "train", "num_samples": 30, "filenames": ["train/000.tar"], "shard_lengths": [30]}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": said, "validation": said}}))
    with pytest.raises(DataError, match=r"got 10 images in 1 shard, expected 30 as _info\.json says"):
        open_data(folder)
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": {"num_samples": 3}}}))
    with pytest.raises(DataError, match=r"_info\.json: not as timm writes it.*filenames"):
        open_data(folder)


def test_archives_beside_class_folders_are_no_shards(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / split / "cat" / "0.png")
        with tarfile.open(tmp_path / split / "cat.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("n0.txt"), io.BytesIO())
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"an archive")
    assert open_data(tmp_path).class_names == ("cat",)


def test_images_of_sixteen_bits_in_shards_need_a_known_meaning(tmp_path: Path) -> None:
    dark = Image.fromarray(np.full((28, 28), 4000, dtype=np.uint16))
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", [("a.png", encoded(dark)), ("a.cls", b"0")])
    with pytest.raises(DataError, match=r"more than 8 bits a channel, such as .*train\.tar: a: their values"):
        open_data(tmp_path)


def test_every_test_image_is_evaluated_once(folder: Path) -> None:
    data = open_data(folder)
    expected = [label for _, labels in test_loader(data, batch_size=4, **SIZE) for label in labels.tolist()]
    assert expected == [number % 3 for number in range(sum(VAL))]
