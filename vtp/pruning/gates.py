"""Gates: one learned importance score for each input dimension of each linear projection of a block.

`y = (x * g) @ W.T + b` (Zhu, Tang, Han, "Vision Transformer Pruning", arXiv 2104.08500), computed by
`vtp_kernels.gated_linear` at the cost of a plain linear.
"""

import copy
import threading
from collections.abc import Mapping, Sequence, Set

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtp.files import fingerprint
from vtp.model.architecture import HARMLESS_HOOKS, describe, on_meta, replace_sites
from vtp.model.eva import with_fused_sites
from vtp.model.widths import SITES
from vtp_kernels import fold_gates, gated_linear

torch.fx.wrap("gated_linear")  # a traced program has it as one call


class GatedLinear(nn.Module):
    """A linear layer whose input dimensions are scaled by a learned gate.

    Parameters: `weight` [out_features, in_features], `bias` [out_features] or None, `gate` [in_features],
    1 at the start and float32 whatever the dtype of the weight (casting the whole model casts it too).

    Buffers: `taylor` [in_features] float32, the sum over `taylor_steps` steps of `(g * dL/dg)**2`
    (Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv 1906.10771).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.gate = nn.Parameter(torch.ones(in_features))
        self.register_buffer("taylor", torch.zeros(in_features))
        self.register_buffer("taylor_steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "GatedLinear":
        """Take over the weight and bias of `linear`; all gates are 1."""
        with on_meta():
            gated = cls(linear.in_features, linear.out_features, linear.bias is not None)
        gated.weight, gated.bias = linear.weight, linear.bias
        device = linear.weight.device
        gated.gate = nn.Parameter(torch.ones(linear.in_features, device=device))
        gated.taylor = torch.zeros(linear.in_features, device=device)
        gated.taylor_steps = torch.zeros((), dtype=torch.int64, device=device)
        return gated.train(linear.training)

    def folded_weight(self) -> Tensor:
        """`W * g` in the weight's dtype, [out_features, in_features]."""
        return (self.weight * self.gate).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        if not torch.compiler.is_compiling() and (folded := _folded.of.pop(self, None)) is not None:
            return F.linear(x, *folded)
        return gated_linear(x, self.weight, self.gate, self.bias)

    def accumulate_taylor(self, scale: float = 1.0) -> None:
        """Add this step's `(g * dL/dg)**2` from `gate.grad`, the gradient of the task loss alone.

        Args:
            scale: factor that undoes a loss scaling, 1 / loss scale.

        Raises:
            ValueError: the gate has no gradient.
        """
        accumulate_taylor([self], scale)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


@torch.no_grad()
def accumulate_taylor(layers: Sequence[GatedLinear], scale: float = 1.0) -> None:
    """`GatedLinear.accumulate_taylor` of several layers, at least one, in launches for all together."""
    gradients = [layer.gate.grad for layer in layers]
    if any(gradient is None for gradient in gradients):
        raise ValueError("gate.grad: got None, expected the gradient of a backward pass")
    products = torch._foreach_mul([layer.gate for layer in layers], gradients)
    if scale != 1.0:
        torch._foreach_mul_(products, scale)
    torch._foreach_mul_(products, products)
    torch._foreach_add_([layer.taylor for layer in layers], products)
    torch._foreach_add_([layer.taylor_steps for layer in layers], 1)


def insert_gates(model: nn.Module) -> nn.Module:
    """A copy of a timm VisionTransformer or Eva with a `GatedLinear` at the four sites of each block.

    At gate 1 its outputs equal the model's bit for bit in float32; up to rounding where the model has three
    matrices for queries, keys and values, or two for the hidden dimensions of SwiGLU, which become one.

    Raises:
        UnsupportedModelError: the model, or a part of it, is not supported; it is named.
        ValueError: the model has gates already.
    """
    if any(isinstance(module, GatedLinear) for module in model.modules()):
        raise ValueError("model: it has gates already, expected a dense model")
    describe(model)
    gated = with_fused_sites(copy.deepcopy(model))
    replace_sites(gated, lambda _, linear: GatedLinear.from_linear(linear))
    for block in gated.blocks:
        block.register_forward_pre_hook(_fold_together)
        block.register_forward_hook(_forget_folded, always_call=True)
    return gated


