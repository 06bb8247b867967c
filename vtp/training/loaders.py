"""Batches of images: augmentation that is reproducible sample by sample, and the loaders of both sets.

`train_loader` and `test_loader` turn the sets of a `Data` into batches of normalised float32 tensors, and
`calibration_loader` some of its training images; transforms and augmentation are timm's.

**What is reproducible.** The order of an epoch is a function of (seed, epoch), and the augmentation of a
sample a function of (seed, epoch, sample index): neither depends on the number of workers, on the process, or
on where in the epoch one starts. To that end the sampler hands out (epoch, index) pairs, so that a worker
that outlives an epoch needs no message from the training loop, and every sample is transformed after the
three global generators that transforms draw from (Python's, NumPy's and torch's) were seeded from (seed,
epoch, index). They are restored afterwards: loading data does not disturb the dropout of the model.

**Several processes.** `prepared` gives each process every n-th batch of the one order, by Accelerate: with
batches of b images on n processes a step has the images of a batch of n x b on one. `set_epoch` works on a
prepared loader as on a bare one.

**Streams** (timm's "wds/" sets at an address, "hfids/" and "tfds/", read in sequence) promise less: the same
seed, epoch and numbers of processes and workers give the same batches, and starting in the middle of an epoch
reads and drops what comes before. On several processes each trains on shards of its own of a "wds/" set, of
which some images then come twice in an epoch, or not at all; of other streams, and of test images, the first
process reads all and hands them out.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.readers.reader_wds import ReaderWds
from timm.data.transforms import ResizeKeepRatio
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchvision import transforms

from vtp.model.images import default_crop_pct, for_channels
from vtp.training.data import Data, DataError
from vtp.training.pixels import CHANNELS, MODES, is_deep, with_channels
from vtp.training.sources import shards_of
from vtp.words import counted

# Images among which those of shards are shuffled, and of which indices are made at a time.
WINDOW = 65_536
# Up to this edge DeiT replaces the random resized crop by a shifted one.
DEIT_SMALL_IMAGE = 32


@dataclass(frozen=True)
class Augment:
    """How training images are varied; the names are those of DeiT's and timm's command lines.

    Mixup and CutMix work on batches and belong to the training loop.

    Attributes:
        crop_padding: if not None, the crop is a shift by at most so many pixels (black comes in) instead of a
            random resized crop; `scale`, `ratio` and `interpolation` then have no part.
        scale, ratio: area (share of the image) and aspect ratio of the random resized crop.
        interpolation: of the random resized crop and of RandAugment ("bilinear", "bicubic" or "random").
        hflip: probability of a horizontal flip.
        color_jitter: brightness, contrast and saturation; without effect beside `auto_augment`, as in timm.
        auto_augment: a policy in timm's spelling, or None.
        reprob, remode, recount: random erasing: probability, filling, most regions.
    """

    crop_padding: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "random"
    hflip: float = 0.5
    color_jitter: float = 0.4
    auto_augment: str | None = None
    reprob: float = 0.0
    remode: str = "const"
    recount: int = 1

    @classmethod
    def preset(cls, name: str, image_size: int = 224) -> Augment:
        """A named choice: "light" (shift by 2 and flip), "deit" (as DeiT was trained) or "none".

        DeiT's own code shifts by 4 instead of cropping where images are 32 pixels or smaller; so does "deit".
        """
        presets = {
            "light": cls(crop_padding=2, color_jitter=0.0),
            "deit": cls(
                crop_padding=4 if image_size <= DEIT_SMALL_IMAGE else None,
                interpolation="bicubic",
                color_jitter=0.3,
                auto_augment="rand-m9-mstd0.5-inc1",
                reprob=0.25,
                remode="pixel",
            ),
            "none": cls(crop_padding=0, hflip=0.0, color_jitter=0.0),
        }
        if name not in presets:
            raise DataError(f"augment: got {name!r}, expected one of {', '.join(presets)}")
        return presets[name]


# ---------------------------------------------------------------------------------------------------------
# Reproducible randomness


def _seeds(*numbers: int) -> tuple[int, int, int]:
    """Seeds for Python's, NumPy's and torch's generator: well-mixed functions of all the int64 numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=20).digest()
    return struct.unpack("<QIQ", digest)


