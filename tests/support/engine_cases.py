"""Compact models of every kind that `vtp.optimize` packs, for its tests on CPU and in the interpreter."""

import contextlib
import copy
import dataclasses
import functools
import importlib
import random as random_module
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vtp
from tests.support.guarded_memory import replaced
from tests.support.models import TINY, build, gated, randomize
from tests.support.numerics import assert_close_to_float64
from vtp.model.architecture import Architecture
from vtp.pruning.compact import CompactAttention
from vtp_kernels import launching

OPS = ("layer_norm_gather", "compact_linear", "rotary", "ragged_attention", "compact_mlp")

# timm's names with the arguments that keep a test small; weights are random.
MODELS = {
    "deit-tiny": ("deit_tiny_patch16_224", {"img_size": 32, "depth": 4}),
    "deit-small": ("deit_small_patch16_224", {"img_size": 32, "depth": 2}),
    "deit-base": ("deit_base_patch16_224", {"img_size": 32, "depth": 1}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}),
    "dinov2-layer-scale": ("vit_small_patch14_dinov2", {"img_size": 28, "depth": 2}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 2}),
    "map-pool-no-class-token": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 1, "class_token": False, "global_pool": "map"},
    ),
    "pre-norm-quick-gelu": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 1, "pre_norm": True, "act_layer": "quick_gelu"},
    ),
    "qk-norm": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "qk_norm": True}),
    "gelu-by-name": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "act_layer": "gelu"}),
    "no-biases": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "depth": 2, "qkv_bias": False, "proj_bias": False},
    ),
    "rotary-swiglu": (
        "vit_small_plus_patch16_dinov3",
        {"img_size": (32, 48), "embed_dim": 96, "depth": 2, "num_classes": 10},
    ),
    "rotary-mixed": (
        "vit_small_patch16_rope_mixed_224",
        {"img_size": 32, "embed_dim": 96, "depth": 2, "num_classes": 10},
    ),
    "rotary-qk-norm": (
        "vit_small_patch16_rope_224",
        {"img_size": 32, "embed_dim": 96, "depth": 1, "num_classes": 10, "qk_norm": True},
    ),
    "rotary-inner-norms": (
        "eva02_base_patch16_clip_224",
        {"img_size": 32, "embed_dim": 96, "num_heads": 3, "depth": 2, "num_classes": 10},
    ),
    "any-image-size": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "dynamic_img_size": True}),
}


