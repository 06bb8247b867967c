"""Second moments that are gathered batch by batch, and what is solved from them: ridge, OBS, whitened SVD.

The sums are float64 and centred where the first batch has its mean, so that a mean that is large beside the
deviations costs no digits.
"""

import math

import torch
from torch import Tensor

from vtp.group import Group, sum_over

# Damping is at least this share of the mean variance: with all inputs independent of each other, or more
# samples than anyone has, the estimate of OAS is that nothing is needed, and rounding says something else.
LEAST_DAMPING = 1e-8
_ROWS_AT_ONCE = 2048  # of which the products are summed in the rows' own precision
_LEAST_COLUMNS = 128  # of x' x at once, where an eighth of them is fewer
_NOTHING = 1e-60  # a variance: what float32 can hold squared, and far from it


def finite(tensor: Tensor) -> Tensor:
    """The tensor, of moments, if all of it is finite. Raises ValueError."""
    if not tensor.isfinite().all():
        raise ValueError(
            "model: got activations that are NaN, infinite or too large to square, expected finite ones"
        )
    return tensor


class Moments:
    """Count, mean and centred second moments of rows x, and of x with a target e beside it.

    Args:
        inputs: width of x.
        outputs: width of e, 0 if there is none.
        device: where the sums are; that of the rows.
    """

    def __init__(self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._shift: Tensor | None = None
        self._x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._e = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._xe = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor | None]] = []

    def add(self, x: Tensor, e: Tensor | None = None) -> None:
        """Take in rows x [n, inputs] and e [n, outputs]."""
        if not len(x):
            return
        if self._shift is None:
            self._shift = x.mean(0)
        self.count += len(x)
        # A copy of the rows, as whoever gave them may go on to write to them.
        self._waiting.append((x - self._shift, None if e is None else e.clone()))
        if sum(len(rows) for rows, _ in self._waiting) >= _ROWS_AT_ONCE:
            self._take_in()

    def _take_in(self) -> None:
        """Sum up the rows that wait: the sums are large, and each is read and written once for many rows."""
        if not self._waiting:
            return
        x = torch.cat([rows for rows, _ in self._waiting])
        targets = [e for _, e in self._waiting if e is not None]
        self._waiting = []
        self._x += x.sum(0)
        step = max(_LEAST_COLUMNS, -(-x.shape[1] // 8))
        for start in range(0, x.shape[1], step):  # what is left of these columns is above them, turned
            some = slice(start, start + step)
            self._xx[some, start:] += x[:, some].T @ x[:, start:]
        if targets:
            e = torch.cat(targets)
            self._e += e.sum(0)
            self._xe += x.T @ e

    def sum_over(self, group: Group) -> None:
        """Be of the rows of all processes of a group, of which each took in some, or none; the last of all.

        Each has centred its rows where its own first batch had its mean. They are centred anew, in float64,
        around the mean of these: the products lose no digits by it.
        """
        if group is None:
            return
        self._take_in()
        own = torch.zeros_like(self._x) if self._shift is None else self._shift.double()
        known = torch.cat([self.count * own, own.new_tensor([self.count])])
        sum_over(group, known)
        shift = known[:-1] / known[-1]
        moved = own - shift
        cross = torch.outer(self._x, moved)
        self._xx += cross + cross.T + self.count * torch.outer(moved, moved)
        self._xe += torch.outer(moved, self._e)
        self._x += self.count * moved
        self.count, self._shift = int(known[-1]), shift
        sum_over(group, self._x, self._xx, self._e, self._xe)

    @property
    def mean(self) -> Tensor:
        """Mean of x, float64 [inputs]."""
        self._take_in()
        return self._shift.double() + self._x / self.count

    @property
    def mean_target(self) -> Tensor:
        """Mean of e, float64 [outputs]."""
        self._take_in()
        return self._e / self.count

    @property
    def covariance(self) -> Tensor:
        """Of x with itself, float64 [inputs, inputs]."""
        self._take_in()
        mean = self._x / self.count
        # Below the diagonal, but for its blocks, there is nothing: the product is symmetric.
        upper = self._xx.triu()
        return (upper + upper.triu(1).T) / self.count - torch.outer(mean, mean)

    @property
    def raw(self) -> Tensor:
        """Second moments around 0, not around the mean: E x x', float64 [inputs, inputs]."""
        return self.covariance + torch.outer(self.mean, self.mean)

    @property
    def cross(self) -> Tensor:
        """Covariance of x with e, float64 [inputs, outputs]."""
        self._take_in()
        return self._xe / self.count - torch.outer(self._x / self.count, self._e / self.count)


def oas_damping(covariance: Tensor, samples: int) -> float:
    """What is added to the diagonal of a covariance estimated from so many samples, before it is inverted.

    The shrinkage rho towards a multiple of the identity is that of Chen, Wiesel, Eldar and Hero, "Shrinkage
    algorithms for MMSE covariance estimation" (OAS), IEEE TSP 58(10), 2010, equation 23; `(1 - rho) C + rho
    m` is, but for a factor, `C + rho / (1 - rho) m`, where m is the mean variance. Where all directions vary
    alike, as whitened values do, rho is 1 however many samples there are: no harm to a covariance, and the
    end of any fit, which the factor does matter to. So rho is `(p + 1) / (samples + 1)` at most, what it is
    for as many alike directions without the term that takes them for the target.

    Raises:
        ValueError: the covariance is not finite.
    """
    p = len(covariance)
    trace, square = covariance.trace().item(), finite(covariance.square().sum()).item()
    mean = trace / p
    spread = (samples + 1 - 2 / p) * (square - trace**2 / p)
    rho = ((1 - 2 / p) * square + trace**2) / spread if spread > 0 else 1.0
    rho = min(rho, (p + 1) / (samples + 1), 1 - LEAST_DAMPING)
    return max(rho / (1 - rho), LEAST_DAMPING) * mean


def ridge(moments: Moments, damping: float | None = None, bias: bool = True) -> tuple[Tensor, Tensor]:
    """The linear map from x to e of least damped squared error: (weight [outputs, inputs], bias [outputs]).

    `weight = argmin E|e - weight x - bias|^2 + damping |weight|^2`; where e is what a linear layer lacks,
    this draws it towards the weights that it has. float64.

    Args:
        damping: as a share of the mean variance of x, of which 1e-8 are always there; None takes that of OAS.
        bias: False for a layer that has none, whose weight has to make up for the mean too.
    """
    mean = moments.mean if bias else torch.zeros_like(moments.mean)
    covariance, cross = moments.covariance, moments.cross
    if not bias:
        covariance, cross = moments.raw, cross + torch.outer(moments.mean, moments.mean_target)
    extra = oas_damping(covariance, moments.count)
    if damping is not None:
        extra = max(damping, LEAST_DAMPING) * covariance.diagonal().mean().item()
    if extra > 0:
        damped = covariance + extra * torch.eye(len(covariance)).to(covariance)
        weight = torch.linalg.solve(damped, finite(cross)).T
    else:  # x is constant, and says nothing of e
        weight = torch.zeros_like(cross).T
    return weight, finite(moments.mean_target) * bias - weight @ mean


def root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric square root of a positive semi-definite matrix and its inverse, float64 [n, n].

    Directions without variance get one of 1e-10 of the largest, so that there is an inverse. Where nothing
    varies the root is 0, and what is given for its inverse 1, which makes no number large.

    Raises:
        ValueError: the matrix is not finite.
    """
    values, vectors = torch.linalg.eigh(finite(covariance))
    if values[-1] < _NOTHING:
        return torch.zeros_like(covariance), torch.eye(len(covariance)).to(covariance)
    values = values.clamp_min(values[-1].item() * 1e-10)
    return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T


def narrowed_scores(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions in which the scores of one head are told best: (to_query, to_key, energies).

    With A and B the roots of the second moments of queries, and of keys centred in each image (the softmax
    does not see what is equal for all keys), and `U S V' = svd(A B)`, the maps are `A^-1 U S^1/2` and
    `B^-1 V S^1/2`: the first r columns of each turn q and k to rank r, with the scores' mean square error
    over all pairs of tokens as small as any rank r has it, `sum S[r:]^2`. All columns together are exact.

    Args:
        queries, keys: those second moments, float64 [d, d].

    Returns:
        to_query, to_key: [d, d], for `q @ to_query[:, :r]`; energies: S^2 [d], largest first.
    """
    a, a_inverse = root(queries)
    b, b_inverse = root(keys)
    u, s, vh = torch.linalg.svd(a @ b)
    # A score that nothing depends on has S = 0; its columns are free, and 0 would not be exact at full rank.
    scale = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
    return (a_inverse @ u) * scale, (b_inverse @ vh.T) * scale, s.square()


def turned_values(covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of one head's output that matter most behind proj: (turn, back, energies).

    With R the root of the covariance of the head's output o and `U S V' = svd(R W')`, `z = o @ turn`, `turn =
    R^-1 U`, has the most of `W o` in its first columns: the error of the first r is `sum S[r:]^2`. The turn
    goes into the rows of v, and `W back` in the place of W, with `back = R U`: `W back z = W o`.

    Args:
        covariance: of o, float64 [d, d].
        weight: the columns of proj for this head, [outputs, d].

    Returns:
        turn, back: [d, d]; energies: S^2 [d], largest first.
    """
    r, r_inverse = root(covariance)
    u, s, _ = torch.linalg.svd(r @ weight.double().T, full_matrices=True)
    energies = torch.zeros(len(r), dtype=s.dtype, device=s.device)
    energies[: len(s)] = s.square()
    return r_inverse @ u, r @ u, energies


def obs_curve(covariance: Tensor, weight: Tensor, samples: int, block: int = 128) -> tuple[Tensor, Tensor]:
    """Greedy removal of a linear layer's inputs, each time of the one whose loss costs least.

    "Optimal brain surgeon" (Hassibi and Stork, 1993) for a layer's mean square error: removing input j, and
    making up for it by the others, costs `|W_j|^2 / [C^-1]_jj`; C^-1 and W are then updated by Schur
    complements. So the sum of these costs is the error of the closed-form refit of what is left, at every
    width. Taking all the costs at once, without the updates, is a trap: of two equal inputs both cost
    nothing.

    Args:
        covariance: C of the inputs, float64 [p, p].
        weight: W [outputs, p].
        samples: rows that C was estimated from, for its damping.
        block: removals between updates of the whole matrices; what they owe is kept aside meanwhile.

    Returns:
        order: int64 [p], first what is removed first; errors: float64 [p + 1], after so many removals.
    """
    eye = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    inverse = _inverse(covariance + _positive(covariance, samples) * eye)
    gram = weight.double().T @ weight.double()  # of the columns of W, which the costs need and nothing else
    left = torch.arange(len(covariance), device=covariance.device)
    order: list[int] = []
    errors = [0.0]
    while len(left):
        steps = min(block, len(left))
        # With c = inverse[:, j] / inverse[j, j]^1/2 the updates are inverse - c c' and gram - c d' - d c'.
        c, d = (torch.zeros(steps, len(left), dtype=torch.float64, device=left.device) for _ in range(2))
        variances, norms = inverse.diagonal().clone(), gram.diagonal().clone()
        alive = torch.ones(len(left), dtype=torch.bool, device=left.device)
        removed = []
        for step in range(steps):
            costs = torch.where(alive, norms.clamp_min(0) / variances.clamp_min(1e-300), math.inf)
            j = int(costs.argmin())
            cost = costs[j].item()
            column = inverse[j] - c[:step, j] @ c[:step]
            column = column / column[j].clamp_min(1e-300).sqrt()
            inner = gram[j] - c[:step, j] @ d[:step] - d[:step, j] @ c[:step]
            c[step], d[step] = column, inner / column[j] - cost / 2 * column
            variances -= c[step].square()
            norms -= 2 * c[step] * d[step]
            alive[j] = False
            removed.append(j)
            errors.append(errors[-1] + cost)
        order += left[removed].tolist()
        c, d, left = c[:, alive], d[:, alive], left[alive]
        inverse = inverse[alive][:, alive] - c.T @ c
        both = c.T @ d
        gram = gram[alive][:, alive] - both - both.T
    return torch.tensor(order), torch.tensor(errors, dtype=torch.float64)


def _inverse(matrix: Tensor) -> Tensor:
    """The inverse of a symmetric matrix, faster where rounding has left it positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.inv(matrix) if failed else torch.cholesky_inverse(factor)


def _positive(covariance: Tensor, samples: int) -> float:
    """The damping of a matrix that must have an inverse, even that of constants."""
    return max(oas_damping(covariance, samples), torch.finfo(torch.float32).tiny)
