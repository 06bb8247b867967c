"""Prune a DINOv2 backbone in a minute, without training, and search a folder of images with it.

    python examples/retrieve_with_dinov2.py --images photos --query cat.jpg
    python examples/retrieve_with_dinov2.py --toy                # random images, a tiny model: seconds

An image is found by the cosine of its class token with the query's. How good that is before and after the cut
is said in two ways: recall@k, the share of images with one of their class among the k nearest others, where
the folder has one folder for each class; and the share of the 10 nearest that stay the same, which needs no
labels. Nor does the cut, which learns from some of the images what the dense model does.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import vtp

TOY = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}
NEAREST = 10


def open_model(name: str, image_size: int, toy: bool) -> nn.Module:
    """The dense backbone, which has no head: released weights, or a toy with random ones."""
    if toy:
        return timm.create_model(name.partition(".")[0], num_classes=0, **TOY)
    return timm.create_model(name, pretrained=True, num_classes=0, img_size=image_size)


def open_images(model: nn.Module, folder: str | None) -> tuple[Dataset, Tensor, list[str]]:
    """Images as the model takes them, the class of each, and its file."""
    if folder is None:
        labels = torch.randint(8, (96,))
        images = torch.randn(8, 3, *model.patch_embed.img_size)[labels]  # one pattern for each class
        images += torch.randn_like(images)
        return TensorDataset(images, labels), labels, [f"image {i}" for i in range(len(labels))]
    images = timm.data.create_dataset("", root=folder, transform=transform_of(model))
    labels = torch.tensor([label for _, label in images.reader.samples])
    return images, labels, images.filenames(absolute=True)


def transform_of(model: nn.Module):
    """From a PIL image to what the model takes."""
    settings = timm.data.resolve_model_data_config(model)
    size = (3, *model.patch_embed.img_size)
    return timm.data.create_transform(**{**settings, "input_size": size}, is_training=False)


@torch.inference_mode()
def index_of(model: nn.Module, images: Dataset, batch_size: int) -> Tensor:
    """The features of all images, [N, D], of length 1."""
    device = next(iter(model.state_dict().values())).device
    batches = DataLoader(images, batch_size)
    return torch.cat([F.normalize(model(batch.to(device)).float()) for batch, _ in batches])


def nearest(index: Tensor, k: int) -> Tensor:
    """Of each image the k others that are most like it, [N, k], the nearest first."""
    found = []
    for start in range(0, len(index), 1024):  # no [N, N] in memory
        similarity = index[start : start + 1024] @ index.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -2.0  # an image is no other than itself
        found.append(similarity.topk(k).indices)
    return torch.cat(found).cpu()


def quality(neighbours: Tensor, labels: Tensor, before: Tensor | None) -> str:
    """Recall@k, and how many of the neighbours are those of the dense model."""
    words = []
    if len(labels.unique()) > 1:
        same = labels[neighbours] == labels[:, None]
        words = [f"recall@{k} {100 * same[:, :k].any(dim=1).float().mean():.1f}" for k in (1, 5)]
    if before is not None:
        kept = (neighbours[:, :, None] == before[:, None]).any(dim=2).float().mean()
        words.append(f"{100 * kept:.1f}% of the {NEAREST} nearest as before")
    return ", ".join(words)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder to search, with one folder for each class or without")
    parser.add_argument("--query", help="an image file, for which the nearest of the folder are printed")
    parser.add_argument("--model", default="vit_small_patch14_reg4_dinov2.lvd142m", help="a timm name")
    parser.add_argument("--image-size", type=int, default=224, help="edge in pixels, a multiple of 14")
    parser.add_argument(
        "--macs", type=float, default=0.6, help="that remain, as a share of the dense model's"
    )
    parser.add_argument("--learn-from", type=int, default=1024, help="so many of the images")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("backbone.safetensors"))
    parser.add_argument(
        "--toy", action="store_true", help="a tiny model, and random images if none are named"
    )
    options = parser.parse_args(arguments)
    if options.images is None and not options.toy:
        parser.error("--images: name a folder, or try --toy")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out: got {options.out}, expected a file in a folder that can be written")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = open_model(options.model, options.image_size, options.toy).to(device).eval()
    images, labels, names = open_images(dense, options.images)
    if len(images) <= NEAREST:
        parser.error(f"--images: got {len(images)} images, expected more than {NEAREST}")

    # Of a folder the first images are all of one class: take some at random.
    some = Subset(images, torch.randperm(len(images))[: options.learn_from].tolist())
    learn_from = DataLoader(some, options.batch_size)
    statistics = vtp.calibrate(dense, learn_from)
    plan = vtp.make_plan(
        dense, macs=options.macs * vtp.count(dense).macs, statistics=statistics, scope="optimal"
    )
    small = vtp.compact(dense, plan, images=learn_from)  # refitted in closed form
    vtp.save(small, options.out)
    fast = vtp.optimize(small)  # packed for inference

    before = None
    for name, model, cost in (("dense", dense, vtp.count(dense)), ("pruned", fast, vtp.count(small))):
        start = time.perf_counter()
        index = index_of(model, images, options.batch_size)
        speed = len(images) / (time.perf_counter() - start)
        neighbours = nearest(index, NEAREST)
        print(f"{name}: {cost}; {speed:.0f} images/s; {quality(neighbours, labels, before)}")
        before = neighbours
    print(f"packed for {fast.engine}; wrote {options.out}")

    if options.query is not None:
        pixels = transform_of(dense)(Image.open(options.query).convert("RGB"))
        query = F.normalize(fast(pixels[None].to(device)).float())
        similarity, found = (index @ query[0]).topk(5)
        for cosine, place in zip(similarity.tolist(), found.tolist(), strict=True):
            print(f"  {cosine:.3f}  {names[place]}")


if __name__ == "__main__":
    main()
