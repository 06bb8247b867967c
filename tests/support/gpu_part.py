"""Cases for the tests of a run on a GPU: what a real part might do to the process that it runs in."""

import os
import signal
import time

from bench.gpu.cases import Case, Context, Record


def good(context: Context) -> Record:
    """A record as an op's case has it; without figures, as nothing was timed."""
    return {"timed": {"ours": {"status": "not measured"}}, "pid": os.getpid()}


def raises(context: Context) -> Record:
    raise RuntimeError("no such kernel\nand a long explanation")


def exits(context: Context) -> Record:
    context.note({"before": "noted"})
    os._exit(3)


def is_killed(context: Context) -> Record:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("still alive")


def hangs(context: Context) -> Record:
    context.note({"pid": os.getpid()})
    time.sleep(600)
    return {}


def cases(toy: bool) -> list[Case]:
    found = {
        "first": good, "raises": raises, "second": good, "exits": exits, "third": good,
        "is killed": is_killed, "hangs": hangs, "last": good,
    }  # fmt: skip
    return [Case(name, run, seconds=1.0 if name == "hangs" else 30.0) for name, run in found.items()]
