"""From one image to the pixels that a model sees, augmented or as it is evaluated.

The transforms are timm's; they draw from the global generators of Python, NumPy and torch.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

from vtp.model.images import default_crop_pct, for_channels
from vtp.training.data import Data, DataError
from vtp.training.pixels import CHANNELS, MODES, with_channels

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


def training_pipeline(data: Data, image_size: tuple[int, int], in_chans: int, augment: Augment) -> Pipeline:
    """How the training images of a data set are made: of this size (height, width) and number of channels.

    Raises:
        DataError: the augmentation does not go with the channels.
    """
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


def evaluation_pipeline(data: Data, image_size: tuple[int, int], in_chans: int) -> Pipeline:
    """How the images of a data set are made for an evaluation: of this size (height, width) and channels."""
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
    checked_size(tuple(size), channels)
    steps = create_transform(**config, use_prefetcher=True).transforms[:-1]  # as above
    return Pipeline(steps, config["mean"], config["std"], erasing=None)


def checked_size(image_size: int | tuple[int, int], in_chans: int) -> tuple[int, int]:
    """(height, width) of the images; DataError where an argument is out of range."""
    if in_chans not in MODES:
        raise DataError(
            f"in_chans: got {in_chans}, expected {CHANNELS}: image files hold no other number; batches of "
            "your own are taken by vtp.calibrate, vtp.compact and every model"
        )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise DataError(f"image_size: got {image_size}, expected at least 1 pixel")
    return size
