"""Services as processes on loopback, with the fake engine, for tests over real gRPC.

    async def test_something(suite):
        store = await suite.kvstore()
        prefill = await suite.prefill(store)
        decode = await suite.decode(store, "--max-batch", "4")
        router = await suite.router([prefill], [decode])
        async with router.channel() as channel: ...
        await suite.kill(store)                    # SIGKILL; `suite.stop` is SIGTERM
        store = await suite.kvstore(port=store.port)

Whatever still runs at the end is killed by its pid, and its log is shown if the test failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.v1 import worker_pb2, worker_pb2_grpc

START_TIMEOUT_S = 30.0
POLL_S = 0.02
ROOT = Path(__file__).resolve().parents[1]


_GIVEN: set[int] = set()


def free_port() -> int:
    """A port that was free a moment ago, and that nobody was given before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


async def eventually(condition: Callable[[], Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Ask another process until it says so."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


@dataclass(eq=False)
class Service:
    """One running process of the suite."""

    tier: str
    port: int
    metrics_port: int
    process: asyncio.subprocess.Process
    flags: tuple[str, ...] = ()
    log: list[str] = field(default_factory=list)
    stdout: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            yield channel

    async def health(self, name: str = "readiness") -> bool:
        """Whether the standard health service answers SERVING."""
        async with self.channel() as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=1)
            except grpc.aio.AioRpcError:
                return False
            return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def wait_health(self, serving: bool = True, name: str = "readiness") -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while await self.health(name) is not serving:
                if serving and self.process.returncode is not None:
                    raise AssertionError(f"{self.tier} exited: {self.text()}")
                await asyncio.sleep(POLL_S)

    async def metrics(self) -> dict[str, float]:
        """Samples of /metrics by name, those with several label sets added up."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"

        def fetch() -> str:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.read().decode()

        samples: dict[str, float] = {}
        for line in (await asyncio.to_thread(fetch)).splitlines():
            match = re.match(r"^(\w+)(?:\{[^}]*\})? ([-+.\deE]+|NaN)$", line)
            if match:
                samples[match[1]] = samples.get(match[1], 0.0) + float(match[2])
        return samples

    async def until_metric(self, name: str, condition: Callable[[float], bool]) -> None:
        """Wait until a metric has been brought up to date."""

        async def holds() -> bool:
            return condition((await self.metrics()).get(name, 0.0))

        await eventually(holds)

    async def worker_state(self) -> worker_pb2.WorkerState:
        """One report of a worker."""
        async with self.channel() as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = stub.WatchState(worker_pb2.WatchStateRequest(interval_ms=20), timeout=10)
            try:
                async for report in call:
                    return report.state
            finally:
                call.cancel()
        raise AssertionError("no report")

    async def pages_free(self, timeout_s: float = 10.0) -> None:
        """Wait until no live sequence of a worker holds a page."""

        async def free() -> bool:
            state = await self.worker_state()
            idle = not state.running + state.waiting
            return idle and state.free_pages == state.total_pages

        await eventually(free, timeout_s)

    def text(self) -> str:
        return "".join(self.log)


class Suite:
    """Starts services and stops what it started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.services: list[Service] = []
        self._readers: set[asyncio.Task[None]] = set()

    free_port = staticmethod(free_port)
    eventually = staticmethod(eventually)

    async def kvstore(self, *flags: str, port: int = 0, arena_bytes: int = 1 << 24) -> Service:
        return await self.start("kvstore", "--arena-bytes", str(arena_bytes), *flags, port=port)

    async def prefill(self, store: Service | str, *flags: str, port: int = 0) -> Service:
        return await self.start("prefill", *self._worker_flags(store), *flags, port=port)

    async def decode(self, store: Service | str, *flags: str, port: int = 0) -> Service:
        return await self.start("decode", *self._worker_flags(store), *flags, port=port)

    async def router(
        self,
        prefills: Sequence[Service | str],
        decodes: Sequence[Service | str],
        *flags: str,
        port: int = 0,
        wait: bool = True,
    ) -> Service:
        workers = [
            *("--prefill", ",".join(map(_address, prefills))),
            *("--decode", ",".join(map(_address, decodes))),
        ]
        return await self.start("router", *workers, *flags, port=port, wait=wait)

    async def start(self, tier: str, *flags: str, port: int = 0, wait: bool = True) -> Service:
        """`python -m services.<tier>`; returns once it is ready, or live at least."""
        port = port or free_port()
        metrics_port = free_port()
        command = [
            *(sys.executable, "-m", f"services.{tier}"),
            *("--port", str(port), "--metrics-port", str(metrics_port)),
            *("--drain-grace-s", "5", "--log-format", "text"),
            *flags,
        ]
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        service = Service(tier, port, metrics_port, process, flags)
        self.services.append(service)
        self._follow(process.stdout, service.stdout)
        self._follow(process.stderr, service.log)
        await service.wait_health(name="readiness" if wait else "liveness")
        return service

    async def restart(self, service: Service, *, wait: bool = True) -> Service:
        """Another process in place of one that has ended, on its port and with its flags."""
        return await self.start(service.tier, *service.flags, port=service.port, wait=wait)

    async def stop(self, service: Service, timeout_s: float = 15.0) -> int:
        """SIGTERM, and the exit code."""
        return await self._signal(service, signal.SIGTERM, timeout_s)

    async def kill(self, service: Service) -> int:
        """SIGKILL, as a crash would."""
        return await self._signal(service, signal.SIGKILL, 5.0)

    async def close(self) -> None:
        for service in self.services:
            if service.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    service.process.send_signal(signal.SIGCONT)
                    service.process.kill()
            await service.process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def show_logs(self) -> None:
        for service in self.services:
            print(f"--- {service.tier} {service.address} exit {service.process.returncode}")
            print(service.text())

    async def _signal(self, service: Service, number: signal.Signals, timeout_s: float) -> int:
        if service.process.returncode is None:
            service.process.send_signal(number)
        return await asyncio.wait_for(service.process.wait(), timeout_s)

    def _worker_flags(self, store: Service | str) -> list[str]:
        pool = ("--pool-bytes", str(256 * 512))
        return ["--engine", "fake", "--kvstore", _address(store), *pool]

    def _follow(self, stream: asyncio.StreamReader | None, lines: list[str]) -> None:
        async def read() -> None:
            assert stream is not None
            async for line in stream:
                lines.append(line.decode(errors="replace"))

        task = asyncio.create_task(read())
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)


def _address(service: Service | str) -> str:
    return service if isinstance(service, str) else service.address