def irregular_plan(model: nn.Module, seed: int = 0, rate: float = 0.4) -> vtp.PruningPlan:
    """A plan from random scores: no two layers or heads keep the same width."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for name, layer in vtp.sites(model).items():
        score = torch.rand(layer.in_features, generator=generator)
        heads = model.blocks[0].attn.num_heads if name.endswith("proj") else 1
        # A bias for each layer and head makes their widths differ by more than chance would.
        bias = 0.3 * torch.rand(heads, generator=generator)
        scores[name] = score + bias.repeat_interleave(layer.in_features // heads)
    return vtp.make_plan(model, rate=rate, score=scores)


@functools.cache
def _gated_model(name: str, changes: frozenset) -> tuple[nn.Module, vtp.PruningPlan]:
    if name == "tiny":
        model = build(dataclasses.replace(TINY, **dict(changes)))
    else:
        timm_name, arguments = MODELS[name]
        model = timm.create_model(timm_name, **arguments | dict(changes)).double().eval()
        torch.manual_seed(0)
        randomize(model)
    model = gated(model)
    return model, irregular_plan(model)


def compact_model(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> vtp.CompactViT:
    """One of MODELS, or "tiny", cut to an irregular plan, in eval mode. `changes` go to timm."""
    return vtp.compact(*_gated_model(name, frozenset(changes.items()))).to(dtype)


def with_dead_parts(
    dead: tuple[str, ...], dtype: torch.dtype = torch.float32, **changes: object
) -> vtp.CompactViT:
    """A tiny model cut to a plan that keeps nothing of the sites `dead`.

    A site is as in `0.mlp.fc1`; `1.attn.proj.2` is head 2 of a projection.
    """
    model, plan = _gated_model("tiny", frozenset(changes.items()))
    kept = dict(plan.kept)
    for part in dead:
        block, owner, layer, *head = part.split(".")
        name = f"blocks.{block}.{owner}.{layer}"
        width = model.blocks[0].attn.head_dim
        kept[name] = tuple(i for i in kept[name] if head and i // width != int(head[0]))
    return vtp.compact(model, dataclasses.replace(plan, kept=kept)).to(dtype)


@torch.no_grad()
def with_narrow_keys(small: vtp.CompactViT, seed: int = 0) -> vtp.CompactViT:
    """A copy of the model whose heads have lost the last columns of their queries and keys, each so many."""
    random, small = random_module.Random(seed), copy.deepcopy(small)
    for block in small.blocks:
        if isinstance(block.attn, CompactAttention):
            block.attn = narrowed(block.attn, small.plan.architecture, random)
    return small


def narrowed(
    attn: CompactAttention, architecture: Architecture, random: random_module.Random
) -> CompactAttention:
    """An attention whose heads keep the first columns of the queries and keys of `attn`: most not all."""
    widths = [random.randint(1, width) for width in attn.key_widths]
    widths[0] = attn.key_widths[0]
    columns = torch.arange(sum(attn.key_widths)).split(attn.key_widths)
    keys = torch.cat([c[:width] for c, width in zip(columns, widths, strict=True)])
    values = torch.arange(2 * sum(attn.key_widths), attn.qkv.out_features)
    rows = torch.cat([keys, sum(attn.key_widths) + keys, values])
    new = CompactAttention(architecture, attn.qkv.in_features, tuple(widths), attn.value_widths)
    state = attn.state_dict()
    new.load_state_dict(state | {name: t[rows] for name, t in state.items() if name.startswith("qkv.")})
    return new.to(attn.qkv.weight.dtype).train(attn.training)


def references(small: vtp.CompactViT, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of the compact model on PyTorch's own operators, in float64 and in `dtype`."""
    exact, same_dtype = (copy.deepcopy(small).to(d)(images.to(d)) for d in (torch.float64, dtype))
    return exact.detach(), same_dtype.detach()


def assert_gradients_close_to_float64(
    got: dict[str, Tensor], exact: dict[str, Tensor], same_dtype: dict[str, Tensor]
) -> None:
    """The error rule for all tensors of float32 together, each scaled to like size.

    Of a bias of a few numbers alone the rule would ask for luck.
    """
    scale = {name: value.square().mean().sqrt().clamp(min=1e-30) for name, value in exact.items()}
    pooled = [
        torch.cat([(tensors[name].double() / scale[name]).to(dtype).flatten() for name in exact])
        for tensors, dtype in ((got, torch.float32), (exact, torch.float64), (same_dtype, torch.float32))
    ]
    assert_close_to_float64(*pooled, "all gradients")


def storage(tensor: Tensor) -> int:
    """Which memory it lies in, also on the meta device."""
    return tensor.untyped_storage()._cdata


class NotedOperators(TorchDispatchMode):
    """Notes the name of every operator, for what is inside `with NotedOperators() as noted`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.name())
        if func.name() in ("aten::reshape", "aten::to.dtype") and storage(out) != storage(args[0]):
            self.names.append("aten::clone")
        return out


@contextlib.contextmanager
def noted_launches() -> Iterator[list[str]]:
    """The names of the kernels that the ops launch, in order; they are launched nevertheless."""
    names: list[str] = []

    def launch(kernel, *args, **constants):
        names.append(kernel.__name__)
        return launching.launch(kernel, *args, **constants)

    modules = [importlib.import_module(f"vtp_kernels.{name}") for name in OPS]
    with replaced([(module, "launch", launch) for module in modules]):
        yield names
