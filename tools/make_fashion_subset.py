"""Rebuild the Fashion-MNIST subset that ships with the package from the original idx files.

    python tools/make_fashion_subset.py FOLDER

FOLDER holds the four files of https://github.com/zalandoresearch/fashion-mnist (Debian's package
dataset-fashion-mnist puts them in /usr/share/datasets/fashion-mnist). For each class, 1,000 of the 6,000
training images and 200 of the 1,000 test images are drawn without replacement by
numpy.random.RandomState(SEED), whose stream NumPy keeps frozen; the chosen images stay in their original
order. The same input always gives the same bytes, up to the version of zlib: SHA256SUMS therefore holds
the digests of the *uncompressed* idx files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np

import vtp
from vtp.training.sources import read_idx

SEED = 2104_08500
PER_CLASS = {"train": 1000, "t10k": 200}
NUM_CLASSES = 10
DEFAULT_OUT = Path(vtp.__file__).parent / "datasets" / "fashion-mnist-10k"

LICENSE = """\
The .gz files of this folder are data of Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist),
Han Xiao, Kashif Rasul, Roland Vollgraf: Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
Learning Algorithms, arXiv:1708.07747. The images and labels are unchanged; they are a subset, drawn by
tools/make_fashion_subset.py: for each of the 10 classes, 1,000 of the 6,000 training images and 200 of the
1,000 test images, without replacement, by numpy.random.RandomState({seed}), in their original order.
SHA256SUMS gives the digests of the uncompressed files (gunzip first).

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions
of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED
TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL
THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER
DEALINGS IN THE SOFTWARE.
"""


def choose(labels: np.ndarray, per_class: int, random: np.random.RandomState) -> np.ndarray:
    """Sorted indices of `per_class` samples of each class; labels: uint8 [samples]."""
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(NUM_CLASSES)]
    return np.sort(np.concatenate(chosen))


def encode_idx(array: np.ndarray) -> bytes:
    """The uncompressed idx file of a uint8 array."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + np.ascontiguousarray(array).tobytes()


def gzip_bytes(raw: bytes) -> bytes:
    """Gzip with a header that carries neither a time nor a name, nor differs between Python versions."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(raw)
    return buffer.getvalue()


def build(source: Path, out: Path) -> None:
    """Write the subset of the originals in `source`, its digests and its licence notice into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(SEED)
    digests = []
    for split, per_class in PER_CLASS.items():
        names = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
        images, labels = (read_idx(source / f"{name}.gz") for name in names)
        chosen = choose(labels, per_class, random)
        for name, array in zip(names, (images, labels), strict=True):
            raw = encode_idx(array[chosen])
            digests.append(f"{hashlib.sha256(raw).hexdigest()}  {name}\n")
            (out / f"{name}.gz").write_bytes(gzip_bytes(raw))
    (out / "SHA256SUMS").write_text("".join(digests))
    (out / "LICENSE").write_text(LICENSE.format(seed=SEED))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the four original .gz files")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="default: %(default)s")
    arguments = parser.parse_args()
    build(arguments.source, arguments.out)
    total = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
