"""Times of calls that take turns: in which order, for how many rounds, and how they are compared."""

import pytest

from vtp.timing import pairwise_ratio, standard_error, take_turns, turns


def test_ratios_are_of_times_of_the_same_round():
    """A machine whose speed drifts slows both down alike; in order of size the ratios would all be 1."""
    own, reference = [1.0, 2.0, 3.0, 4.0, 8.0], [8.0, 4.0, 3.0, 1.0, 2.0]
    assert pairwise_ratio(own, reference) == pytest.approx({"median": 1.0, "q1": 0.5, "q3": 4.0})
    assert standard_error([1.0, 1.0], [1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="shorter"):
        pairwise_ratio([1.0, 2.0], [1.0])


class Noted:
    def __init__(self, name: str, taken: list[str]) -> None:
        self.name, self.taken = name, taken

    def step(self) -> None:
        self.taken.append(self.name)


def test_each_round_has_one_turn_of_all_in_an_order_that_changes_and_can_be_repeated():
    taken: list[str] = []
    assert take_turns({name: Noted(name, taken) for name in "abc"}, 8, 1e9) == 8
    rounds = ["".join(taken[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds) and len(set(rounds)) > 1
    assert rounds == ["".join(turns(list("abc"), number)) for number in range(8)]


def test_rounds_end_where_the_time_is_up_but_not_before_the_least_number():
    assert take_turns({"a": Noted("a", [])}, 100, 0.0, least_rounds=3) == 3
    assert take_turns({"a": Noted("a", [])}, 100, 1e9, lambda done: True) < 100
