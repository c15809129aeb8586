"""A stream is opened again after every end, whoever brought it about."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from splitserve.kv import standing_stream
from splitserve.kv.standing_stream import StandingStream


class Call:
    """Sends what it is given, then stays open."""

    def __init__(self, messages: list[int]) -> None:
        self._messages = messages
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[int]:
        for message in self._messages:
            yield message
        await asyncio.Event().wait()

    def cancel(self) -> bool:
        self.cancelled = True
        return True


class Rig:
    """`faulty` messages cannot be received; the first `faulty_calls` cannot be made."""

    def __init__(self, faulty_calls: int = 0, faulty: int = -1, faulty_end: bool = False) -> None:
        self.faulty_calls, self.faulty, self.faulty_end = faulty_calls, faulty, faulty_end
        self.calls: list[Call] = []
        self.received: list[int] = []
        self.num_broken = 0
        self.changed = asyncio.Event()
        self.stream = StandingStream("test", self.call, self.receive, self.broken)

    def call(self) -> Call:
        if self.faulty_calls:
            self.faulty_calls -= 1
            raise RuntimeError("no channel")
        self.calls.append(Call([len(self.calls) + 1]))
        return self.calls[-1]

    def receive(self, message: int) -> None:
        if message == self.faulty:
            raise ValueError("a bad message")
        self.received.append(message)
        self.changed.set()

    def broken(self) -> None:
        self.num_broken += 1
        if self.faulty_end:
            raise KeyError("a bad end")

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await self.changed.wait()
                self.changed.clear()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing_stream, "_FIRST_RETRY_S", 0.0)


@pytest.mark.parametrize("faulty_end", [False, True])
async def test_a_message_that_cannot_be_received_is_logged_and_the_stream_opened_again(
    caplog: pytest.LogCaptureFixture, faulty_end: bool
) -> None:
    caplog.set_level(logging.ERROR)
    rig = Rig(faulty=1, faulty_end=faulty_end)
    rig.stream.start()
    await rig.until(lambda: rig.received == [2])
    assert rig.calls[0].cancelled
    assert rig.num_broken == 1
    assert "a bad message" in caplog.text
    assert ("a bad end" in caplog.text) is faulty_end
    await rig.stream.close()
    assert rig.num_broken == 2
    assert rig.calls[1].cancelled


async def test_a_call_that_cannot_be_made_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(faulty_calls=1)
    rig.stream.start()
    await rig.until(lambda: rig.received == [1])
    assert "no channel" in caplog.text
    await rig.stream.close()


async def test_what_never_began_is_not_broken() -> None:
    rig = Rig()
    await rig.stream.close()
    assert rig.num_broken == 0
