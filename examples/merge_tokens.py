"""Token merging on a compact model: fewer dimensions by vtp, fewer tokens by ToMe, no training for either.

    python examples/merge_tokens.py deit_b_10g.safetensors --data /data/imagenet --merge 8
    python examples/merge_tokens.py --toy                            # random images, a tiny model: seconds

Token Merging (Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461) takes r tokens away in
each block, between attention and feed-forward: it joins the r pairs that are most alike. Its usual patch for
timm takes all heads to be of one width; what is here works on any block with timm's attributes:

    - tokens are compared by their keys, those of all heads side by side, as keys may be of unequal widths;
    - attention counts a joined token as often as it has members ("proportional attention"): log(size) is
      added to its scores, by the mask that timm's attention and vtp's take.

It runs on PyTorch's operators; `vtp.optimize` packs a model without merging.
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vtp
from vtp.pipeline import fit_data
from vtp.timing import interleaved_latency
from vtp.training.data import open_data
from vtp.training.evaluation import evaluate

# What `timm.create_model` makes for --toy, without a download.
TOY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}


def merge(tokens: Tensor, size: Tensor, metric: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Join the `count` pairs of tokens that are most alike: bipartite soft matching (section 3 of the paper).

    Tokens are dealt out to two sets in turn; each of the first has the most similar one of the second as its
    partner; the `count` best pairs are joined, to the mean of their members.

    Args:
        tokens: [B, N, C]; size: how many tokens each of them stands for, [B, N, 1].
        metric: what they are compared by, [B, N, K].
        count: pairs; at most half of the tokens that may be joined are.
        prefix: class and register tokens at the start, which are joined with none.

    Returns:
        (tokens, size) with `count` tokens less: the prefix, then those of the first set that have stayed,
        then the second set.
    """
    count = min(count, (tokens.shape[1] - prefix) // 2)
    if count <= 0:
        return tokens, size
    metric = nn.functional.normalize(metric[:, prefix:], dim=-1)
    likeness, partner = (metric[:, ::2] @ metric[:, 1::2].mT).max(-1)  # [B, first set]
    order = likeness.argsort(dim=-1, descending=True)
    joined, stay = order[:, :count], order[:, count:].sort(-1).values
    into = partner.gather(1, joined)  # the places in the second set that they go to

    def moved(x: Tensor) -> Tensor:
        """Sums of the members of each new token."""
        first, second = x[:, prefix::2], x[:, prefix + 1 :: 2]
        columns = (-1, -1, x.shape[-1])
        second = second.scatter_add(
            1, into[..., None].expand(columns), first.gather(1, joined[..., None].expand(columns))
        )
        return torch.cat([x[:, :prefix], first.gather(1, stay[..., None].expand(columns)), second], dim=1)

    total = moved(size)
    return moved(tokens * size) / total, total


class MergingBlock(nn.Module):
    """A block of timm's or of a compact model, between whose branches tokens are merged.

    Args:
        block: with timm's attributes, such as `blocks[i]` of either.
        count: pairs to join; prefix: see `merge`.
        state: of the model: "size" of the tokens, which the first block begins.
        first: whether it is the first block.
    """

    def __init__(
        self, block: nn.Module, count: int, prefix: int, state: dict[str, Tensor], first: bool
    ) -> None:
        super().__init__()
        self.block, self.count, self.prefix, self.state, self.first = block, count, prefix, state, first

    def forward(self, x: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        size = torch.ones_like(x[..., :1]) if self.first else self.state["size"]
        seen: list[Tensor] = []
        # A branch that the cut has made a constant has no keys: its tokens are compared by themselves.
        handles = [m.register_forward_hook(lambda *call: seen.append(call[-1])) for m in _qkv(attn)]
        mask = size.log().mT[:, None]  # [B, 1, 1, N]: of every head and query
        x = x + block.drop_path1(block.ls1(attn(block.norm1(x), attn_mask=mask)))
        for handle in handles:
            handle.remove()
        metric = keys_of(attn, seen[0]) if seen else x
        x, self.state["size"] = merge(x, size, metric, self.count, self.prefix)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _qkv(attn: nn.Module) -> list[nn.Module]:
    return [attn.qkv] if hasattr(attn, "qkv") else []


def keys_of(attn: nn.Module, qkv: Tensor) -> Tensor:
    """The keys of all heads in what qkv puts out, [B, N, sum of their widths]: behind as many queries."""
    width = sum(getattr(attn, "key_widths", [attn.head_dim] * attn.num_heads))
    return qkv[..., width : 2 * width]


def merging(model: nn.Module, count: int) -> nn.Module:
    """A copy of a timm or compact model in which every block joins `count` pairs of tokens."""
    model = copy.deepcopy(model)
    state: dict[str, Tensor] = {}
    model.blocks = nn.Sequential(
        *[
            MergingBlock(block, count, model.num_prefix_tokens, state, first=i == 0)
            for i, block in enumerate(model.blocks)
        ]
    )
    return model


@torch.inference_mode()
def macs_of(model: nn.Module, images: Tensor) -> float:
    """Multiply-adds of one image."""
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    return counter.get_total_flops() / 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", help="a compact model, such as vtp prune writes")
    parser.add_argument("--data", help="folder with val/, for the accuracy; else random images")
    parser.add_argument("--merge", type=int, nargs="+", default=[0, 4, 8, 16], help="pairs in each block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring")
    parser.add_argument("--toy", action="store_true", help="random images and a tiny model")
    options = parser.parse_args(arguments)
    if options.file is None and not options.toy:
        parser.error("file: name a compact model, or try --toy")

    torch.manual_seed(0)
    if options.toy:
        gated = vtp.insert_gates(timm.create_model("deit_tiny_patch16_224", **TOY).eval())
        small = vtp.compact(gated, vtp.make_plan(gated, rate=0.4))
    else:
        small = vtp.load(options.file)
    images = torch.randn(options.batch_size, small.patch_embed.proj.in_channels, *small.patch_embed.img_size)
    models = {"compact": small} | {str(count): merging(small, count).eval() for count in options.merge}
    took = interleaved_latency(models, images, seconds=options.seconds)
    whole = macs_of(small, images)
    for count in options.merge:
        merged = models[str(count)]
        tokens, macs = merged.forward_features(images).shape[1], macs_of(merged, images)
        line = f"{count:3} pairs a block: {tokens} tokens at the end, {macs / 1e6:,.1f}M MACs"
        line += f" ({macs / whole:.0%})"
        line += f", {took[str(count)].median_ms:.2f} ms ({took[str(count)].speedup:.2f}x)"
        if options.data is not None:
            line += f", top-1 {evaluate(merged, fit_data(open_data(options.data), merged))[0]:.2f}"
        print(line)


if __name__ == "__main__":
    main()
