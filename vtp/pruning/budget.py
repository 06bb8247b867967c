"""A budget of `make_plan`, as a limit in whole units: dimensions, MACs, parameters or nanoseconds."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping

import numpy as np

from vtp.model.architecture import Architecture
from vtp.model.cost import block_cost, surroundings_cost
from vtp.model.widths import BlockWidths
from vtp.pruning.latency_table import LatencyTable, LatencyTableError, cached_table, how_to_make_one
from vtp.pruning.plan import PlanError
from vtp.words import counted

_UNITS = {"macs": "MACs", "params": "parameters"}


def one_budget(**budgets: float | None) -> dict[str, float]:
    """The one budget that is given, by its name. Raises PlanError where there are none or several, and where
    it is out of range."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise PlanError(f"{', '.join(budgets)}: got {sorted(given) or 'none'}, expected exactly one of them")
    ((name, value),) = given.items()
    if name == "rate" and not (is_number(value) and 0 <= value < 1):
        raise PlanError(f"rate: got {value!r}, expected a share in [0, 1)")
    if not (is_number(value) and (value > 0 or (value == 0 and name != "latency_ms"))):
        raise PlanError(f"{name}: got {value!r}, expected a positive number")
    return {name: float(value)}


def is_number(value: object) -> bool:
    """Whether a value is a real number that a float holds, neither NaN nor infinite nor a truth value."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return value < 1e300 and not value <= -1e300  # also false for NaN, and for integers that no float holds


@dataclasses.dataclass(frozen=True)
class Limit:
    """A budget, counted in whole units: dimensions, MACs, parameters or nanoseconds.

    name, value: the argument of `make_plan`; most: units that may remain; outside: units outside the blocks;
    size: units of a block; keys: by attention key widths of its heads, where they are not those of the dense
    model; text: a number of units in words.
    """

    name: str
    value: float
    most: float
    outside: int
    size: Callable[[BlockWidths], int]
    keys: Mapping[str, tuple[int, ...]]
    text: Callable[[float], str]


def limit_of(
    architecture: Architecture,
    budget: Mapping[str, float],
    table: LatencyTable | None,
    keys: Mapping[str, tuple[int, ...]],
) -> Limit:
    """The limit of one budget, for blocks with these key widths.

    Raises:
        PlanError: it is of milliseconds, and there is no latency table, or one of another model.
    """
    ((name, value),) = budget.items()
    if name == "rate":
        full = widths_array(architecture).sum()
        most = full - _removed_at_least(value, full)
        return Limit(name, value, most, 0, _dimensions, keys, lambda n: counted(round(n), "dimension"))
    if name != "latency_ms":

        def size(widths: BlockWidths) -> int:
            return getattr(block_cost(architecture, widths), name)

        outside, unit = getattr(surroundings_cost(architecture), name), _UNITS[name]
        return Limit(name, value, value, outside, size, keys, lambda n: f"{n:,.0f} {unit}")
    table = _table_for(architecture, table)
    most = math.floor(1e6 * value)
    most += (most + 1) / 1e6 <= value  # a prediction that is asked for again must be met
    outside, size = table.outside_nanoseconds, table.block_nanoseconds
    return Limit(name, value, most, outside, size, keys, lambda n: f"{n / 1e6:,.6g} ms")


def _dimensions(widths: BlockWidths) -> int:
    """Gates that are left in a block."""
    return widths.qkv + sum(widths.values) + widths.fc1 + widths.fc2


def refuse_less_than(least: float, most: float, limit: Limit) -> None:
    """Raise PlanError where a limit of `most` units is less than what has to remain, `least`."""
    if least > most:
        may = limit.text(most).split()[0]
        raise PlanError(
            f"{limit.name}: {limit.value:g} cannot be met: {limit.text(least)} remain when all is removed "
            f"but min_keep and protected parts, more than the {may} that may; protect less, lower min_keep "
            "or cut less"
        )


def _table_for(architecture: Architecture, table: LatencyTable | None) -> LatencyTable:
    table = cached_table(architecture) if table is None else table
    if not isinstance(table, LatencyTable | None):
        raise PlanError(f"latency_table: got {type(table).__name__}, expected a LatencyTable")
    if table is None:
        raise PlanError(
            "latency_ms: there is no latency table of this model for this machine, its versions and this "
            f"number of threads, for one image in float32; {how_to_make_one()}"
        )
    try:
        table.check_geometry(architecture)
    except LatencyTableError as error:
        raise PlanError(f"latency_table: {error}") from error
    return table


def _removed_at_least(rate: float, total: int) -> int:
    """Dimensions that a rate removes, rounded up; 0.3 * 10 is 3 although its float is a little more."""
    return math.ceil(round(rate * total, 6))


def widths_array(architecture: Architecture) -> np.ndarray:
    """Dense widths, int64 [depth, 3 + heads]: inputs of qkv, fc1 and fc2, then the values of each head."""
    full = architecture.dense_widths
    return np.array([[full.qkv, full.fc1, full.fc2, *full.values]] * architecture.depth, dtype=np.int64)