def _seed_generators(*numbers: int) -> None:
    for_python, for_numpy, for_torch = _seeds(*numbers)
    random.seed(for_python)
    np.random.seed(for_numpy)
    # Not torch.manual_seed, which also seeds every accelerator's generator and is 200 times as slow.
    torch.default_generator.manual_seed(for_torch)


@contextmanager
def _generators_restored() -> Iterator[None]:
    """Leave the three global generators as they were found, unless this is a worker process, where nobody
    else draws from them."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class EpochSampler(Sampler):
    """Yields (epoch, index) for each sample of an epoch, in an order that (seed, epoch) determines.

    `position` takes effect with the next iteration, and stays until it is called again. The length is always
    that of a whole epoch.

    Args:
        shards: where the samples lie in shards one after the other, the number of samples of each. Then the
            shards are shuffled, and samples among those of as many neighbours in that order as hold WINDOW:
            what is read at a time lies in a few files, which a disk or a file server can hold in its cache.
    """

    def __init__(self, samples: int, seed: int, shards: Sequence[int] | None = None) -> None:
        self.samples, self.seed = samples, seed
        self.shards = [samples] if shards is None else list(shards)
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip = self.epoch, self.skip
        for window in self._windows(torch.Generator().manual_seed(_seeds(self.seed, epoch)[2])):
            # A list of all indices would take 40 bytes for each.
            for piece in window[min(skip, len(window)) :].split(WINDOW):
                yield from zip(itertools.repeat(epoch), piece.tolist())
            skip = max(0, skip - len(window))

    def _windows(self, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """The order of the epoch in parts, int64."""
        if len(self.shards) == 1:
            yield torch.randperm(self.samples, generator=generator)
            return
        ends = torch.tensor(self.shards).cumsum(0).tolist()
        window: list[torch.Tensor] = []
        for place, shard in enumerate(torch.randperm(len(self.shards), generator=generator).tolist(), 1):
            window.append(torch.arange(ends[shard] - self.shards[shard], ends[shard]))
            if place == len(self.shards) or sum(map(len, window)) >= WINDOW:
                indices = torch.cat(window)
                yield indices[torch.randperm(len(indices), generator=generator)]
                window = []

    def position(self, epoch: int, skip: int) -> None:
        """Begin the next iterations with sample number `skip` of `epoch`'s order."""
        self.epoch, self.skip = epoch, skip


# ---------------------------------------------------------------------------------------------------------
# From images to batches


class ShiftedCrop:
    """A crop of `size` (height, width) pixels from around the centre, shifted at random by at most `padding`
    pixels in each direction; what lies outside of the image is black.

    torchvision's RandomCrop(size, padding) makes the same image by padding it first, at six times the cost.
    """

    def __init__(self, size: tuple[int, int], padding: int) -> None:
        self.size, self.padding = size, padding

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        left = (image.width - width) // 2 + random.randint(-self.padding, self.padding)
        top = (image.height - height) // 2 + random.randint(-self.padding, self.padding)
        return image.crop((left, top, left + width, top + height))


class Pipeline:
    """Makes normalised tensors of PIL images: timm's transforms image by image, then, as in timm's own
    prefetching loader, conversion and normalisation batch by batch, which is several times cheaper.

    Random erasing comes last, on normalised pixels, image by image with a seed for each.
    """

    def __init__(
        self, steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...], erasing: RandomErasing | None
    ) -> None:
        self.steps = transforms.Compose(steps)
        self.channels = len(mean)
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        self.erasing = erasing

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The transformed image, uint8 [H, W, C]; draws from the global generators."""
        pixels = np.asarray(self.steps(with_channels(image, self.channels)))
        return pixels.reshape(*pixels.shape[:2], -1)

    def batch(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """float32 [B, C, H, W], normalised."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        batch = batch.to(torch.float32, memory_format=torch.contiguous_format)
        return batch.div_(255).sub_(self.mean).div_(self.std)


