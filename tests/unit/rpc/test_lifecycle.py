from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from splitserve.rpc.lifecycle import run_until_signal

SOON_S = 5.0


@pytest.fixture(autouse=True)
def _collected_again() -> Iterator[None]:
    """A service has its process to itself; tests share one."""
    yield
    gc.unfreeze()


class _Service:
    def __init__(self, drain_hangs: bool = False) -> None:
        self.calls: list[str] = []
        self.draining = asyncio.Event()
        self._drain_hangs = drain_hangs

    async def drain(self) -> None:
        self.calls.append("drain")
        self.draining.set()
        if self._drain_hangs:
            await asyncio.Event().wait()
        self.calls.append("drained")

    async def stop(self) -> None:
        self.calls.append("stop")


async def _running(
    service: _Service, failed: asyncio.Future[None] | None = None
) -> asyncio.Task[None]:
    task = asyncio.create_task(run_until_signal(service.drain, service.stop, failed=failed))
    await asyncio.sleep(0)  # lets the task run up to its first wait, with its handlers in place
    return task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_drains_then_stops(number: signal.Signals) -> None:
    service = _Service()
    task = await _running(service)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(task, SOON_S)
    assert service.calls == ["drain", "drained", "stop"]


async def test_what_was_made_before_is_kept_out_of_collections() -> None:
    service = _Service()
    assert not gc.get_freeze_count()
    task = await _running(service)
    assert gc.get_freeze_count()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, SOON_S)


async def test_second_signal_stops_at_once() -> None:
    service = _Service(drain_hangs=True)
    task = await _running(service)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(service.draining.wait(), SOON_S)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, SOON_S)
    assert service.calls == ["drain", "stop"]


async def test_failure_stops_without_draining_and_is_raised() -> None:
    service = _Service()
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    task = await _running(service, failed)
    failed.set_exception(RuntimeError("the engine died"))
    with pytest.raises(RuntimeError, match="the engine died"):
        await asyncio.wait_for(task, SOON_S)
    assert service.calls == ["stop"]


async def test_failing_drain_still_stops() -> None:
    service = _Service()

    async def drain() -> None:
        raise RuntimeError("cannot drain")

    task = asyncio.create_task(run_until_signal(drain, service.stop))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(RuntimeError, match="cannot drain"):
        await asyncio.wait_for(task, SOON_S)
    assert service.calls == ["stop"]


LAUNCHER = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
CHILD = """
import time
from splitserve.rpc.lifecycle import die_with_parent
die_with_parent()
print("armed", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_child_dies_with_its_launcher() -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    assert launcher.stdin is not None
    child = int(launcher.stdout.readline())
    watcher = os.pidfd_open(child)
    try:
        launcher.kill()
        launcher.wait(SOON_S)
        import select

        readable, _, _ = select.select([watcher], [], [], SOON_S)
        assert readable, "the child lives on"
    finally:
        os.close(watcher)
        launcher.stdin.close()
        launcher.stdout.close()
