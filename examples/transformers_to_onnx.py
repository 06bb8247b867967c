"""From a checkpoint of Hugging Face's transformers to a smaller model in ONNX, without training.

    python examples/transformers_to_onnx.py --model google/vit-base-patch16-224 --data /data/imagenet/train
    python examples/transformers_to_onnx.py --toy       # random images, a tiny model: seconds

Needs `pip install 'vtp[transformers,onnx]'`. `vtp prune hf:NAME --calibrate DATA` and `vtp export` do so too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import timm
import torch
import transformers
from torch import Tensor, nn

import vtp
from vtp.runtime.export import export_onnx

TOY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96,
       "image_size": 32, "patch_size": 8, "num_labels": 10}  # fmt: skip


def open_checkpoint(name: str, toy: bool) -> tuple[nn.Module, nn.Module]:
    """The classifier of transformers, and the timm model that computes the same."""
    if toy:
        theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**TOY)).eval()
        return theirs, vtp.from_transformers(theirs)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    theirs = theirs.float().eval()
    return theirs, vtp.from_transformers(theirs, image_processor=processor)


def open_images(model: nn.Module, folder: str | None, count: int) -> Tensor:
    """Images without labels, [count, channels, height, width], as the model expects them."""
    config = timm.data.resolve_model_data_config(model)
    if folder is None:
        return torch.randn(count, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    config["input_size"] = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    transform = timm.data.create_transform(**config, is_training=False)
    dataset = timm.data.create_dataset("", root=folder, transform=transform)
    chosen = torch.randperm(len(dataset))[:count].tolist()
    return torch.stack([dataset[index][0] for index in chosen])


@torch.inference_mode()
def difference(theirs: Tensor, ours: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="google/vit-base-patch16-224", help="on the hub, or a folder")
    parser.add_argument("--data", help="folder with a folder of images for each class")
    parser.add_argument("--images", type=int, default=512, help="to calibrate and refit on (default 512)")
    parser.add_argument("--macs", type=float, default=0.5, help="that remain, as a share (default 0.5)")
    parser.add_argument("--out", type=Path, default=Path("small.onnx"))
    parser.add_argument("--toy", action="store_true", help="random images and a tiny model")
    options = parser.parse_args(arguments)
    if options.data is None and not options.toy:
        parser.error("--data: name a folder of images, or try --toy")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out: got {options.out}, expected a file in a folder that can be written")

    torch.manual_seed(0)
    theirs, dense = open_checkpoint(options.model, options.toy)
    images = open_images(dense, options.data, options.images)
    with torch.inference_mode():
        error = difference(theirs(images[:4]).logits, dense(images[:4]))
    print(f"{type(theirs).__name__}: {vtp.count(dense)}; in timm its logits differ by {error:.1e}")

    statistics = vtp.calibrate(dense, images)
    budget = options.macs * vtp.count(dense).macs
    plan = vtp.make_plan(dense, macs=budget, statistics=statistics, scope="optimal")
    small = vtp.compact(dense, plan, images=images)  # refitted in closed form
    with torch.inference_mode():
        error = difference(dense(images[:64]), small(images[:64]))
    print(f"cut: {vtp.count(small)}; logits differ by {error:.3f}")

    error = export_onnx(small, options.out, images=images[:5])  # leaves no file where it is wrong
    print(f"wrote {options.out}: {options.out.stat().st_size:,} bytes, ONNX Runtime's error {error:.1e}")


if __name__ == "__main__":
    main()