def _training_pipeline(data: Data, image_size: tuple[int, int], in_chans: int, augment: Augment) -> Pipeline:
    if in_chans == 4 and (augment.auto_augment or augment.color_jitter):
        raise DataError(
            "augment: color_jitter and auto_augment take images of 1 or 3 channels, got 4; expected neither, "
            "as in --augment light"
        )
    mean, std = for_channels(data.mean, in_chans), for_channels(data.std, in_chans)
    steps = create_transform(
        image_size,
        is_training=True,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter or None,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        mean=mean,
        use_prefetcher=True,
    ).transforms[:-1]  # the last one converts to a tensor
    if augment.crop_padding is not None:
        steps[0] = ShiftedCrop(image_size, augment.crop_padding)
        height, width = image_size
        if height != width:
            steps.insert(0, ResizeKeepRatio(image_size, interpolation="bicubic"))
        elif data.image_size != height:
            steps.insert(0, transforms.Resize(height, transforms.InterpolationMode.BICUBIC))
    _keep_one_bit(steps)
    erasing = None
    if augment.reprob > 0:
        erasing = RandomErasing(augment.reprob, mode=augment.remode, max_count=augment.recount, device="cpu")
    return Pipeline(steps, mean, std, erasing)


def _keep_one_bit(steps: list[Any]) -> None:
    """Let the posterizing of timm's policies keep at least one bit of each pixel.

    At the end of its range timm asks Pillow for 0 bits, a black image, which Pillow 13 refuses.
    """
    for step in steps:
        policy = itertools.chain(getattr(step, "ops", ()), *getattr(step, "policy", ()))
        for operation in policy:
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(level_fn: Callable, level: float, hparams: dict[str, Any]) -> tuple[int]:
    (bits,) = level_fn(level, hparams)
    return (max(1, bits),)


def _test_pipeline(data: Data, image_size: tuple[int, int], in_chans: int) -> Pipeline:
    return image_pipeline(
        {
            "input_size": (in_chans, *image_size),
            "mean": for_channels(data.mean, in_chans),
            "std": for_channels(data.std, in_chans),
            "crop_pct": default_crop_pct(*image_size) if data.crop_pct is None else data.crop_pct,
            "crop_mode": data.crop_mode,
            "interpolation": data.interpolation,
        }
    )


def image_pipeline(config: Mapping[str, Any]) -> Pipeline:
    """How a model's images are made for an evaluation: `config` is that of `vtp.model.images.image_config`.

    Raises:
        DataError: image files do not hold so many channels.
    """
    channels, *size = config["input_size"]
    _checked(tuple(size), channels, batch_size=1)
    steps = create_transform(**config, use_prefetcher=True).transforms[:-1]  # as above
    return Pipeline(steps, config["mean"], config["std"], erasing=None)


class TrainingSet(Dataset):
    """Batches of augmented samples: takes the (epoch, index) pairs of `EpochSampler`, a batch at a time."""

    def __init__(self, images: Dataset, pipeline: Pipeline, seed: int) -> None:
        self.images, self.pipeline, self.seed = images, pipeline, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = [], []
        with _generators_restored():
            for epoch, index in keys:
                image, label = _sample(self.images, index)
                _seed_generators(self.seed, epoch, index)
                pixels.append(self.pipeline.pixels(image))
                labels.append(label)
            batch = self.pipeline.batch(pixels)
            if self.pipeline.erasing is not None:
                for (epoch, index), image in zip(keys, batch, strict=True):
                    _seed_generators(self.seed, epoch, index, 1)
                    self.pipeline.erasing(image)  # in place
        return batch, _stacked(labels)


class EvaluationSet(Dataset):
    """Batches of samples as they are: takes indices, a batch at a time."""

    def __init__(self, images: Dataset, pipeline: Pipeline) -> None:
        self.images, self.pipeline = images, pipeline

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [_sample(self.images, index) for index in indices]
        batch = self.pipeline.batch([self.pipeline.pixels(image) for image, _ in samples])
        return batch, _stacked([label for _, label in samples])