class _Folded(threading.local):
    """What the block that a thread is in has folded: of a layer `weight * gate` and the bias, for its call.

    Not in the layers themselves, which other threads call too, and which are copied.
    """

    def __init__(self) -> None:
        self.of: dict[GatedLinear, tuple[Tensor, Tensor | None]] = {}


_folded = _Folded()


def _fold_together(block: nn.Module, arguments: tuple) -> None:
    """Give the gated layers of a block the weights that `fold_gates` makes of them, if it makes any."""
    if torch.compiler.is_compiling():
        return
    _folded.of.clear()  # of a block that Ctrl-C has ended, where PyTorch calls no hook
    if not arguments or not isinstance(arguments[0], Tensor):  # called by name, or traced
        return
    layers = _gated_layers(block)
    if layers is None:
        return
    weights, gates = [layer.weight for layer in layers], [layer.gate for layer in layers]
    folded = fold_gates(arguments[0], weights, gates, [layer.bias for layer in layers])
    if folded is not None:
        _folded.of.update(zip(layers, zip(*folded, strict=True), strict=True))


def _gated_layers(block: nn.Module) -> list[GatedLinear] | None:
    """The four of a block; None where one is another module by now, or gets its weight only when it is
    called, as from `torch.nn.utils.prune`."""
    layers = []
    for branch, name in (site.split(".") for site in SITES):
        layer = getattr(getattr(block, branch, None), name, None)
        if not isinstance(layer, GatedLinear) or layer._forward_pre_hooks or not layer.weight.is_leaf:
            return None
        layers.append(layer)
    return layers


def _forget_folded(block: nn.Module, arguments: tuple, output: object) -> None:
    """A layer still has its weight where the call ended early: by an error, or when recomputed."""
    if not torch.compiler.is_compiling():
        _folded.of.clear()


HARMLESS_HOOKS.update((_fold_together, _forget_folded))


def with_gates(model: nn.Module) -> nn.Module:
    """The model itself if it has gates, else a gated copy, whose gates are 1."""
    gated = any(isinstance(module, GatedLinear) for module in model.modules())
    return model if gated else insert_gates(model)


def sites(model: nn.Module) -> dict[str, GatedLinear]:
    """The gated layers by name (`blocks.<i>.<site>`), in the order of the forward pass.

    Raises:
        ValueError: the model has no gates.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, GatedLinear)}
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no gates; call vtp.insert_gates(model) first")
    return found


def l1_penalty(gated: nn.Module) -> Tensor:
    """`sum |g|` over all gates of the model, 0-dim, in their dtype, float32 (arXiv 2104.08500).

    For a training loop of your own: `loss = task_loss + 1e-4 * vtp.l1_penalty(gated)`.
    """
    return torch.cat([layer.gate for layer in sites(gated).values()]).abs().sum()


def has_fingerprint(model: nn.Module, known: str) -> bool:
    """Whether `known` is the fingerprint of a model's state, or of the same numbers in another floating
    dtype: a cast that loses nothing, as any to a wider one, leaves a model what it is.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    state = model.state_dict()
    if fingerprint(state) == known:
        return True
    floating = {name for name, tensor in state.items() if tensor.is_floating_point()}
    # Gates are made in float32, whatever the weights are in.
    own = {f"{name}.{each}" for name, layer in model.named_modules() for each in ("gate", "taylor")
           if isinstance(layer, GatedLinear)}  # fmt: skip
    return any(
        fingerprint(cast) == known
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        for names in (floating, floating - own)
        if (cast := _in_dtype(state, names, dtype)) is not None
    )


def _in_dtype(tensors: Mapping[str, Tensor], names: Set[str], dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The tensors, those of `names` in a dtype; None where it has not all of their values, or they are in it
    already."""
    if all(tensors[name].dtype == dtype for name in names):
        return None
    cast = {name: tensors[name].to(dtype) for name in names}
    exact = all(torch.equal(cast[name].to(tensors[name].dtype), tensors[name]) for name in names)
    return {**tensors, **cast} if exact else None
