"""What the tests of all ops on CPU share: layouts of inputs, what is saved, compilation and export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import nn

LAYOUTS = ["transposed", "padded-rows", "strided-rows", "misaligned", "every-other-column"]


def with_layout(kind: str, t: torch.Tensor, spare: int = 0) -> torch.Tensor:
    """t's values in another layout; `spare` elements more than it needs between the rows of "padded-rows"."""
    width = t.shape[-1]
    if kind == "transposed":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "padded-rows":
        return F.pad(t, (0, -width % 8 + spare), value=torch.nan)[..., :width]
    if kind == "strided-rows":
        return F.pad(t, (0, 3), value=torch.nan)[..., :width]
    if kind == "misaligned":
        return torch.cat([t.new_full((1,), torch.nan), t.flatten()])[1:].view(t.shape)
    if kind == "every-other-column":
        return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    raise ValueError(kind)


def leaves(
    tensors: Iterable[torch.Tensor | None], needs: Sequence[bool] | None = None
) -> list[torch.Tensor | None]:
    """Copies that need a gradient, or as `needs` says; None stays None."""
    tensors = list(tensors)
    return [
        None if t is None else t.detach().clone().requires_grad_(need)
        for t, need in zip(tensors, needs or [True] * len(tensors), strict=True)
    ]


def saved_by(function: Callable, *tensors: torch.Tensor | None) -> dict[int, torch.Tensor]:
    """What `function(*tensors)` saves for its backward pass, by address."""
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*tensors)
    return saved


def check_compilation(function: Callable, results: Callable[[Callable, int], Iterable[torch.Tensor]]) -> None:
    """`function` compiles without breaks, does not compile again for another batch, and gives the same bits.

    results: `results(function, batch)` gives what is compared, for so many images.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 5, 8):
        with torch._dynamo.config.patch(error_on_recompile=True):
            got, expected = (results(f, batch) for f in (compiled, function))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), f"batch {batch}"


def check_export(layer: nn.Module, *shapes: tuple[int, ...]) -> None:
    """`layer` exports with a dynamic first axis; shapes: of its inputs, without it."""
    given = tuple(torch.randn(4, *shape) for shape in shapes)
    axes = ({0: torch.export.Dim("batch")},) * len(shapes)
    exported = torch.export.export(layer, given, dynamic_shapes=axes)
    for batch in (1, 9):
        given = [torch.randn(batch, *shape) for shape in shapes]
        torch.testing.assert_close(exported.module()(*given), layer(*given))
