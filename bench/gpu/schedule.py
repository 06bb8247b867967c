"""Who runs when: the time of a run shared out among parts, and results written after every case."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.gpu.cases import NOT_DONE, NOT_MEASURED, TIME_IS_UP, Case, Part, Record
from vtp.files import write_atomic

MOST_OVER = 20.0  # seconds


class Runs(Protocol):
    """What runs cases: `bench.gpu.worker.Worker`, or in tests a stand-in."""

    def run(self, name: str, seconds: float, note: Callable[[Mapping[str, Any]], None]) -> Record: ...

    def close(self) -> None: ...


class Schedule:
    """A run of some parts within `seconds`, whose results are in `results` and, at any time, in `file`.

    A part has its share of what time there is when it begins, so that what the parts before it left is shared
    out again. A case is begun while its part has time, and ended after its own limit; it may outlast its part
    by `MOST_OVER`, the run never. What had no time, or less than its limit and was not done, gets another
    chance when all parts are done, in the same order.

    Args:
        cases: of each part, by its name.
        start: makes what runs the cases of a part.
        clock: seconds, from any zero.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        cases: Mapping[str, Sequence[Case]],
        seconds: float,
        results: Record,
        file: Path,
        start: Callable[[Part], Runs],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.parts, self.cases, self.results, self.file = parts, cases, results, file
        self.start, self.clock = start, clock
        self.end = clock() + seconds
        for part in parts:
            pending = {case.name: {"status": NOT_MEASURED} for case in cases[part.name]}
            results["parts"][part.name] = {"seconds": 0.0, "cases": pending}

    def run(self, before: Callable[[Part], None] = lambda part: None) -> None:
        """Run the parts in order; `before` is called as each begins."""
        self.write()
        for number, part in enumerate(self.parts):
            share = part.share / sum(later.share for later in self.parts[number:])
            before(part)
            self._run_part(part, self.clock() + share * (self.end - self.clock()))
        for part in self.parts:
            if any(record["status"] == TIME_IS_UP for record in self._records(part).values()):
                self._run_part(part, self.end)

    def write(self) -> None:
        """The results so far, as JSON; a number that is not finite, which JSON has no word for, as null."""
        text = json.dumps(_finite(self.results), indent=1, allow_nan=False) + "\n"
        write_atomic(self.file, lambda path: path.write_text(text, encoding="utf-8"))

    def _records(self, part: Part) -> dict[str, Record]:
        return self.results["parts"][part.name]["cases"]

    def _run_part(self, part: Part, until: float) -> None:
        records, began, worker = self._records(part), self.clock(), self.start(part)
        try:
            for case in self.cases[part.name]:
                if records[case.name]["status"] not in (NOT_MEASURED, TIME_IS_UP):
                    continue
                if self.clock() >= min(until, self.end):
                    records[case.name]["status"] = TIME_IS_UP
                    continue
                self._run_case(worker, case, records, min(until + MOST_OVER, self.end))
                self.results["parts"][part.name]["seconds"] += round(self.clock() - began, 3)
                began = self.clock()
                self.write()
        finally:
            worker.close()
        self.write()

    def _run_case(self, worker: Runs, case: Case, records: dict[str, Record], until: float) -> None:
        began = self.clock()

        def note(content: Mapping[str, Any]) -> None:
            records[case.name].update(content)
            self.write()

        records[case.name]["status"] = f"{NOT_MEASURED}: under way when the run ended"
        self.write()
        limit = max(0.0, min(case.seconds, until - began))
        record = worker.run(case.name, limit, note)
        if record["status"].startswith(NOT_DONE) and limit < case.seconds:
            record = {**record, "status": TIME_IS_UP}
        records[case.name] |= {**record, "seconds": round(self.clock() - began, 3)}


def _finite(value: Any) -> Any:
    """The same content with None for NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
