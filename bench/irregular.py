"""The models of the benchmarks: a DeiT cut to many widths, and what a user might run in its place."""

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vtp


def gated_model(name: str, *, uniform: bool = False, seed: int = 0, **changes: Any) -> nn.Module:
    """timm's model `name` with random weights and gates that make widths unequal in every layer and head.

    Args:
        uniform: all gates are 1 instead, so that every layer and head loses the same share.
        changes: arguments for timm.
    """
    torch.manual_seed(seed)
    gated = vtp.insert_gates(timm.create_model(name, **changes)).eval()
    if not uniform:
        with torch.no_grad():
            for layer in vtp.sites(gated).values():
                # A scale for each layer, and for each 64 dimensions, the heads of attention.
                groups = -(-len(layer.gate) // 64)
                scale = torch.empty(()).uniform_(0.8, 1.2) * torch.empty(groups).uniform_(0.7, 1.3)
                layer.gate.uniform_(0, 1).mul_(scale.repeat_interleave(64)[: len(layer.gate)])
    randomize_vectors(gated, seed)
    return gated


def cut(gated: nn.Module, rate: float) -> vtp.CompactViT:
    """The model without a share `rate` of its dimensions; 0 gives the dense model as a CompactViT."""
    return vtp.compact(gated, vtp.make_plan(gated, rate=rate, min_keep=0)).eval()


def irregular_models(
    name: str, rates: Sequence[float], seed: int = 0, **changes: Any
) -> list[vtp.CompactViT]:
    """timm's model `name`, cut at each of `rates`, to widths that are unequal in every layer and head."""
    gated = gated_model(name, seed=seed, **changes)
    return [cut(gated, rate) for rate in rates]


@torch.no_grad()
def randomize_vectors(model: nn.Module, seed: int = 0) -> None:
    """Noise on biases and norms, which timm starts at 0 and 1: a wrong one would not be seen."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith(".gate"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


# --------------------------------------------------------------------------------
# In its place


@torch.no_grad()
def _zero_removed(gated: nn.Module, plan: vtp.PruningPlan) -> dict[str, Tensor]:
    """Gates with a 0 wherever the plan removes, by site."""
    gates = {}
    for name, layer in vtp.sites(gated).items():
        gates[name] = torch.zeros_like(layer.gate)
        index = torch.tensor(plan.kept[name], dtype=torch.long)
        gates[name][index] = layer.gate[index]
    return gates


@torch.no_grad()
def zeros_in_place(gated: nn.Module, plan: vtp.PruningPlan) -> VisionTransformer:
    """timm's dense model with zeros for the weights that the cut removes: what pruning by masks leaves."""
    dense = plan.architecture.build("cpu")
    weights = {name: value for name, value in gated.state_dict().items() if name in dense.state_dict()}
    for name, gate in _zero_removed(gated, plan).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * gate
    dense.load_state_dict(weights)
    return dense.eval()


@torch.no_grad()
def padded(gated: nn.Module, plan: vtp.PruningPlan, *, whole_heads: bool = False) -> vtp.CompactViT:
    """The cut with every width of a layer and a head filled up with zeros to a multiple of 16.

    Args:
        whole_heads: heads are filled up to the dense model's; PyTorch's fused attention takes equal ones.
    """
    zeroed = vtp.insert_gates(zeros_in_place(gated, plan))
    kept = {}
    for name, width in plan.widths.items():
        is_proj = name.endswith("attn.proj")
        part = plan.head_dim if is_proj else width
        kept[name] = _filled_up(plan.kept[name], part, part if is_proj and whole_heads else 16)
    return vtp.compact(zeroed, dataclasses.replace(plan, kept=kept)).eval()


def _filled_up(kept: Sequence[int], part: int, multiple: int) -> tuple[int, ...]:
    """Indices with others of the same part (of `part` dimensions, a head) added until each has a multiple."""
    found: set[int] = set(kept)
    for start in sorted({index // part * part for index in kept}):
        own = [index for index in range(start, start + part) if index in found]
        spare = [index for index in range(start, start + part) if index not in found]
        found.update(spare[: -len(own) % multiple])
    return tuple(sorted(found))


def same_macs_dense(architecture: Any, macs: int) -> VisionTransformer:
    """A dense transformer of the same depth and head width with about `macs` multiply-adds per image.

    Width is the multiple of the head width that comes nearest at DeiT's feed-forward ratio of 4; hidden units
    in multiples of 16 make up the difference.
    """
    torch.manual_seed(0)

    def with_widths(heads: int, hidden: int) -> Any:
        width = heads * architecture.head_dim
        return dataclasses.replace(architecture, embed_dim=width, num_heads=heads, mlp_hidden=hidden)

    def macs_of(heads: int, hidden: int) -> int:
        return vtp.count(with_widths(heads, hidden).build("meta", weight_init="skip")).macs

    head_dim = architecture.head_dim
    heads = min(range(1, architecture.num_heads + 1), key=lambda h: abs(macs_of(h, 4 * h * head_dim) - macs))
    least, more = macs_of(heads, 16), macs_of(heads, 32)
    hidden = max(16, round(1 + (macs - least) / (more - least)) * 16)
    return with_widths(heads, hidden).build("cpu").eval()


def torch_pruning(dense: VisionTransformer, macs: int) -> VisionTransformer:
    """What Torch-Pruning makes of a timm model at `macs` multiply-adds per image, by magnitude.

    Its own example for timm's transformers: embedding, heads and hidden units by groups, one ratio for all,
    which is searched for: products shrink with the square of what is kept.
    """
    pruned, kept = dense, 1.0
    for _ in range(5):
        found = vtp.count(pruned).macs
        if abs(found - macs) < 0.01 * macs:
            break
        kept *= (macs / found) ** 0.5
        pruned = _pruned_by(dense, 1 - kept)
    return pruned


def _pruned_by(dense: VisionTransformer, ratio: float) -> VisionTransformer:
    import torch_pruning as tp

    model = copy.deepcopy(dense).eval()
    images = torch.zeros(1, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    heads = {block.attn.qkv: block.attn.num_heads for block in model.blocks}
    with torch.enable_grad(), warnings.catch_warnings():  # it traces the graph that autograd makes
        warnings.simplefilter("ignore")  # of tokens and positions, which it cuts as it should
        tp.pruner.BasePruner(
            model,
            images,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=ratio,
            ignored_layers=[model.head],
            num_heads=heads,
        ).step()
    for block in model.blocks:
        attn = block.attn
        attn.head_dim = attn.qkv.out_features // (3 * attn.num_heads)
        attn.attn_dim = attn.head_dim * attn.num_heads
    return model.requires_grad_(False)
