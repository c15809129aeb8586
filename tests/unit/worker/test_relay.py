from __future__ import annotations

import asyncio
import threading

import pytest

from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.sampling import SamplingParams
from splitserve.worker.relay import OutputRelay, Step


def output_of(sequence_id: str) -> SequenceOutput:
    return SequenceOutput(Sequence(sequence_id, [1], SamplingParams(), 0), 0, ())


def post(relay: OutputRelay, step: int, *ids: str) -> None:
    """As the engine does: from another thread."""
    thread = threading.Thread(target=relay, args=(step, [output_of(i) for i in ids]))
    thread.start()
    thread.join()


async def test_a_step_is_delivered_in_one_turn_of_the_loop() -> None:
    relay = OutputRelay(asyncio.get_running_loop())
    seen: list[tuple[int, str]] = []
    for name in ("a", "b"):
        relay.subscribe(name, lambda step, output: seen.append((step.number, output.sequence.id)))
    post(relay, 3, "a", "unknown", "b")
    assert seen == []
    await asyncio.sleep(0)
    assert seen == [(3, "a"), (3, "b")]
    relay.unsubscribe("a")
    relay.unsubscribe("a")
    post(relay, 4, "a", "b")
    await asyncio.sleep(0)
    assert seen == [(3, "a"), (3, "b"), (4, "b")]


async def test_a_fault_of_one_subscriber_is_not_another_ones(caplog) -> None:
    relay = OutputRelay(asyncio.get_running_loop())
    seen: list[str] = []

    def fail(step: Step, output: SequenceOutput) -> None:
        raise ValueError("a bug")

    relay.subscribe("bad", fail)
    relay.subscribe("good", lambda step, output: seen.append(output.sequence.id))
    post(relay, 1, "bad", "good")
    await asyncio.sleep(0)
    assert seen == ["good"]
    assert "sequence bad" in caplog.text


async def test_one_subscriber_a_sequence() -> None:
    relay = OutputRelay(asyncio.get_running_loop())
    relay.subscribe("a", lambda step, output: None)
    with pytest.raises(ValueError, match="subscriber already"):
        relay.subscribe("a", lambda step, output: None)
