"""The cases of all ops, and how an implementation is written down."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vtp.comparison.runtimes import Run
from vtp.model.widths import BlockWidths
from vtp.runtime.cpu import panels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Widths(BlockWidths):
    """The kept widths of a block, the widths of its residual stream, queries and keys, and the tokens."""

    embed: int = 0
    head_dim: int = 64
    tokens: int = 197

    @classmethod
    def dense(cls, heads: int, head_dim: int = 64, tokens: int = 197) -> "Widths":
        D = heads * head_dim
        return cls(D, (head_dim,) * heads, D, 4 * D, embed=D, head_dim=head_dim, tokens=tokens)

    @property
    def scale(self) -> float:
        """The scale of attention's scores: that of the dense model, whatever is left of the values."""
        return self.head_dim**-0.5

    def linear(self, site: str) -> tuple[int, int]:
        """Inputs and outputs of the linear at a site."""
        values = sum(self.values)
        return {
            "qkv": (self.qkv, 2 * len(self.values) * self.head_dim + values),
            "proj": (values, self.embed),
            "fc1": (self.fc1, self.fc2),
            "fc2": (self.fc2, self.embed),
        }[site]


# DeiT at 224 px, and a cut of it that leaves about 60% of each site: odd widths and unequal heads, as a
# threshold over all gates leaves them, but always the same, so that figures stay comparable.
WIDTHS = {
    "tiny": {"dense": Widths.dense(3), "compact": Widths(115, (29, 51, 37), 113, 461, embed=192)},
    "small": {
        "dense": Widths.dense(6),
        "compact": Widths(231, (17, 53, 37, 45, 31, 49), 229, 923, embed=384),
    },
    "base": {
        "dense": Widths.dense(12),
        "compact": Widths(461, (53, 19, 37, 45, 27, 51, 33, 43, 47, 29, 39, 41), 463, 1845, embed=768),
    },
    "toy": {
        "dense": Widths.dense(2, head_dim=16, tokens=7),
        "compact": Widths(19, (5, 11), 21, 37, embed=32, head_dim=16, tokens=7),
    },
}


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    widths: "dense" or "compact"; site: "attn", or which linear or what reads like one; backward: with the
    gradients of all operands, or the forward pass alone, without autograd.
    """

    model: str
    widths: str
    site: str
    batch: int
    dtype: str
    backward: bool

    @property
    def block(self) -> Widths:
        return WIDTHS[self.model][self.widths]

    def activations(self, width: int) -> Tensor:
        """Normal [batch, tokens, width], float32."""
        return torch.randn(self.batch, self.block.tokens, width)

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.model}-{self.widths}-{self.site}-{direction}-b{self.batch}-{self.dtype}"


@dataclass(frozen=True)
class Implementation:
    """A way to compute an op.

    prepare: takes the operands by name, returns the call that is timed; what a user does once, such as
    packing a weight, happens in it. kept: what is compared of the call's result: all but its padding.
    reference: what it has to compute, if that is not what the op computes.
    """

    prepare: Callable[..., Run]
    kept: Callable[[Tensor], Tensor] = lambda out: out
    reference: Callable[..., Tensor] | None = None


def plain(function: Callable[..., Tensor]) -> Implementation:
    """A function of the operands as it is."""
    return Implementation(lambda **operands: lambda: function(**operands))


def linear_operands(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """weight [outputs, inputs] and bias [outputs] of such a size that products are of the size of x."""
    return torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)


def padded(t: Tensor, multiple: int, axes: tuple[int, ...] = (-1,)) -> Tensor:
    """t with zeros up to a multiple along `axes`."""
    for axis in axes:
        shape = list(t.shape)
        shape[axis] = -shape[axis] % multiple
        t = torch.cat([t, t.new_zeros(shape)], dim=axis)
    return t


def engine_linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """`activations` [M, K] to x W^T + b in float32, N columns rounded up to 16 of it, by the micro-kernels of
    the CPU engine. The weight is packed here, once."""
    packed, bias = panels(weight, weight.dtype).view(-1).view(torch.uint8), padded(bias.float(), 16)
    is_bf16 = weight.dtype == torch.bfloat16
    return lambda x: torch.ops.vtp.cpu_linear(x, packed, bias, len(bias), is_bf16)