def _stacked(labels: list[Any]) -> torch.Tensor:
    """Classes int64 [B], or where a label has one number for each class float32 [B, classes]."""
    if np.ndim(labels[0]) == 0:
        return torch.tensor(labels, dtype=torch.int64)
    return torch.stack([torch.as_tensor(label, dtype=torch.float32) for label in labels])


def _sample(images: Dataset, index: int) -> tuple[Image.Image, int]:
    try:
        return images[index]
    except DataError:
        raise
    except Exception as error:  # of torchvision's data sets, which name neither file nor number
        raise DataError(f"image number {index} of {type(images).__name__}: unreadable ({error})") from error


class StreamSet(IterableDataset):
    """Samples of one of timm's sequential readers, augmented: (float32 [C, H, W], int).

    relabel: gives the label for one that the reader gives; None leaves them as they are.
    """

    def __init__(
        self, reader: Any, pipeline: Pipeline, seed: int, relabel: Callable[[int], int] | None = None
    ) -> None:
        self.reader, self.pipeline, self.seed, self.relabel = reader, pipeline, seed, relabel
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.reader)

    def in_words(self) -> str:
        """Which images an epoch has, and what their order depends on."""
        reader = self.reader
        known = getattr(reader, "num_samples", None)
        text = f"of a stream of {known:,} images" if known else "of a stream"
        if reader.global_num_workers > 1:
            text += (
                f", of which {reader.global_num_workers} readers have shards of their own: some images come "
                "twice, or not at all"
            )
        return f"{text}; the order depends on the numbers of processes and workers"

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        # A copy, because a reader that has been read keeps the state of its shuffling for its next epoch.
        reader = copy.copy(self.reader)
        reader.set_epoch(self.epoch)
        worker = get_worker_info()
        for number, (image, label) in enumerate(reader):
            if is_deep(image):
                raise DataError(
                    f"data: image {number} of a stream has more than 8 bits a channel (mode {image.mode!r}), "
                    "whose meaning takes a look at many; expected 8 bits, or an image folder"
                )
            with _generators_restored():
                _seed_generators(self.seed, self.epoch, 0 if worker is None else worker.id, number)
                sample = self.pipeline.batch([self.pipeline.pixels(image)])[0]
                if self.pipeline.erasing is not None:
                    self.pipeline.erasing(sample)
            yield sample, int(label) if self.relabel is None else self.relabel(int(label))


class StreamLoader(DataLoader):
    """A DataLoader that drops its first `skip_batches` batches, as Accelerate's loaders do, and ends before
    batch number `stop_batches` unless that is None. Of each batch it gives what `place` has (see
    `calibration_loader`)."""

    skip_batches = 0
    stop_batches: int | None = None
    place = (0, 1)

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(super().__iter__(), self.skip_batches, self.stop_batches)
        return batches if self.place == (0, 1) else self._dealt(batches)

    def _dealt(self, batches: Iterator[Any]) -> Iterator[Any]:
        (number, size), before = self.place, 0
        for images, labels in batches:
            own = slice((number - before) % size, None, size)
            before += len(images)
            yield images[own], labels[own]


# ---------------------------------------------------------------------------------------------------------
# Loaders


