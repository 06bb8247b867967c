"""Models and plans that several tests use."""

import copy
import dataclasses

import torch
from torch import Tensor, nn

import vtp
from vtp.model.architecture import Architecture
from vtp.model.eva import EvaArguments
from vtp.pruning.gates import sites
from vtp.zoo import fashion_deit_architecture

TINY = dataclasses.replace(
    fashion_deit_architecture(),
    img_size=(8, 8),
    patch_size=(4, 4),
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_hidden=20,
)
AXIAL = EvaArguments(
    rope_type="dinov3",
    rope_temperature=100.0,
    rope_grid_offset=0.0,
    rope_grid_indexing="ij",
    rope_rotate_half=True,
    rope_shift_coords=None,
    rope_jitter_coords=None,
    rope_rescale_coords=None,
    ref_feat_shape=None,
    attn_pool_num_heads=None,
    attn_pool_mlp_ratio=None,
)
MIXED = dataclasses.replace(AXIAL, rope_type="mixed", rope_temperature=10.0, rope_rotate_half=False)
# One of each kind that is cut in a way of its own.
FAMILIES = {
    "plain": TINY,
    "distilled": dataclasses.replace(TINY, distilled=True),
    "layer-scale": dataclasses.replace(TINY, init_values=0.1),
    "registers": dataclasses.replace(TINY, reg_tokens=2),
    "qk-norm": dataclasses.replace(TINY, qk_norm=True),
    "no-biases": dataclasses.replace(TINY, qkv_bias=False, proj_bias=False),
    "pre-norm": dataclasses.replace(TINY, pre_norm=True),
    "average-pool": dataclasses.replace(TINY, global_pool="avg", class_token=False),
    "fc-norm": dataclasses.replace(TINY, global_pool="avg", fc_norm=True),
    "features": dataclasses.replace(TINY, num_classes=0),
    "one-class": dataclasses.replace(TINY, num_classes=1),
    "swiglu": dataclasses.replace(TINY, glu=True),
    "rotary": dataclasses.replace(
        TINY, pos_embed="none", reg_tokens=2, init_values=0.1, glu=True, eva=AXIAL, dynamic_img_size=True
    ),
    "rotary-mixed": dataclasses.replace(TINY, eva=MIXED),
    "inner-norms": dataclasses.replace(TINY, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1),
    "rotary-inner-norms": dataclasses.replace(
        TINY, glu=True, eva=AXIAL, scale_attn_norm=True, scale_mlp_norm=True
    ),
}


def build(architecture: Architecture = TINY, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model with random weights everywhere, biases and norms included, in eval mode."""
    torch.manual_seed(seed)
    model = architecture.build().to(dtype)
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights that make every part matter: zero biases or tiny LayerScale would hide a wrong cut."""
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim <= 1 else parameter[0].numel() ** -0.5
        parameter.copy_(torch.randn_like(parameter) * scale)


def gated(model: nn.Module, seed: int = 1) -> nn.Module:
    """`insert_gates(model)` with random gates of either sign."""
    result = vtp.insert_gates(model)
    generator = torch.Generator().manual_seed(seed)
    for layer in sites(result).values():
        layer.gate.data = torch.randn(layer.in_features, generator=generator).to(layer.weight.dtype)
    return result


def prepared(architecture, seed=0):
    """A gated model with random gates and Taylor statistics; the weights do not matter to a plan."""
    torch.manual_seed(seed)
    model = gated(architecture.build(), seed=seed)
    for layer in vtp.sites(model).values():
        layer.taylor.copy_(torch.rand(layer.in_features).square() * 7)
        layer.taylor_steps.fill_(7)
    return model


def with_zeros(model: nn.Module, plan: vtp.PruningPlan) -> nn.Module:
    """The gated model with every gate that the plan removes set to 0: what the cut must reproduce."""
    result = copy.deepcopy(model)
    for name, layer in sites(result).items():
        removed = torch.ones(layer.in_features, dtype=torch.bool)
        removed[list(plan.kept[name])] = False
        layer.gate.data[removed] = 0
    return result


def image(model: nn.Module, batch: int = 2, seed: int = 2) -> Tensor:
    """Random images of the model's own size and dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype = model.patch_embed.proj.weight.dtype
    shape = (batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(got, expected):
    """Equal outputs, tensors, dtypes and cost, bit for bit."""
    assert type(got) is type(expected)
    x = image(expected)
    with torch.no_grad():
        assert torch.equal(got(x), expected(x))
    states = got.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype
        assert torch.equal(tensor, states[1][name])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()
