"""A signal is noted while a step is finished; a second one acts at once."""

import os
import signal
import subprocess
import threading
import time

import pytest

from tests.support.processes import forks
from vtp.training.signals import FROM_SCHEDULERS, Terminated, _init_worker, deferred_signals, raised_signals


@pytest.fixture
def seen():
    """What the handlers that were there before have got."""
    numbers = []
    every = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, lambda n, _: numbers.append(n)) for n in every}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(seen, number, monkeypatch):
    with deferred_signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert (signals.received, seen) == (number, [])
        if number != signal.SIGINT:  # a user's second Ctrl-C is another one, however fast
            os.kill(os.getpid(), number)  # as a scheduler's to all processes, which torchrun hands on
            assert (signals.received, seen) == (number, [])
            monkeypatch.setattr("vtp.training.signals.REPEATED", 0.0)
        os.kill(os.getpid(), number)
        assert seen == [number]
        os.kill(os.getpid(), number)
        assert seen == [number, number]
    os.kill(os.getpid(), number)
    assert seen == [number, number, number]


def test_outside_of_the_main_thread_signals_act_as_before(seen):
    received = []

    def signalled() -> None:
        with deferred_signals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            received.append(signals.received)

    thread = threading.Thread(target=signalled)
    thread.start()
    thread.join()
    assert (received, seen) == ([None], [signal.SIGTERM])


@pytest.mark.parametrize("number", FROM_SCHEDULERS)
def test_where_nothing_is_deferred_the_first_signal_is_raised_and_the_second_acts_as_before(seen, number):
    with raised_signals():
        with pytest.raises(Terminated) as terminated:
            os.kill(os.getpid(), number)
        assert (terminated.value.signum, seen) == (number, [])
        os.kill(os.getpid(), number)
        assert seen == [number]
    os.kill(os.getpid(), number)
    assert seen == [number, number]


def _hangs_as_data_worker(ready) -> None:
    _init_worker(None, 0)
    ready.set()
    time.sleep(600)


@pytest.mark.thorough
def test_a_data_worker_that_hangs_is_ended_by_the_process_that_it_works_for_and_by_no_other():
    ready = forks().Event()
    worker = forks().Process(target=_hangs_as_data_worker, args=(ready,))
    worker.start()
    try:
        assert ready.wait(60)
        subprocess.run(["kill", str(worker.pid)], check=True)
        worker.join(0.3)
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    finally:
        worker.kill()
