"""Prune a DeiT in a training loop of your own: dense, gates, sparse training, plan, cut, fine-tuning, file.

    python examples/prune_deit.py --data /data/imagenet --epochs 10     # folder with train/ and val/
    python examples/prune_deit.py --toy                                 # random images, a tiny model: seconds

The loop is as plain as can be; `vtp run` has schedules, augmentation, distillation and resuming.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vtp

# What `timm.create_model` makes for --toy, without a download.
TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}


def open_model(name: str, toy: bool) -> nn.Module:
    """The dense model: released weights, or a toy with random ones."""
    return timm.create_model(name, **TOY) if toy else timm.create_model(name, pretrained=True)


def open_data(model: nn.Module, folder: str | None, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """Batches to train on and to test on."""
    if folder is None:
        labels = torch.randint(10, (256,))
        images = torch.randn(10, 3, *model.patch_embed.img_size)[labels]  # one pattern for each class
        images += torch.randn_like(images)
        toy = TensorDataset(images, labels)
        return DataLoader(toy, batch_size, shuffle=True), DataLoader(toy, batch_size)
    settings = timm.data.resolve_data_config(model=model)
    sets = [
        timm.data.create_dataset("", root=folder, split=split, is_training=training)
        for split, training in (("train", True), ("val", False))
    ]
    # Files of the model then say what their outputs are called.
    labels = sets[0].reader.class_to_idx
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple(sorted(labels, key=labels.get))}
    train, test = (
        timm.data.create_loader(
            dataset,
            batch_size=batch_size,
            is_training=training,
            use_prefetcher=False,
            input_size=settings["input_size"],
            mean=settings["mean"],
            std=settings["std"],
            interpolation=settings["interpolation"],
            crop_pct=settings["crop_pct"],
        )
        for dataset, training in zip(sets, (True, False), strict=True)
    )
    return train, test


def train(model: nn.Module, batches: DataLoader, epochs: int, lr: float, penalty: float = 0.0) -> None:
    """Train in place; with `penalty` on the gates, which learn ten times as fast as the weights."""
    gates = [layer.gate for layer in vtp.sites(model).values()] if penalty else []
    others = [p for p in model.parameters() if all(p is not gate for gate in gates)]
    groups = [{"params": others}, {"params": gates, "lr": 10 * lr, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    device = next(model.parameters()).device
    model.train()
    for epoch in range(epochs):
        for images, labels in batches:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            if penalty:
                loss = loss + penalty * vtp.l1_penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"  epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, batches: DataLoader, device: torch.device) -> float:
    """Top-1 in percent."""
    right = [(model(images.to(device)).argmax(-1).cpu() == labels).float() for images, labels in batches]
    return 100 * torch.cat(right).mean().item()


def largest_difference(a: nn.Module, b: nn.Module, images: Tensor) -> float:
    """Between the logits of two models, over the largest logit."""
    with torch.inference_mode():
        expected = a(images)
        return ((b(images) - expected).abs().max() / expected.abs().max()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm name")
    parser.add_argument("--data", help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, default=Path("pruned.safetensors"))
    parser.add_argument(
        "--macs", type=float, default=0.55, help="that remain, as a share of the dense model's"
    )
    parser.add_argument("--epochs", type=int, default=10, help="of sparse training, and again of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, help="default 2e-5, for a toy 1e-3")
    parser.add_argument("--penalty", type=float, default=1e-4, help="lambda, the weight of sum |g|")
    parser.add_argument("--toy", action="store_true", help="random images and a tiny model")
    options = parser.parse_args(arguments)
    if options.data is None and not options.toy:
        parser.error("--data: name a folder with train/ and val/, or try --toy")
    if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):  # better now than after training
        parser.error(f"--out: got {options.out}, expected a file in a folder that can be written")

    lr = options.lr or (1e-3 if options.toy else 2e-5)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = open_model(options.model, options.toy).to(device).eval()
    train_batches, test_batches = open_data(dense, options.data, options.batch_size)
    print(f"dense: {vtp.count(dense)}, top-1 {accuracy(dense, test_batches, device):.2f}")

    gated = vtp.insert_gates(dense)  # a copy; the same outputs while all gates are 1
    train(gated, train_batches, options.epochs, lr, options.penalty)

    plan = vtp.make_plan(gated, macs=options.macs * vtp.count(dense).macs)
    small = vtp.compact(gated, plan)
    assert vtp.count(small) == plan.cost  # as planned, exactly
    print(f"cut: {plan.cost}, top-1 {accuracy(small, test_batches, device):.2f}")

    train(small, train_batches, options.epochs, lr)
    vtp.save(small, options.out)
    print(f"fine-tuned: top-1 {accuracy(small, test_batches, device):.2f}; wrote {options.out}")

    fast = vtp.optimize(vtp.load(options.out, device=device))  # packed for inference
    images = torch.randn(2, small.patch_embed.proj.in_channels, *small.patch_embed.img_size, device=device)
    print(f"packed for {fast.engine}; logits differ by {largest_difference(small, fast, images):.1e}")


if __name__ == "__main__":
    main()
