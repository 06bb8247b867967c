"""vtp.training.data and vtp.training.loaders: what is embedded, what is refused, and what is reproducible."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from timm.data import create_transform

from vtp.training import loaders, transforms
from vtp.training.data import EMBEDDED_FOLDER, Data, DataError, check_data, match_classes, open_data
from vtp.training.loaders import calibration_loader, set_epoch, train_loader
from vtp.training.sources import IDX_NAMES, IdxImages, read_idx
from vtp.training.transforms import Augment

DEBIAN_ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
TESTED = {"image_size": 28, "in_chans": 1, "batch_size": 5}
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def fashion() -> Data:
    return open_data()


@pytest.fixture(scope="module")
def few(fashion: Data) -> Data:
    """The first 100 training and 30 test images, which hold every class."""
    train = IdxImages(fashion.train.images[:100], fashion.train.labels[:100])
    test = IdxImages(fashion.test.images[:30], fashion.test.labels[:30])
    return replace(fashion, train=train, test=test)


def make_train_loader(data: Data, **options):
    defaults = {
        "image_size": 28,
        "in_chans": 1,
        "batch_size": 8,
        "augment": Augment.preset("deit", 28),
        "seed": 5,
    }
    return train_loader(data, **(defaults | options))


def make_calibration_loader(data: Data, **options):
    return calibration_loader(
        data, **({"image_size": 28, "in_chans": 1, "batch_size": 8, "seed": 5} | options)
    )


def epoch_of(loader, epoch: int, start: int = 0) -> Batches:
    set_epoch(loader, epoch, start)
    return list(loader)


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for left, right in zip(first, second, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of RGB JPEG and PNG files of various sizes: five each for training, three for testing."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 3)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
                ending = "jpg" if number % 2 else "png"
                Image.fromarray(pixels).save(tmp_path / split / label / f"{number}.{ending}")
    return tmp_path


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """The embedded files, to be damaged."""
    return Path(shutil.copytree(EMBEDDED_FOLDER, tmp_path / "idx"))


# What is embedded


def test_embedded_set_holds_10000_and_2000_images_equally_many_of_each_class(fashion: Data) -> None:
    assert np.bincount(fashion.train.labels).tolist() == [1000] * 10
    assert np.bincount(fashion.test.labels).tolist() == [200] * 10
    assert fashion.train.images.shape == (10_000, 28, 28)
    assert fashion.test.images.shape == (2_000, 28, 28)
    assert (fashion.num_classes, fashion.in_chans, fashion.image_size) == (10, 1, 28)
    assert len(fashion.class_names) == 10
    image, label = fashion.train[0]
    assert image.size == (28, 28) and image.mode == "L" and isinstance(label, int)
    check_data(fashion, num_classes=10)


def test_embedded_files_match_their_digests_and_carry_the_licence() -> None:
    for line in (EMBEDDED_FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        raw = gzip.decompress((EMBEDDED_FOLDER / f"{name}.gz").read_bytes())
        assert hashlib.sha256(raw).hexdigest() == digest
    assert "Copyright (c) 2017 Zalando SE" in (EMBEDDED_FOLDER / "LICENSE").read_text()
    assert sum(path.stat().st_size for path in EMBEDDED_FOLDER.iterdir()) < 6e6


@pytest.mark.thorough
def test_embedded_files_are_what_the_tool_makes_of_the_originals(tmp_path: Path) -> None:
    if not (DEBIAN_ORIGINALS / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(
            f"needs the original Fashion-MNIST files in {DEBIAN_ORIGINALS} (Debian: dataset-fashion-mnist)"
        )
    path = Path(__file__).parents[3] / "tools" / "make_fashion_subset.py"
    spec = importlib.util.spec_from_file_location("make_fashion_subset", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.build(DEBIAN_ORIGINALS, tmp_path)
    for built in tmp_path.iterdir():
        shipped = EMBEDDED_FOLDER / built.name
        if built.suffix == ".gz":  # the compressed bytes depend on the version of zlib
            assert gzip.decompress(built.read_bytes()) == gzip.decompress(shipped.read_bytes()), built.name
        else:
            assert built.read_bytes() == shipped.read_bytes(), built.name


def test_plain_and_gzipped_idx_folders_open_alike(fashion: Data, idx_folder: Path) -> None:
    for path in idx_folder.glob("t10k*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    opened = open_data(idx_folder)
    assert np.array_equal(opened.test.images, fashion.test.images)
    assert np.array_equal(opened.train.labels, fashion.train.labels)


# Other sources


@pytest.mark.parametrize("spec", ["torchvision:FashionMNIST", "torch/fashion_mnist"])
def test_torchvision_set_gives_the_same_batches_as_the_idx_files(
    few: Data, fashion: Data, tmp_path: Path, spec: str
):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in EMBEDDED_FOLDER.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    opened = open_data(spec, root=tmp_path)
    check_data(opened, num_classes=10)
    assert (opened.mean, opened.std, opened.in_chans) == (fashion.mean, fashion.std, 1)
    images, labels = next(iter(loaders.test_loader(opened, image_size=28, in_chans=1, batch_size=30)))
    expected, expected_labels = next(iter(loaders.test_loader(few, image_size=28, in_chans=1, batch_size=30)))
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_image_folder_trains_and_tests_end_to_end(image_folder: Path, in_chans: int) -> None:
    data = open_data(image_folder)
    assert (data.num_classes, data.class_names, data.in_chans, data.image_size) == (
        2,
        ("cat", "dog"),
        3,
        None,
    )
    check_data(data, num_classes=2)
    options = {"image_size": 32, "in_chans": in_chans, "batch_size": 4}
    batches = list(train_loader(data, augment=Augment.preset("deit"), seed=0, **options))
    assert [tuple(images.shape) for images, _ in batches] == [(4, in_chans, 32, 32)] * 2
    tested = list(loaders.test_loader(data, **options))
    assert [len(labels) for _, labels in tested] == [4, 2]
    assert torch.cat([labels for _, labels in tested]).tolist() == [0, 0, 0, 1, 1, 1]


def test_timm_name_with_root_opens_an_image_folder(image_folder: Path) -> None:
    data = open_data("torch/image_folder", root=image_folder)
    assert data.class_names == ("cat", "dog")
    check_data(data, num_classes=2)


def test_webdataset_stream_repeats_itself_and_starts_anywhere(fashion: Data, tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    splits = {}
    for split, images, count in (("train", fashion.train, 16), ("validation", fashion.test, 6)):
        names = [f"{split}-{shard}.tar" for shard in range(2)]
        for shard, name in enumerate(names):
            with tarfile.open(tmp_path / name, "w") as tar:
                for number in range(count):
                    add_to_shard(tar, f"{shard}_{number:04d}", *images[shard * count + number])
        lengths = [count] * len(names)
        splits[split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": names,
            "shard_lengths": lengths,
        }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    data = open_data("wds/any", root=f"pipe:cat {tmp_path}")
    check_data(data, num_classes=10)
    for workers in (0, 2):
        loader = make_train_loader(data, workers=workers)
        before = torch.get_rng_state()
        whole = epoch_of(loader, 1)
        assert len(whole) == 4
        assert equal(whole, epoch_of(make_train_loader(data, workers=workers), 1))
        assert equal(whole[1:], epoch_of(loader, 1, start=1))
        assert not equal(whole, epoch_of(loader, 2))
        assert torch.equal(before, torch.get_rng_state())
    assert sum(len(labels) for _, labels in loaders.test_loader(data, **TESTED)) == 12
    named = match_classes(replace(data, class_names=tuple("abcdefghij"), num_classes=10), "jihgfedcba")
    pairs = zip(*(loaders.test_loader(each, **TESTED) for each in (data, named)), strict=True)
    assert all(torch.equal(labels, 9 - mapped) for (_, labels), (_, mapped) in pairs)
    calibration = make_calibration_loader(data, images=10)
    assert [len(labels) for _, labels in calibration] == [8, 8], "whole batches"
    assert equal(list(calibration), list(calibration))
    assert_dealt_in_turn(
        calibration, [make_calibration_loader(data, images=10, place=(n, 3)) for n in range(3)]
    )


def test_deep_image_of_a_stream_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    splits = {}
    for split in ("train", "validation"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            add_to_shard(tar, "0", Image.fromarray(np.full((28, 28), 4000, dtype=np.uint16)), 0)
        splits[split] = {
            "name": split, "num_samples": 1, "filenames": [f"{split}.tar"], "shard_lengths": [1],
        }  # fmt: skip
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match="image 0 of a stream has more than 8 bits a channel"):
        list(loaders.test_loader(open_data("wds/any", root=f"pipe:cat {tmp_path}"), **TESTED))


def add_to_shard(tar: tarfile.TarFile, key: str, image: Image.Image, label: int) -> None:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    for ending, content in (("png", encoded.getvalue()), ("cls", str(label).encode())):
        member = tarfile.TarInfo(f"{key}.{ending}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


# Pixels


def test_test_images_reach_the_model_whole_and_normalised(few: Data) -> None:
    images, labels = next(iter(loaders.test_loader(few, image_size=28, in_chans=1, batch_size=30)))
    expected = (torch.from_numpy(few.test.images.copy()) / 255 - 0.2860) / 0.3530
    assert torch.equal(images[:, 0], expected)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == few.test.labels.tolist()


def test_calibration_images_are_different_training_images_as_they_are_evaluated(few: Data) -> None:
    batches = list(make_calibration_loader(few, images=30))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 6]
    found = torch.cat([images for images, _ in batches])[:, 0]
    known = (torch.from_numpy(few.train.images.copy()) / 255 - 0.2860) / 0.3530
    at = [int((known == image).all((1, 2)).nonzero()[0]) for image in found]
    assert len(set(at)) == 30 and at != sorted(at)
    assert torch.cat([labels for _, labels in batches]).tolist() == few.train.labels[at].tolist()
    again, other = (list(make_calibration_loader(few, images=30, seed=seed)) for seed in (5, 6))
    assert equal(batches, again) and not equal(batches, other)
    assert len(next(iter(make_calibration_loader(few, images=500, batch_size=100)))[1]) == 100, (
        "all there are"
    )
    with pytest.raises(DataError, match="images: got 0"):
        make_calibration_loader(few, images=0)


def assert_dealt_in_turn(whole, shares) -> None:
    """Image number i of the whole loader is in share i modulo their number, and in no other."""
    images, labels = (torch.cat(parts) for parts in zip(*whole, strict=True))
    for number, share in enumerate(shares):
        own_images, own_labels = (torch.cat(parts) for parts in zip(*share, strict=True))
        assert torch.equal(own_images, images[number :: len(shares)])
        assert torch.equal(own_labels, labels[number :: len(shares)])


def test_calibration_images_are_dealt_to_processes_in_turn(few: Data) -> None:
    shares = [make_calibration_loader(few, images=29, place=(number, 3)) for number in range(3)]
    assert_dealt_in_turn(make_calibration_loader(few, images=29), shares)
    assert list(make_calibration_loader(few, images=2, place=(2, 3))) == []


def test_batchwise_normalisation_equals_timms_own_transform(few: Data) -> None:
    data = few.for_model({"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "crop_pct": 0.9})
    images, _ = next(iter(loaders.test_loader(data, image_size=96, in_chans=3, batch_size=4)))
    transform = create_transform(
        96, mean=data.mean, std=data.std, crop_pct=0.9, interpolation=data.interpolation
    )
    for index in range(4):
        torch.testing.assert_close(images[index], transform(few.test[index][0].convert("RGB")))


def test_grey_images_become_three_equal_channels(few: Data) -> None:
    grey = epoch_of(make_train_loader(few, augment=Augment.preset("light"), in_chans=1), 0)
    rgb = epoch_of(make_train_loader(few, augment=Augment.preset("light"), in_chans=3), 0)
    for (one, _), (three, _) in zip(grey, rgb, strict=True):
        assert torch.equal(one.expand_as(three), three)


def test_shifted_crop_equals_torchvisions_padded_random_crop(few: Data) -> None:
    image, _ = few.train[0]
    padded = np.pad(np.asarray(image), 2)
    possible = {padded[y : y + 28, x : x + 28].tobytes() for y in range(5) for x in range(5)}
    random.seed(0)
    seen = {np.asarray(transforms.ShiftedCrop((28, 28), 2)(image)).tobytes() for _ in range(500)}
    assert seen == possible


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4-p1-inc1", "rand-m0-n4-p1", "original"]
)
def test_timm_policies_work_on_grey_and_on_rgb(few: Data, in_chans: int, policy: str) -> None:
    augment = replace(Augment.preset("deit", 28), auto_augment=policy)
    for epoch in range(3):
        for images, _ in epoch_of(
            make_train_loader(few, in_chans=in_chans, augment=augment, batch_size=50), epoch
        ):
            assert images.shape == (50, in_chans, 28, 28) and images.isfinite().all()


def test_random_erasing_erases_about_as_many_images_as_asked(few: Data) -> None:
    augment = Augment.preset("none")
    plain = epoch_of(make_train_loader(few, augment=augment, batch_size=100), 0)[0][0]
    erased = epoch_of(make_train_loader(few, augment=replace(augment, reprob=0.5), batch_size=100), 0)[0][0]
    assert 30 <= (plain != erased).flatten(1).any(1).sum() <= 70


# Reproducibility


@pytest.mark.parametrize("preset", ["light", "deit"])
def test_batches_do_not_depend_on_workers_or_on_the_start(few: Data, preset: str) -> None:
    augment = Augment.preset(preset, 28)
    whole = epoch_of(make_train_loader(few, augment=augment), 2)
    assert len(whole) == 12  # the incomplete 13th is dropped
    for workers in (0, 2):
        loader = make_train_loader(few, augment=augment, workers=workers)
        assert equal(whole[5:], epoch_of(loader, 2, start=5))
        set_epoch(loader, 7)
        iterator = iter(loader)
        next(iterator)  # an epoch that is given up must leave nothing behind in the workers
        del iterator
        assert equal(whole, epoch_of(loader, 2))
        assert equal([], epoch_of(loader, 2, start=12))
        assert len(loader) == 12


def test_augmentation_of_a_sample_does_not_depend_on_its_batch(few: Data) -> None:
    by_eight, by_four = (
        torch.cat([images for images, _ in epoch_of(make_train_loader(few, batch_size=size), 1)])[:96]
        for size in (8, 4)
    )
    assert torch.equal(by_eight, by_four)


def test_order_and_augmentation_differ_between_epochs_and_seeds(few: Data) -> None:
    augment = Augment.preset("none")
    first = torch.cat([labels for _, labels in epoch_of(make_train_loader(few, augment=augment), 0)])
    for epoch, seed in ((1, 5), (0, 6)):
        other = torch.cat(
            [labels for _, labels in epoch_of(make_train_loader(few, augment=augment, seed=seed), epoch)]
        )
        assert not torch.equal(first, other)
    light = Augment.preset("light")
    one = replace(few, train=torch.utils.data.Subset(few.train, [0]))
    loader = make_train_loader(one, augment=light, batch_size=1)
    assert len({epoch_of(loader, epoch)[0][0].numpy().tobytes() for epoch in range(8)}) > 4


def test_an_epoch_visits_every_sample_once() -> None:
    sampler = loaders.EpochSampler(50, seed=1)
    sampler.position(3, skip=0)
    order = list(sampler)
    assert sorted(order) == [(3, index) for index in range(50)]
    sampler.position(3, skip=20)
    assert list(sampler) == order[20:] and len(sampler) == 50


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(few: Data, workers: int) -> None:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    epoch_of(make_train_loader(few, workers=workers), 0)
    list(loaders.test_loader(few, image_size=28, in_chans=1, batch_size=10, workers=workers))
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_set_epoch_works_on_a_loader_prepared_by_accelerate(few: Data) -> None:
    whole = epoch_of(make_train_loader(few), 4)
    prepared = Accelerator(cpu=True).prepare(make_train_loader(few))
    before = torch.get_rng_state()
    assert equal(whole, epoch_of(prepared, 4))
    assert equal(whole[3:], epoch_of(prepared, 4, start=3))
    assert not equal(whole, epoch_of(prepared, 5))
    assert torch.equal(before, torch.get_rng_state())


def test_processes_take_turns_in_one_order(few: Data) -> None:
    whole = epoch_of(make_train_loader(few), 4)
    for process in range(3):
        loader = prepare_data_loader(make_train_loader(few), num_processes=3, process_index=process)
        assert len(loader) == 4
        assert equal(whole[process::3], epoch_of(loader, 4))
        assert equal(whole[process::3][2:], epoch_of(loader, 4, start=2))


# What is refused


@pytest.mark.parametrize(
    ("spec", "root", "message"),
    [
        (
            "/no/such/folder",
            None,
            "neither a folder that exists nor a known name; expected 'fashion-mnist-10k'",
        ),
        ("fashion", None, "neither a folder that exists nor a known name"),
        ("torchvision:FashionMNIST", None, "needs root"),
        ("torchvision:NoSuchSet", ".", "torchvision.datasets has no 'NoSuchSet'"),
        ("torch/no_such_set", ".", "Unknown torchvision dataset no_such_set"),
        ("wds/none", "/no/such/folder", "timm cannot open 'wds/none'"),
    ],
)
def test_unknown_data_is_refused_with_what_was_expected(spec: str, root: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(spec, root=root)


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(
        DataError, match=r"found nothing to train and test on.*image folder \(train/ and val/"
    ):
        open_data(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="holds no class"):
        open_data(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir()
    with pytest.raises(DataError, match="no image in any class folder"):
        open_data(tmp_path)


def test_empty_class_is_refused(image_folder: Path) -> None:
    for split in ("train", "validation"):
        (image_folder / split / "ape").mkdir()
    data = open_data(image_folder)
    assert data.class_names == ("ape", "cat", "dog")
    with pytest.raises(DataError, match="train: no image in 1 of 3 classes: ape"):
        check_data(data, num_classes=3)


def test_class_lists_that_differ_are_refused(image_folder: Path) -> None:
    (image_folder / "validation" / "dog").rename(image_folder / "validation" / "wolf")
    with pytest.raises(DataError, match="only in train: dog; only in validation: wolf"):
        open_data(image_folder)


def test_class_count_that_does_not_match_the_head_is_refused(few: Data) -> None:
    with pytest.raises(
        DataError, match="head has 7 outputs, but the data set fashion-mnist-10k has 10 classes"
    ):
        check_data(few, num_classes=7)


@pytest.mark.parametrize(
    ("name", "keep"), [("cat/2.png", 0.7), ("dog/3.jpg", 0.7), ("dog/1.jpg", 0.0), ("cat/4.png", 0.01)]
)
def test_truncated_image_is_named_before_the_first_step(image_folder: Path, name: str, keep: float) -> None:
    path = image_folder / "validation" / name
    path = path if path.exists() else image_folder / "train" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match=f"unreadable or truncated images: .*{name}"):
        check_data(open_data(image_folder), num_classes=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_fails_to_decode_in_training_is_named(image_folder: Path, workers: int) -> None:
    data = open_data(image_folder)
    path = image_folder / "train" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:200])
    loader = make_train_loader(data, in_chans=3, batch_size=5, workers=workers)
    with pytest.raises(DataError, match=r"train/dog/1.jpg: unreadable or truncated image"):
        list(loader)


def test_file_that_is_no_image_is_named(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "notes.png").write_text("not an image")
    with pytest.raises(DataError, match=r"cat/notes\.png"):
        check_data(open_data(image_folder), num_classes=2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: raw[:-100] + bytes(100), "corrupt"),
        (lambda raw: b"", "got magic nothing"),
        (lambda raw: b"no gzip at all", "corrupt"),
        (
            lambda raw: gzip.compress(gzip.decompress(raw)[:-1], compresslevel=1),
            "got 7,840,015 bytes, expected 7,840,016",
        ),
        (
            lambda raw: gzip.compress(gzip.decompress(raw) + b"\0", compresslevel=1),
            "got 7,840,017 bytes, expected 7,840,016",
        ),
        (lambda raw: gzip.compress(b"\x00\x00\x0d\x03" + bytes(12)), "not an idx file of unsigned bytes"),
        (lambda raw: gzip.compress(b"\x00\x00\x08\x03\x00"), "truncated or corrupt"),
        (lambda raw: gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x02ab"), "do not belong together"),
    ],
    ids=[
        "cut",
        "bad end",
        "empty",
        "no gzip",
        "one byte short",
        "one too many",
        "floats",
        "cut header",
        "labels for images",
    ],
)
def test_damaged_idx_file_is_refused_by_name(idx_folder: Path, damage, message: str) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.*{message}"):
        open_data(idx_folder)


def test_missing_idx_file_is_refused_by_name(idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="the idx file t10k-labels-idx1-ubyte"):
        open_data(idx_folder)
    with pytest.raises(DataError, match="unreadable"):
        read_idx(idx_folder / "t10k-labels-idx1-ubyte.gz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 2}, "in_chans: got 2, expected 1 .*, 3 .* or 4 .*vtp.calibrate"),
        ({"in_chans": 4}, "color_jitter and auto_augment take images of 1 or 3 channels, got 4"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"image_size": (28, 0)}, "image_size: got"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 101}, "batch_size: got 101, expected at most 100"),
    ],
)
def test_arguments_out_of_range_are_refused(few: Data, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_train_loader(few, **options)


def test_positions_outside_of_the_epoch_and_other_loaders_are_refused(few: Data) -> None:
    loader = make_train_loader(few)
    for start in (-1, 13):
        with pytest.raises(DataError, match=f"start: got {start}, expected 0 to the 12"):
            set_epoch(loader, 0, start)
    with pytest.raises(DataError, match="expected a train_loader"):
        set_epoch(loaders.test_loader(few, image_size=28, in_chans=1, batch_size=8), 0)
    with pytest.raises(DataError, match="augment: got 'wild', expected one of light, deit, none"):
        Augment.preset("wild")


def test_sixteen_bit_images_are_not_clipped(tmp_path):
    batches = []
    for depth in (8, 16):
        rng = np.random.default_rng(0)
        for name in ("train/a", "train/b", "val/a", "val/b"):
            folder = tmp_path / str(depth) / name
            folder.mkdir(parents=True)
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            wide = pixels.astype(np.uint16) * 257
            Image.fromarray(pixels if depth == 8 else wide).save(folder / "0.png")
        data = open_data(tmp_path / str(depth))
        batches.append(next(iter(loaders.test_loader(data, image_size=28, in_chans=1, batch_size=2)))[0])
    assert torch.equal(*batches)


# Folders as people have them


def fill(folder: Path, names: dict[str, int], split: str = "train") -> Path:
    """split/<name>.<ending>: so many images of each name, in formats that their endings tell."""
    for name, count in names.items():
        path, ending = name.rsplit(".", 1)
        for number in range(count):
            file = folder / split / f"{path}{number}.{ending}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, dtype=np.uint8)).save(file)
    return folder


def test_images_at_any_depth_and_of_all_formats_of_torchvision_are_read(tmp_path: Path) -> None:
    endings = ("jpg", "JPEG", "png", "webp", "tif", "TIFF", "bmp", "ppm", "pgm")
    for split in ("train", "val"):
        fill(tmp_path, {f"cat/2023/{ending}/a.{ending}": 2 for ending in endings}, split)
        fill(tmp_path, {"cat/2024/b.png": 3, "dog/c.webp": 4}, split)
    data = open_data(tmp_path)
    check_data(data, num_classes=2)
    expected = torchvision.datasets.ImageFolder(tmp_path / "train")
    assert data.class_names == tuple(expected.classes) == ("cat", "dog")
    assert [tuple(sample) for sample in data.train.reader.samples] == expected.samples
    assert len(expected.samples) == 2 * len(endings) + 3 + 4
    assert data.notes == ()


def test_what_is_skipped_is_counted_and_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path, {"cat/a.png": 5, "dog/b.png": 5}, split)
    litter = ("cat/.ipynb_checkpoints/a0-checkpoint.png", "cat/._a1.png", "dog/Thumbs.db", ".DS_Store")
    for name in (*litter, "cat/notes.txt", "dog/deep/boxes.xml", "dog/animated.gif", "readme.md"):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = open_data(tmp_path)
    check_data(data, num_classes=2)
    assert data.class_names == ("cat", "dog") and len(data.train) == 10
    (note,) = data.notes
    assert note.startswith(f"{tmp_path}/train: 6 files are skipped (2 .png, 1 ")
    for name in (*litter[:2], "cat/notes.txt", "readme.md", "6 in all"):
        assert name in note


def test_one_file_that_is_skipped_is_one(tmp_path: Path) -> None:
    for split in ("train", "val"):
        fill(tmp_path, {"cat/a.png": 1, "dog/b.png": 1}, split)
    (tmp_path / "train" / "readme.md").write_text("x")
    (note,) = open_data(tmp_path).notes
    assert note == f"{tmp_path}/train: 1 file is skipped (1 .md): readme.md"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/{}.heic"], r"class 'cat' loses 4 files: cat/.\.heic, .*expected files with .* \.jpg"),
        (["cat/old/{}.npy"], r"class 'cat' loses 4 files: cat/old/"),
        (["dog/{}.gif"], "class 'dog' loses 4 files"),
        (["dog/{}"], "class 'dog' loses 4 files"),
        (["{}.png"], "outside of class folders 4 files"),
        (["cat/{}.xml", "dog/{}.txt", "dog/{}.json"], None),
    ],
)  # fmt: skip
def test_class_that_loses_more_than_a_few_images_is_refused(
    image_folder: Path, names: list[str], message: str | None
) -> None:
    for name in names:
        for number in range(4):
            file = image_folder / "train" / name.format(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
    if message is None:
        assert "12 files are skipped" in open_data(image_folder).notes[0]
        return
    with pytest.raises(DataError, match=message):
        open_data(image_folder)


def test_test_images_are_enough_to_evaluate(image_folder: Path) -> None:
    whole = open_data(image_folder)
    shutil.rmtree(image_folder / "train")
    with pytest.raises(DataError, match="found nothing to train and test on"):
        open_data(image_folder)
    options = {"image_size": 32, "in_chans": 3, "batch_size": 6}
    for folder in (image_folder, image_folder / "validation"):
        data = open_data(folder, train=False)
        assert data.train is None and data.class_names == ("cat", "dog")
        check_data(data, num_classes=2)
        assert equal(*(list(loaders.test_loader(each, **options)) for each in (whole, data)))
    assert open_data(train=False).class_names == open_data().class_names


def test_images_need_not_be_square(image_folder: Path) -> None:
    data = open_data(image_folder)
    options = {"image_size": (24, 48), "in_chans": 3, "batch_size": 2}
    for preset in ("light", "deit"):
        batches = train_loader(data, augment=Augment.preset(preset, 48), seed=0, **options)
        assert {images.shape for images, _ in batches} == {(2, 3, 24, 48)}
    images = torch.cat([images for images, _ in loaders.test_loader(data, **options)])
    transform = create_transform((3, 24, 48), crop_pct=1.0, interpolation="bicubic")
    for index, image in enumerate(images):
        torch.testing.assert_close(image, transform(data.test[index][0].convert("RGB")))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_crop_mode_of_the_model_is_kept(image_folder: Path, crop_mode: str) -> None:
    data = open_data(image_folder).for_model({"crop_mode": crop_mode, "crop_pct": 0.9, "mean": None})
    (images, _), *_ = loaders.test_loader(data, image_size=32, in_chans=3, batch_size=2)
    transform = create_transform((3, 32, 32), crop_pct=0.9, crop_mode=crop_mode, interpolation="bicubic")
    for index in range(2):
        torch.testing.assert_close(images[index], transform(data.test[index][0].convert("RGB")))


def test_idx_files_of_another_set_are_not_called_fashion(tmp_path: Path) -> None:
    for split, count in (("train", 40), ("t10k", 26)):
        images = np.random.default_rng(0).integers(0, 256, (count, 6, 6), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 26
        for name, array in ((IDX_NAMES[0], images), (IDX_NAMES[1], labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
            (tmp_path / f"{split}-{name}").write_bytes(header + array.tobytes())
    data = open_data(tmp_path)
    check_data(data, num_classes=26)
    assert data.class_names == () and open_data(EMBEDDED_FOLDER).class_names[0] == "T-shirt/top"
    train = data.train.images / 255
    assert data.mean == (pytest.approx(train.mean(), abs=1e-4),)
    assert data.std == (pytest.approx(train.std(), abs=1e-4),)
