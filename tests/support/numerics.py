"""The project's rule for numerical error, stated once, for CPU and GPU tests alike."""

from __future__ import annotations

import torch

# How many times the error of PyTorch, computing in the same dtype, a result may have.
FACTOR = 2.0
# What is allowed even where PyTorch happens to be exact: the neighbouring number of the result's dtype ...
TINY_ULPS = 1.0
# ... and the rounding of a float32 accumulation, relative to the largest of the results it is compared with.
TINY_ACCUMULATION = 8.0
# The worst of fewer errors than this is a matter of luck. The worst of 256 normal ones is 2.8 sigma.
FEWEST = 256
# The mean of fewer is luck too: elements that share a factor, rounded once, are not independent.
FEWEST_FOR_MEAN = 16


def assert_close_to_float64(
    out: torch.Tensor, reference64: torch.Tensor, same_dtype_torch: torch.Tensor, name: str = "out"
) -> None:
    """Assert `|out - ref64| <= 2 * |torch in the same dtype - ref64| + tiny`.

    It cannot be applied number by number: PyTorch's error at one element may be 0 by luck. So it is applied
    twice:

    - In the maximum norm, which finds single wrong elements, against the worst error that PyTorch makes among
      the elements of the same binade or below, and among the 256 smallest at least. (The worst error of the
      whole tensor comes from the largest elements and would hide errors in rows of smaller scale. The worst
      of fewer than 256 would be luck again, since a sum that cancels keeps the error of its terms.)
    - In the Euclidean norm, which finds errors that are small but everywhere: 1 % in bfloat16 is hardly more
      than its last place, but several times its mean rounding.

    `tiny` stands for luck in tensors of few elements, and shrinks in the Euclidean norm as luck averages out.
    It is one unit in the last place of the element, because two correct sums may round to either neighbour,
    plus 8 units of float32 (float64 for a float64 `out`) of the largest of the elements above, for a sum that
    cancels. In a tensor of one element a sum may cancel by more: choose other data there.

    NaN and infinities must be where, and what, they are in the reference cast to the dtype. Integers and
    booleans must be equal.
    """
    assert reference64.dtype == torch.float64 or not out.is_floating_point(), (
        f"{name}: reference is not float64"
    )
    assert out.dtype == same_dtype_torch.dtype, (
        f"{name}: dtype {out.dtype}, expected {same_dtype_torch.dtype}"
    )
    for other in (reference64, same_dtype_torch):
        assert out.shape == other.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(other.shape)}"
    out, reference64, same_dtype_torch = (t.detach().cpu() for t in (out, reference64, same_dtype_torch))
    if not out.is_floating_point():
        wrong = (out != reference64).sum().item()
        assert not wrong, f"{name}: {wrong} of {out.numel()} elements differ"
        return
    target = reference64.to(out.dtype)
    finite = target.isfinite()
    same_specials = torch.where(finite, out.isfinite(), (out == target) | (out.isnan() & target.isnan()))
    if not same_specials.all():
        raise AssertionError(
            f"{name}: {(~same_specials).sum()} of {out.numel()} elements are NaN or infinite where the "
            f"reference is not, or the reverse; first at {(~same_specials).nonzero()[0].tolist()}; "
            f"{out.isnan().sum()} are NaN (never written?)"
        )
    assert same_dtype_torch[finite].isfinite().all(), f"{name}: PyTorch itself overflows; choose other data"

    result, expected, torchs = (t[finite].double() for t in (out, reference64, same_dtype_torch))
    if not expected.numel():
        return
    error, torch_error = (result - expected).abs(), (torchs - expected).abs()
    torch_worst, largest = _worst_of_its_size(expected, torch_error, expected.abs())
    accumulation = torch.finfo(torch.promote_types(out.dtype, torch.float32)).eps
    tiny = TINY_ULPS * _ulp(expected, out.dtype) + TINY_ACCUMULATION * accumulation * largest
    bound = FACTOR * torch_worst + tiny
    if (error > bound).any():
        worst = int((error / bound).argmax())
        where = finite.nonzero()[worst].tolist()
        raise AssertionError(
            f"{name}: {(error > bound).sum()} of {out.numel()} elements are further from float64 than "
            f"{FACTOR:g} times PyTorch's error; worst at {where}: got {result[worst]:.9g}, float64 "
            f"{expected[worst]:.9g}, PyTorch {torchs[worst]:.9g}; error {error[worst]:.3g}, allowed "
            f"{bound[worst]:.3g}"
        )
    mean, torch_mean = (e.square().mean().sqrt() for e in (error, torch_error))
    allowed = (
        FACTOR * torch_mean + tiny.square().mean().sqrt() * min(1.0, FEWEST_FOR_MEAN / len(expected)) ** 0.5
    )
    assert mean <= allowed, (
        f"{name}: root mean square error {mean:.3g}, allowed {allowed:.3g} ({FACTOR:g} times PyTorch's "
        f"{torch_mean:.3g} and tiny); the largest element is {expected.abs().max():.3g}"
    )


def _worst_of_its_size(expected: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
    """For each element the largest value among those of its binade or below, and among `FEWEST` at least.

    Exact zeros do not count among these: a pruned column is full of them, and PyTorch makes no error there.
    """
    binade = torch.frexp(expected).exponent.masked_fill(expected == 0, -(2**30))
    ordered, order = binade.sort()
    fewest = min(FEWEST + int((expected == 0).sum()), len(expected))
    last = (torch.searchsorted(ordered, binade, right=True) - 1).clamp(min=fewest - 1)
    return [value[order].cummax(0).values[last] for value in values]


def _ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance of neighbouring numbers of `dtype` at `values`."""
    finfo = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=finfo.smallest_normal)).exponent - 1
    return finfo.eps * torch.exp2(exponent.double())