def _as_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate function for sets that make whole batches themselves."""
    return batch


def train_loader(
    data: Data,
    *,
    image_size: int | tuple[int, int],
    in_chans: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    workers: int = 0,
) -> DataLoader:
    """Shuffled, augmented batches of the training set; the last incomplete batch is dropped.

    Call `set_epoch` before each epoch: without it the loader repeats the epoch it is at (0 at first). timm's
    create_loader does not fit, because it takes no sampler; its transforms are used as they are.

    Args:
        image_size: of the images that the model takes, in pixels: (height, width), or the edge of a square.
        in_chans: 1 (grey), 3 (RGB) or 4 (RGB and one more, as in RGBA files), to which images are converted.
        batch_size: for each process.
        seed: int64; with the epoch it determines order and augmentation.
        workers: processes that load; 0 loads in this one.

    Returns:
        A loader of (float32 [B, C, H, W] normalised, int64 [B]; float32 [B, classes] where an image may be
        of several classes).

    Raises:
        DataError: an argument out of range, fewer images than one batch, or fewer shards of a
            stream than processes that read it.
            In iteration: an image that cannot be decoded, by name.
    """
    pipeline = _training_pipeline(data, _checked(image_size, in_chans, batch_size), in_chans, augment)
    if isinstance(data.train, IterableDataset):
        return _stream_loader(data.train, pipeline, batch_size, seed, workers, drop_last=True)
    if len(data.train) < batch_size:
        raise DataError(
            f"batch_size: got {batch_size}, expected at most {len(data.train)}, the number of training images"
        )
    shards = shards_of(data.train)
    return DataLoader(
        TrainingSet(data.train, pipeline, seed),
        batch_size,
        sampler=EpochSampler(len(data.train), seed, shards and shards.lengths),
        drop_last=True,
        collate_fn=_as_is,
        **_loader_options(workers),
    )


def test_loader(
    data: Data, *, image_size: int | tuple[int, int], in_chans: int, batch_size: int, workers: int = 0
) -> DataLoader:
    """Batches of the whole test set in its order, without augmentation; arguments and batches as in
    `train_loader`, but the last batch may be smaller."""
    pipeline = _test_pipeline(data, _checked(image_size, in_chans, batch_size), in_chans)
    if isinstance(data.test, IterableDataset):
        return _stream_loader(data.test, pipeline, batch_size, seed=0, workers=workers, drop_last=False)
    return DataLoader(
        EvaluationSet(data.test, pipeline), batch_size, collate_fn=_as_is, **_loader_options(workers)
    )


test_loader.__test__ = False  # not a test case of pytest


def calibration_count(data: Data, images: int) -> int:
    """How many training images `calibration_loader` gives where so many are asked for, of a stream in whole
    batches."""
    return images if isinstance(data.train, IterableDataset) else min(images, len(data.train))


def calibration_loader(
    data: Data,
    *,
    images: int,
    image_size: int | tuple[int, int],
    in_chans: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
    place: tuple[int, int] = (0, 1),
) -> DataLoader:
    """Batches of some training images as they are evaluated, the same ones in each iteration.

    Args:
        images: how many; all, where there are not so many. Of a stream whole batches.
        seed: which ones: they are drawn without replacement.
        image_size, in_chans, batch_size, workers: and the batches, as in `train_loader`; the last batch may
            be smaller.
        place: the number of this process and how many share the images, which are dealt in turn: each image
            goes to one, and there may be none for some. Each reads all of a stream, and drops the others'.
    """
    size = _checked(image_size, in_chans, batch_size)
    if images < 1:
        raise DataError(f"images: got {images}, expected at least 1")
    pipeline = _test_pipeline(data, size, in_chans)
    if isinstance(data.train, IterableDataset):
        loader = _stream_loader(data.train, pipeline, batch_size, seed, workers, drop_last=False)
        loader.stop_batches, loader.place = -(-images // batch_size), place
        return loader
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    return DataLoader(
        EvaluationSet(data.train, pipeline),
        batch_size,
        sampler=order[:images][place[0] :: place[1]].tolist(),
        collate_fn=_as_is,
        **_loader_options(workers),
    )


def _checked(image_size: int | tuple[int, int], in_chans: int, batch_size: int) -> tuple[int, int]:
    """(height, width) of the images; DataError where an argument is out of range."""
    if in_chans not in MODES:
        raise DataError(
            f"in_chans: got {in_chans}, expected {CHANNELS}: image files hold no other number; batches of "
            "your own are taken by vtp.calibrate, vtp.compact and every model"
        )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"image_size: got {image_size}, expected at least 1 pixel")
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}, expected at least 1")
    return size


def _loader_options(workers: int) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
        # A generator of its own: a DataLoader draws a seed for its workers at the start of each iteration,
        # from the global generator if it has none; a resumed epoch would draw once more than a whole one.
        "generator": torch.Generator().manual_seed(0),
    }


def _stream_loader(
    images: IterableDataset, pipeline: Pipeline, batch_size: int, seed: int, workers: int, drop_last: bool
) -> StreamLoader:
    """A loader of a stream; with `drop_last`, for training, of what this process has to read of it."""
    reader = copy.copy(images.reader)
    reader.common_seed = reader.worker_seed = seed
    reader.batch_size = batch_size
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    shards = len(reader.split_info.filenames) if isinstance(reader, ReaderWds) else None
    if drop_last and shards is not None:
        if processes * max(workers, 1) > shards:
            raise DataError(
                f"workers: got {workers} on each of {processes} processes, expected as many in all as there "
                f"are shards, {shards}, or fewer: each reads shards of its own"
            )
        reader.dist_num_replicas = processes
        reader.dist_rank = torch.distributed.get_rank() if processes > 1 else 0
    elif processes > 1 and not drop_last:
        workers = min(workers, 1)  # of several each has a last batch that Accelerate cannot hand out evenly
    reader.set_loader_cfg(num_workers=workers)
    # Workers that end with the epoch: their seeds are drawn, and the epoch reaches them, when they start.
    options = _loader_options(workers) | {"persistent_workers": False}
    stream = StreamSet(reader, pipeline, seed, images.target_transform)
    return StreamLoader(stream, batch_size, drop_last=drop_last, **options)


def prepared(loader: DataLoader, accelerator: Accelerator) -> DataLoader:
    """The loader of this process's share of the batches, which lie on its device."""
    if _reads_a_share(loader):
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            dispatch_batches=False,
        )  # fmt: skip
    return accelerator.prepare_data_loader(loader)


