"""A signal is noted while a step is finished; a second one acts at once."""

import os
import signal
import threading

import pytest

from vtp.training.signals import deferred_signals


@pytest.fixture
def seen():
    """What the handlers that were there before have got."""
    numbers = []
    before = {n: signal.signal(n, lambda n, _: numbers.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts_as_before(seen, number):
    with deferred_signals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert (signals.received, seen) == (number, [])
        os.kill(os.getpid(), number)
        assert seen == [number]
    os.kill(os.getpid(), number)
    assert seen == [number, number]


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
