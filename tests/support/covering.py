"""The quick lane: of a test's product of parameters, a covering array.

Each `pytest.mark.parametrize` of a test, and each parametrized fixture that it uses, is an axis. A test with
three axes or more of shapes, dtypes and paths is a product of them, and a defect hardly ever needs more than
two of its values together. So the quick lane runs a subset in which every pair of values occurs that the
product has, and the rest is marked `thorough`. A test says otherwise by a marker:

    @pytest.mark.covering(1)           every single value occurs: for axes that do not act on each other
    @pytest.mark.covering(None)        the whole product
    @pytest.mark.covering(by=traits)   every pair of what `traits(**parameters)` gives: for rows of one axis
                                       that have something in common, as the planted defects of one kernel

Which of them run is a function of the product alone: no chance, no state, the same in every process. What is
asked for by its id is no product, and runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence

import pytest

# How many values at a time are covered, unless a test says otherwise.
STRENGTH = 2


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "thorough: run by `make test-all`, left out by `make test`")
    config.addinivalue_line(
        "markers", "covering(strength=2, by=None): what the quick lane takes of a product of parameters"
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in set_aside(items):
        item.add_marker(pytest.mark.thorough)


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """The indices of rows in which all combinations of `strength` values occur that occur in `rows`.

    Greedy: the row that has the most combinations not seen yet, the first of those where several have.
    """
    combinations = [set(_combinations(row, strength)) for row in rows]
    missing = set().union(*combinations)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(combinations[index] & missing))
        chosen.append(best)
        missing -= combinations[best]
    return sorted(chosen)


def _combinations(row: Sequence[Hashable], strength: int) -> Iterator[tuple]:
    """Each with the axes it is of; of a row with fewer axes, the row itself."""
    return itertools.combinations(enumerate(row), min(strength, len(row)))


def set_aside(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The items that the quick lane leaves out."""
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        if getattr(item, "callspec", None) is not None:
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out = []
    for product in products.values():
        strength, by = _wanted(product[0])
        if strength is not None:
            rows = [by(**item.callspec.params) if by else _values(item) for item in product]
            chosen = set(covering(rows, strength))
            left_out += [item for index, item in enumerate(product) if index not in chosen]
    return left_out


def _wanted(item: pytest.Function) -> tuple:
    """The strength and the traits that the test's marker gives."""
    marker = item.get_closest_marker("covering")
    if marker is None:
        return STRENGTH, None
    return marker.args[0] if marker.args else STRENGTH, marker.kwargs.get("by")


def _values(item: pytest.Function) -> tuple[Hashable, ...]:
    """Which value the item has on each axis. Arguments that one `parametrize` gives together are one axis.

    A value is told by its identity, as many cannot be compared: all items share the objects of one list.
    """
    params = dict(item.callspec.params)
    axes = []
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
        axes.append(tuple(id(params.pop(name)) for name in names))
    return (*axes, *(id(param) for param in params.values()))  # the rest are those of fixtures
