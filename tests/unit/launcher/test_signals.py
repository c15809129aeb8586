"""Stop signals come at good moments only."""

from __future__ import annotations

import os
import signal

import pytest

from splitserve.launcher import StopSignals


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_interrupts(number: signal.Signals):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            send(number)
        assert signals.count == 1
    assert signal.getsignal(number) == before


def test_a_held_signal_waits_for_the_end_of_the_outermost_block():
    reached = []

    def work(signals: StopSignals) -> None:
        with signals.held():
            with signals.held():
                send(signal.SIGTERM)
                reached.append("inside")
            reached.append("outside")
        reached.append("never")

    with StopSignals() as signals, pytest.raises(KeyboardInterrupt):
        work(signals)
    assert reached == ["inside", "outside"]


def test_only_the_first_signal_interrupts_the_others_are_counted():
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert signals.count == 3