def _reads_a_share(loader: DataLoader) -> bool:
    """Whether the loader reads what is for one of several processes, and there is nothing to share out."""
    return isinstance(loader.dataset, StreamSet) and loader.dataset.reader.dist_num_replicas > 1


def epoch_in_words(loader: DataLoader, steps: int, images: int) -> str:
    """Which images an epoch of a training loader has, and how many it leaves out.

    Args:
        loader: bare or `prepared`. steps: of an epoch; images: of a step, of all processes together.
    """
    text = f"an epoch is {counted(steps, 'step')} of {counted(images, 'image')}"
    if isinstance(loader.dataset, StreamSet):
        return f"{text}, {loader.dataset.in_words()}"
    left_out = len(loader.dataset) - steps * images
    if not left_out:
        return f"{text}, all {len(loader.dataset):,} of them"
    others = "another one" if left_out == 1 else "others"
    return (
        f"{text}: of {len(loader.dataset):,} images {counted(left_out, 'is', 'are')} left out, in each epoch "
        f"{others}"
    )


def set_epoch(loader: DataLoader, epoch: int, start: int = 0) -> None:
    """Make the next iterations of a training loader yield batches start, start + 1, ... of `epoch`.

    Args:
        loader: from `train_loader`, bare or prepared by Accelerate; start then counts the batches of each
            process, of which the n processes take turns in the epoch's one order.
        epoch: 0 or more.
        start: 0 to len(loader), which stays the number of batches of a whole epoch.
    """
    if not 0 <= start <= len(loader):
        raise DataError(f"start: got {start}, expected 0 to the {len(loader)} batches of an epoch")
    if isinstance(loader.dataset, StreamSet):
        loader.dataset.epoch = epoch
        loader.skip_batches = start
        bare = getattr(loader, "base_dataloader", loader)
        bare.generator = torch.Generator().manual_seed(_seeds(loader.dataset.seed, epoch)[2])
        return
    batches, processes = loader.batch_sampler, 1
    if isinstance(batches, BatchSamplerShard):
        processes = 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    if not isinstance(batches.sampler, EpochSampler):
        raise DataError(f"loader: got one with a {type(batches.sampler).__name__}, expected a train_loader")
    batches.sampler.position(epoch, skip=start * processes * batches.batch_size)
