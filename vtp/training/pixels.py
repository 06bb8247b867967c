"""What the values of an image's pixels mean: from whatever Pillow opens to 8 bits a channel.

An image of more than 8 bits says by how much its values are shifted against white only by convention: 65,535
is white in 16 bits, 1 in floating point. Files that hold 10, 12 or 14 bits in 16, or counts of a sensor in
floating point, break it, and would become black. Hence a set of such images is looked at first: values that
come near to white confirm the convention, others are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

# By number of channels. Four are the bands of a file as they are: CMYK is Pillow's mode of four bands of
# which none is alpha, by which resizing would multiply the others.
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
_FOUR_BANDS = ("RGBA", "RGBX", "CMYK")
SAMPLES_PER_PIXEL = 277  # a tag of TIFF
CHANNELS = "1 (grey), 3 (RGB) or 4 (RGB and one more)"
DEEP_MODES = ("I", "F")
# Of Pillow's decoders that read 16 bits a channel and keep 8 of them.
_DEEP_RAW_MODE = re.compile(r"(L|LA|RGB|RGBA|RGBX|RGBa|CMYK);16[BLN]")
NEAR_WHITE = 0.5  # share of full scale that the brightest pixel of a set of deep images has to reach


class DataError(ValueError):
    """The data cannot be used as asked; the message names what is wrong and what was expected."""


def is_deep(image: Image.Image) -> bool:
    """Whether an image is stored with more than 8 bits a channel: to be asked before it is decoded."""
    if image.mode in DEEP_MODES or image.mode.startswith("I;16"):
        return True
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if arguments and isinstance(arguments[0], str) and _DEEP_RAW_MODE.fullmatch(arguments[0]):
            return True
    return False


def check_depth(images: Iterable[tuple[str, Image.Image]]) -> None:
    """DataError unless the values of deep images, each with its name, are known as shares of full scale."""
    brightest, where = 0.0, ""
    for name, image in images:
        level = brightest_level(name, image)
        if not where or level > brightest:
            brightest, where = level, name
    if where and brightest < NEAR_WHITE:
        raise DataError(
            f"images of more than 8 bits a channel, such as {where}: their values reach only {brightest:.1%} "
            "of full scale, as those of 12 bits in 16 would; expected some that come near to white: scale "
            "them to 0..65535, or save them with 8 bits"
        )


def brightest_level(name: str, image: Image.Image) -> float:
    """The largest value of an image as a share of full scale; DataError where it has values that are none."""
    if image.mode in DEEP_MODES or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        full = 1.0 if image.mode == "F" else 65535.0
        low, high = float(pixels.min()) / full, float(pixels.max()) / full
        if not (low >= 0 and high <= 1):  # also where one is not a number
            raise _unknown_range(name, image.mode, low * full, high * full)
        return high
    bands = image.split()[: 1 if image.mode == "LA" else 3]  # without alpha
    return max(band.getextrema()[1] for band in bands) / 255


def to_8_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel; DataError where a value is beyond full scale.

    Pillow's own conversion would clip 16 bits to white, and make 0..1 black.
    """
    if image.mode.startswith("I;16") or image.mode in DEEP_MODES:
        brightest_level("image", image)
        pixels = np.asarray(image)
        pixels = pixels * 255 + 0.5 if image.mode == "F" else pixels.astype(np.int64) >> 8
        return Image.fromarray(pixels.astype(np.uint8))
    return image


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image with 8 bits in each of 1, 3 or 4 channels, in the mode of `MODES`.

    Raises:
        DataError: a value is beyond full scale; four channels are wanted of a TIFF whose fourth is not read.
    """
    mode = MODES[channels]
    if channels == 4:
        samples = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 0)
        if samples > len(image.getbands()):
            raise DataError(
                f"image: a TIFF of {samples} channels, of which Pillow reads {len(image.getbands())} as the "
                "last one is not marked as alpha; expected an RGBA file"
            )
        if image.mode not in _FOUR_BANDS:
            image = to_8_bit(image).convert("RGBA")
        return Image.frombytes(mode, image.size, image.tobytes())
    return image if image.mode == mode else to_8_bit(image).convert(mode)


def _unknown_range(name: str, mode: str, low: float, high: float) -> DataError:
    expected = "0..1" if mode == "F" else "0..65535"
    return DataError(
        f"{name}: pixels of mode {mode!r} with values from {low:g} to {high:g}, whose range is not known; "
        f"expected {expected}, or images of 8 bits"
    )
