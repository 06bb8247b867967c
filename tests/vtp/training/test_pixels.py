"""vtp.training.pixels: images of more than 8 bits keep their meaning, or are refused; channels stay apart."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vtp.model.images import image_config
from vtp.training import loaders, transforms
from vtp.training.data import DataError, check_data, open_data
from vtp.training.pixels import is_deep, to_8_bit, with_channels
from vtp.training.sources import open_images
from vtp.zoo import open_model

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (28, 28), dtype=np.uint8)
PIXELS.flat[0] = 255
COLOURS = RNG.integers(0, 256, (28, 28, 3), dtype=np.uint8)
COLOURS.flat[0] = 255


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, which Pillow writes of grey images only: pixels uint16 [H, W, 3]."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def write(folder, name: str, content: np.ndarray | bytes) -> None:
    """The same image in every class folder of both splits."""
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / place / name).write_bytes(content)
        else:
            Image.fromarray(content).save(folder / place / name)


def batch(folder, channels: int) -> torch.Tensor:
    data = open_data(folder)
    check_data(data, num_classes=2)
    return next(iter(loaders.test_loader(data, image_size=28, in_chans=channels, batch_size=2)))[0]


@pytest.mark.parametrize(
    ("name", "deep", "shallow"),
    [
        ("grey.png", PIXELS.astype(np.uint16) * 257, PIXELS),
        ("grey.tif", PIXELS.astype(np.uint16) * 257, PIXELS),
        ("whole.tif", PIXELS.astype(np.int32) * 257, PIXELS),
        ("float.tif", (PIXELS / 255).astype(np.float32), PIXELS),
        ("colour.png", png16(COLOURS.astype(np.uint16) * 257), COLOURS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_deep_images_that_reach_white_are_what_they_are_with_8_bits(tmp_path, name, deep, shallow):
    write(tmp_path / "deep", name, deep)
    write(tmp_path / "shallow", "0.png", shallow)
    channels = 1 if shallow.ndim == 2 else 3
    assert torch.equal(batch(tmp_path / "deep", channels), batch(tmp_path / "shallow", channels))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("12-bits.png", PIXELS.astype(np.uint16) * 16, r"reach only 6\.\d% of full scale"),
        ("12-bits.tif", PIXELS.astype(np.uint16) * 16, "as those of 12 bits in 16 would"),
        ("colour.png", png16(COLOURS.astype(np.uint16) * 16), r"colour\.png: their values reach only 5\.9%"),
        ("counts.tif", PIXELS.astype(np.float32), r"mode 'F' with values from 0 to 255.*expected 0\.\.1"),
        ("signed.tif", PIXELS.astype(np.int32) - 100, "mode 'I' with values from -100"),
        ("nothing.tif", np.full((28, 28), np.nan, np.float32), "values from nan"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-5:] else "",
)
def test_deep_images_of_unknown_scale_are_refused_and_not_made_black(tmp_path, name, content, message):
    write(tmp_path, name, content)
    for train in (True, False):
        with pytest.raises(DataError, match=message):
            open_data(tmp_path, train=train)
    with pytest.raises(DataError, match=message):
        open_images([tmp_path / "val" / "a" / name])


def test_one_deep_image_among_many_is_found_before_the_first_step(tmp_path):
    write(tmp_path, "0.png", PIXELS)
    for number in range(40):
        Image.fromarray(PIXELS).save(tmp_path / "train" / "a" / f"{number}.png")
    Image.fromarray(PIXELS.astype(np.uint16) * 4).save(tmp_path / "train" / "a" / "1.png")
    with pytest.raises(DataError, match=r"train/a/1\.png: their values reach only"):
        check_data(open_data(tmp_path), num_classes=2)


def test_a_dark_image_of_a_set_that_reaches_white_is_dark(tmp_path):
    write(tmp_path, "0.png", PIXELS.astype(np.uint16) * 257)
    Image.fromarray((PIXELS // 16).astype(np.uint16)).save(tmp_path / "val" / "b" / "0.png")
    dark = batch(tmp_path, 1)[1]
    assert dark.max() == dark.min() and batch(tmp_path, 1)[0].std() > 0.5


def test_bitmaps_of_16_bits_a_pixel_are_not_deep():
    header = struct.pack("<2sIHHI", b"BM", 54 + 8, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0
    )
    assert not is_deep(Image.open(io.BytesIO(header + bytes(8))))


def test_value_beyond_white_is_refused_where_an_image_is_decoded():
    with pytest.raises(DataError, match="mode 'F' with values from 0 to 3"):
        to_8_bit(Image.fromarray(np.array([[0, 3]], dtype=np.float32)))


def test_four_channels_stay_apart_where_alpha_would_multiply_them(tmp_path):
    bands = RNG.integers(0, 256, (40, 40, 4), dtype=np.uint8)
    bands[..., 3] = 0  # as alpha it would make everything black
    write(tmp_path, "0.png", bands)
    images = batch(tmp_path, 4)
    for mode in ("RGBA", "CMYK"):
        Image.frombytes(mode, (40, 40), bands.tobytes()).save(tmp_path / f"{mode}.tif")
        (other,) = open_images([tmp_path / f"{mode}.tif"])
        assert np.array_equal(np.asarray(with_channels(other, 4)), bands), mode
    data = open_data(tmp_path)
    for channel in range(4):
        alone = tmp_path / f"alone{channel}"
        write(alone, "0.png", bands[..., channel])
        assert torch.equal(images[:, channel : channel + 1], batch(alone, 1))
    assert with_channels(Image.fromarray(PIXELS), 4).getpixel((0, 0)) == (255, 255, 255, 255)
    light = transforms.Augment.preset("light")
    options = {"image_size": 28, "in_chans": 4, "batch_size": 2, "seed": 0}
    assert next(iter(loaders.train_loader(data, augment=light, **options)))[0].shape == (2, 4, 28, 28)


def test_fourth_channel_that_pillow_drops_is_not_made_up(tmp_path):
    Image.new("RGBX", (8, 8), (1, 2, 3, 4)).save(tmp_path / "thermal.tif")
    (image,) = open_images([tmp_path / "thermal.tif"])
    with pytest.raises(DataError, match="TIFF of 4 channels, of which Pillow reads 3"):
        with_channels(image, 4)
    assert with_channels(image, 3).getpixel((0, 0)) == (1, 2, 3)


def test_prediction_takes_pixels_as_evaluation_does(tmp_path):
    write(tmp_path, "0.png", PIXELS.astype(np.uint16) * 257)
    (image,) = open_images([tmp_path / "val" / "a" / "0.png"])
    pipeline = transforms.image_pipeline(image_config(open_model("fashion-deit")))
    expected = (torch.from_numpy(PIXELS) / 255 - 0.286) / 0.353
    torch.testing.assert_close(pipeline.batch([pipeline.pixels(image)])[0, 0], expected)
