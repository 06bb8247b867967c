"""How a run shares out its time, with a clock that only cases advance."""

import json
import math

import pytest

from bench.gpu.cases import MEASURED, NOT_DONE, Case, Part
from bench.gpu.schedule import TIME_IS_UP, Schedule

PARTS = (Part("a", "no module", 0.5), Part("b", "no module", 0.3), Part("c", "no module", 0.2))
DONE = MEASURED
FAILED = "failed: RuntimeError: broken"
LATE = f"{NOT_DONE} in time"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class StandIn:
    """Runs cases by a script, {name: seconds or what it raises}, on a false clock."""

    def __init__(self, clock, script, began):
        self.clock, self.script, self.began = clock, script, began

    def run(self, name, seconds, note):
        self.began.append((name, round(self.clock.now - 1000, 6), seconds))
        note({"noted": name})
        needs = self.script[name]
        if needs == "breaks":
            return {"status": FAILED}
        self.clock.now += min(needs, seconds)
        return {"status": DONE if needs <= seconds else LATE}

    def close(self):
        self.began.append("closed")


@pytest.fixture
def rehearse(tmp_path):
    def run(script, seconds, limit=30.0):
        clock, began = Clock(), []
        cases = {
            part.name: [Case(name, None, limit) for name in script if name.startswith(part.name)]
            for part in PARTS
        }
        results = {"parts": {}}
        file = tmp_path / "results.json"
        schedule = Schedule(
            PARTS, cases, seconds, results, file, lambda part: StandIn(clock, script, began), clock
        )
        schedule.run()
        written = json.loads(file.read_text())
        assert written == results
        statuses = {
            name: c["status"] for part in results["parts"].values() for name, c in part["cases"].items()
        }
        return statuses, [entry for entry in began if entry != "closed"], clock.now - 1000

    return run


def test_every_part_has_its_share_and_what_is_left_is_handed_on(rehearse):
    # a has 50 of 100 seconds and takes 10; b has 3/5 of the 90 that are left, 54, and takes 40; c the rest.
    script = {"a1": 10, "b1": 20, "b2": 20, "c1": 30, "c2": 10}
    statuses, began, spent = rehearse(script, seconds=100)
    assert set(statuses.values()) == {DONE}
    assert [entry[:2] for entry in began] == [("a1", 0), ("b1", 10), ("b2", 30), ("c1", 50), ("c2", 80)]
    assert spent == 90


def test_what_does_not_fit_its_part_gives_way_and_comes_last_if_there_is_time(rehearse):
    script = {"a1": 30, "a2": 25, "a3": 10, "a4": 5, "b1": 5, "c1": 5}
    statuses, began, _ = rehearse(script, seconds=100)
    # a's 50 seconds are over after a2, which outlasts them; b and c leave time for the others.
    assert [name for name, *_ in began] == ["a1", "a2", "b1", "c1", "a3", "a4"]
    assert set(statuses.values()) == {DONE}


def test_when_the_time_is_up_the_rest_is_named_and_nothing_runs_past_the_end(rehearse):
    script = {"a1": 25, "a2": 24, "a3": 9, "b1": 20, "b2": 20, "b3": 20, "c1": 20, "c2": 20}
    statuses, began, spent = rehearse(script, seconds=100)
    assert spent == 100
    assert statuses == {
        "a1": DONE, "a2": DONE, "a3": DONE, "b1": DONE, "b2": DONE, "b3": TIME_IS_UP,
        "c1": TIME_IS_UP, "c2": TIME_IS_UP,
    }  # fmt: skip
    assert all(at + limit <= 100 for _, at, limit in began)


def test_what_outlasts_its_part_by_much_is_ended_and_gets_another_chance(rehearse):
    statuses, began, spent = rehearse({"a1": 40, "a2": 45, "b1": 5, "c1": 5}, seconds=120, limit=50)
    # a's 60 seconds and 20 more are over at 80; b and c leave 30, which are not enough either.
    assert [(name, at) for name, at, _ in began] == [
        ("a1", 0),
        ("a2", 40),
        ("b1", 80),
        ("c1", 85),
        ("a2", 90),
    ]
    assert [limit for name, _, limit in began if name == "a2"] == [40, 30]
    assert statuses == {"a1": DONE, "a2": TIME_IS_UP, "b1": DONE, "c1": DONE} and spent == 120


def test_a_case_that_takes_too_long_is_ended_by_its_own_limit(rehearse):
    statuses, began, spent = rehearse({"a1": 500, "a2": 1, "b1": 1, "c1": 1}, seconds=100, limit=20)
    assert statuses == {"a1": LATE, "a2": DONE, "b1": DONE, "c1": DONE} and spent == 23
    assert began[0] == ("a1", 0, 20)


def test_after_a_second_case_that_crashes_the_others_are_measured(rehearse):
    statuses, *_ = rehearse({"a1": 1, "a2": "breaks", "a3": 1, "b1": 1, "c1": 1}, seconds=100)
    assert statuses == {"a1": DONE, "a2": FAILED, "a3": DONE, "b1": DONE, "c1": DONE}


def test_results_are_on_disk_after_every_case_and_every_note(tmp_path):
    file, seen = tmp_path / "results.json", []

    class Reader(StandIn):
        def run(self, name, seconds, note):
            cases = json.loads(file.read_text())["parts"]["a"]["cases"]
            seen.append({case: record["status"] for case, record in cases.items()})
            record = super().run(name, seconds, note)
            assert json.loads(file.read_text())["parts"]["a"]["cases"][name]["noted"] == name
            return record

    clock, script, part = Clock(), {"a1": 1, "a2": 1}, PARTS[0]
    cases = {"a": [Case(name, None, 9.0) for name in script]}
    Schedule([part], cases, 50, {"parts": {}}, file, lambda _: Reader(clock, script, []), clock).run()
    under_way = "not measured: under way when the run ended"
    assert seen == [{"a1": under_way, "a2": "not measured"}, {"a1": MEASURED, "a2": under_way}]
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "a temporary file is left"


def test_a_number_that_is_not_finite_is_null_in_the_file(tmp_path):
    results = {"parts": {}, "errors": {"float16": math.nan, "others": [1.0, math.inf]}}
    schedule = Schedule([], {}, 1.0, results, tmp_path / "results.json", None)
    schedule.write()
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["errors"] == {"float16": None, "others": [1.0, None]}
