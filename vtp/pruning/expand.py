"""Back from a compact model to a dense one, to be gated, calibrated and cut again.

`expand` puts zeros where an earlier cut has removed dimensions: the model computes what the compact one does,
at the cost of the dense one, and every part of vtp takes it. What is zero stays zero in training, as nothing
reaches it and nothing comes from it; `removed_before` in `removed.py` finds it again, so that the next plan
leaves it out.
"""

import copy
import dataclasses

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vtp.model.architecture import (
    UnsupportedModelError,
    class_name,
    describe_surroundings,
    refuse_changed_behaviour,
    wrapped_hint,
)
from vtp.model.images import inherit_description
from vtp.model.widths import SITES
from vtp.pruning.compact import CompactBlock, CompactModel, ConstantBranch, block_rows, made_values
from vtp.pruning.dense_block import hidden_rows


@torch.no_grad()
def expand(small: CompactModel) -> VisionTransformer | Eva:
    """The dense timm model that computes what a compact one does. It shares no memory with it.

    Args:
        small: from `vtp.compact` or `vtp.load`, trained since or not. It is not changed.

    Returns:
        A model of the architecture that `small` was cut from, with its dtype, device and train/eval mode, for
        `insert_gates`, `calibrate`, `make_plan` and `compact`. Plans for it leave out what is gone already.

    Raises:
        UnsupportedModelError: it is no compact model; a layer of it was replaced, or computes something else;
            or it has a constant that a model without biases cannot put out.
    """
    if not isinstance(small, CompactModel):
        raise UnsupportedModelError(
            f"model: got {class_name(small)}, expected a compact model{wrapped_hint(small)}"
        )
    refuse_changed_behaviour(small)
    architecture = dataclasses.replace(small.plan.architecture, **describe_surroundings(small))
    dense = architecture.build("meta", weight_init="skip")
    state = {name: tensor for name, tensor in small.state_dict().items() if not name.startswith("blocks.")}
    like = small.patch_embed.proj.weight
    for i, block in enumerate(small.blocks):
        shapes = {name: tensor.shape for name, tensor in dense.blocks[i].state_dict().items()}
        empty = {name: like.new_zeros(shape) for name, shape in shapes.items()}
        _fill_attention(small, i, block, empty)
        _fill_mlp(small, i, block, empty)
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in empty.items()}
    if small.plan.architecture.rotary:
        dense.rope = copy.deepcopy(small.rope)
    dense.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    inherit_description(dense, small)
    if architecture.distilled:
        dense.set_distilled_training(small.distilled_training)
    return dense.train(small.training)


def _fill_attention(small: CompactModel, i: int, block: CompactBlock, into: dict[str, Tensor]) -> None:
    """Put the tensors of an attention branch where they were, by name within the block."""
    plan = small.plan
    if isinstance(block.attn, ConstantBranch):
        for name in ("attn.q_norm.weight", "attn.k_norm.weight", "ls1.gamma", "gamma_1"):
            if name in into:
                into[name].fill_(1)
        if "attn.proj.bias" in into:
            into["attn.proj.bias"].copy_(block.attn.bias)
        elif "attn.norm.bias" in into:
            into["attn.norm.bias"][0] = 1
            into["attn.proj.weight"][:, 0] = block.attn.bias
        elif "attn.qkv.bias" in into:  # a value that is 1 at every token, and so is every average of it
            into["attn.qkv.bias"][2 * small.embed_dim] = 1
            into["attn.proj.weight"][:, 0] = block.attn.bias
        else:
            _refuse_constant(f"blocks.{i}.attn", block.attn)
        return
    _refuse_replaced(f"blocks.{i}.attn", block.attn, ("qkv", "proj"))
    device = block.attn.qkv.weight.device
    inputs, values = (_indices(plan.kept[f"blocks.{i}.{site}"], device) for site in SITES[:2])
    made = made_values(values, plan.architecture)
    rows = block_rows(plan.key_widths(i), made, small.embed_dim, plan.head_dim)
    _fill_norm("norm1", block.norm1, inputs, into)
    _fill_norm("attn.norm", block.attn.norm, values, into)
    into["attn.qkv.weight"][rows[:, None], inputs] = block.attn.qkv.weight
    into["attn.proj.weight"][:, values] = block.attn.proj.weight
    if "attn.qkv.bias" in into:
        into["attn.qkv.bias"][rows] = block.attn.qkv.bias
    for name in ("attn.proj.bias", "attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight",
                 "attn.k_norm.bias", "ls1.gamma", "gamma_1"):  # fmt: skip
        if name in into:
            into[name].copy_(block.state_dict()["ls1.gamma" if name == "gamma_1" else name])


def _fill_mlp(small: CompactModel, i: int, block: CompactBlock, into: dict[str, Tensor]) -> None:
    """The same for a feed-forward branch."""
    if isinstance(block.mlp, ConstantBranch):
        for name in ("ls2.gamma", "gamma_2"):
            if name in into:
                into[name].fill_(1)
        if "mlp.fc2.bias" in into:
            into["mlp.fc2.bias"].copy_(block.mlp.bias)
        elif "mlp.norm.bias" in into:
            into["mlp.norm.bias"][0] = 1
            into["mlp.fc2.weight"][:, 0] = block.mlp.bias
        else:
            _refuse_constant(f"blocks.{i}.mlp", block.mlp)
        return
    _refuse_replaced(f"blocks.{i}.mlp", block.mlp, ("fc1", "fc2"))
    device = block.mlp.fc1.weight.device
    inputs, hidden = (_indices(small.plan.kept[f"blocks.{i}.{site}"], device) for site in SITES[2:])
    _fill_norm("norm2", block.norm2, inputs, into)
    _fill_norm("mlp.norm", block.mlp.norm, hidden, into)
    made = hidden_rows(hidden, small.plan.architecture)
    into["mlp.fc1.weight"][made[:, None], inputs] = block.mlp.fc1.weight
    into["mlp.fc2.weight"][:, hidden] = block.mlp.fc2.weight
    if "mlp.fc1.bias" in into:
        into["mlp.fc1.bias"][made] = block.mlp.fc1.bias
        into["mlp.fc2.bias"].copy_(block.mlp.fc2.bias)
    for name in ("ls2.gamma", "gamma_2"):
        if name in into:
            into[name].copy_(block.ls2.gamma)


def _fill_norm(name: str, norm: nn.Module, kept: Tensor, into: dict[str, Tensor]) -> None:
    if not isinstance(norm, nn.Identity):
        into[f"{name}.weight"][kept] = norm.weight
        into[f"{name}.bias"][kept] = norm.bias


def _indices(kept: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(kept, dtype=torch.int64, device=device)


def _refuse_constant(where: str, branch: ConstantBranch) -> None:
    if branch.bias.any():
        raise UnsupportedModelError(
            f"{where}: it is a constant that was trained, and the dense model has no biases to put it out"
        )


def _refuse_replaced(where: str, owner: nn.Module, names: tuple[str, ...]) -> None:
    for name in names:
        layer = getattr(owner, name)
        if type(layer) is not nn.Linear:
            raise UnsupportedModelError(
                f"{where}.{name}: got {class_name(layer)}, expected torch.nn.Linear; merge adapters, and "
                "expand before you quantize"
            )
