"""Batches of images: an order that is reproducible sample by sample, and the loaders of both sets.

`train_loader` and `test_loader` turn the sets of a `Data` into batches of normalised float32 tensors, and
`calibration_loader` some of its training images, all by `transforms.py`; `test_images` and
`calibration_images` are the last two as a model expects them.

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
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image
from timm.data.readers.reader_wds import ReaderWds
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from vtp.group import Group, place
from vtp.runtime.optimize import OptimizedViT
from vtp.training.data import Data, DataError
from vtp.training.pixels import is_deep
from vtp.training.seeding import generators_restored, seed_generators, seeds
from vtp.training.sources import shards_of
from vtp.training.transforms import Augment, Pipeline, checked_size, evaluation_pipeline, training_pipeline
from vtp.words import counted

# Images among which those of shards are shuffled, and of which indices are made at a time.
WINDOW = 65_536

# ---------------------------------------------------------------------------------------------------------
# Which images, in which order, in batches


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
        for window in self._windows(torch.Generator().manual_seed(seeds(self.seed, epoch)[2])):
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
        for number, shard in enumerate(torch.randperm(len(self.shards), generator=generator).tolist(), 1):
            window.append(torch.arange(ends[shard] - self.shards[shard], ends[shard]))
            if number == len(self.shards) or sum(map(len, window)) >= WINDOW:
                indices = torch.cat(window)
                yield indices[torch.randperm(len(indices), generator=generator)]
                window = []

    def position(self, epoch: int, skip: int) -> None:
        """Begin the next iterations with sample number `skip` of `epoch`'s order."""
        self.epoch, self.skip = epoch, skip


class TrainingSet(Dataset):
    """Batches of augmented samples: takes the (epoch, index) pairs of `EpochSampler`, a batch at a time."""

    def __init__(self, images: Dataset, pipeline: Pipeline, seed: int) -> None:
        self.images, self.pipeline, self.seed = images, pipeline, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = [], []
        with generators_restored():
            for epoch, index in keys:
                image, label = _sample(self.images, index)
                seed_generators(self.seed, epoch, index)
                pixels.append(self.pipeline.pixels(image))
                labels.append(label)
            batch = self.pipeline.batch(pixels)
            if self.pipeline.erasing is not None:
                for (epoch, index), image in zip(keys, batch, strict=True):
                    seed_generators(self.seed, epoch, index, 1)
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
        text = f"of a stream of {counted(known, 'image')}" if known else "of a stream"
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
            with generators_restored():
                seed_generators(self.seed, self.epoch, 0 if worker is None else worker.id, number)
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
    pipeline = training_pipeline(data, _checked(image_size, in_chans, batch_size), in_chans, augment)
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
    pipeline = evaluation_pipeline(data, _checked(image_size, in_chans, batch_size), in_chans)
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
    pipeline = evaluation_pipeline(data, size, in_chans)
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
    size = checked_size(image_size, in_chans)
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


def test_images(model: nn.Module, data: Data, *, batch_size: int = 256, workers: int = 0) -> DataLoader:
    """All test images, in their order, of the model's size and channels: a loader of (images, labels)."""
    return test_loader(data, **loader_arguments(model, data, batch_size, workers))


test_images.__test__ = False  # not a test case of pytest


def calibration_images(
    model: nn.Module,
    data: Data,
    images: int,
    *,
    seed: int = 0,
    batch_size: int = 128,
    workers: int = 0,
    group: Group = None,
) -> DataLoader:
    """So many training images, not augmented and of the model's size and channels, for `vtp.calibrate` and
    `vtp.compact`: a loader that draws the same ones, without replacement, each time it is read; of them the
    share of this process, where a group shares them."""
    arguments = loader_arguments(model, data, min(batch_size, max(images, 1)), workers)
    return calibration_loader(data, images=images, seed=seed, place=place(group), **arguments)


def loader_arguments(model: nn.Module, data: Data, batch_size: int, workers: int) -> dict[str, Any]:
    """Arguments of all three loaders, with image size, (height, width) in pixels, and channels as a model
    expects them.

    Raises:
        ValueError: it takes images of any size.
    """
    edge = data.image_size
    if isinstance(model, OptimizedViT):
        channels, size = model.images.channels, model.images.size
    else:
        embed = model.patch_embed
        channels, size = embed.proj.in_channels, embed.img_size or (edge, edge)
    if None in size:
        raise ValueError("model: takes images of any size, and the data's are of several; expected one size")
    return {
        "image_size": tuple(size),
        "in_chans": channels,
        "batch_size": batch_size,
        "workers": workers,
    }


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
        raise DataError(
            f"start: got {start}, expected 0 to the {counted(len(loader), 'batch', 'batches')} of an epoch"
        )
    if isinstance(loader.dataset, StreamSet):
        loader.dataset.epoch = epoch
        loader.skip_batches = start
        bare = getattr(loader, "base_dataloader", loader)
        bare.generator = torch.Generator().manual_seed(seeds(loader.dataset.seed, epoch)[2])
        return
    batches, processes = loader.batch_sampler, 1
    if isinstance(batches, BatchSamplerShard):
        processes = 1 if batches.split_batches else batches.num_processes
        batches = batches.batch_sampler
    if not isinstance(batches.sampler, EpochSampler):
        raise DataError(f"loader: got one with a {type(batches.sampler).__name__}, expected a train_loader")
    batches.sampler.position(epoch, skip=start * processes * batches.batch_size)
