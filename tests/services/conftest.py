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
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.rpc.channel import open_channel
from splitserve.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)

START_TIMEOUT_S = 30.0
POLL_S = 0.02
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        prefills: Sequence[Service],
        decodes: Sequence[Service],
        *flags: str,
        port: int = 0,
        wait: bool = True,
    ) -> Service:
        workers = [
            *("--prefill", ",".join(p.address for p in prefills)),
            *("--decode", ",".join(d.address for d in decodes)),
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
        service = Service(tier, port, metrics_port, process)
        self.services.append(service)
        self._follow(process.stdout, service.stdout)
        self._follow(process.stderr, service.log)
        await service.wait_health(name="readiness" if wait else "liveness")
        return service

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
        address = store if isinstance(store, str) else store.address
        return ["--engine", "fake", "--kvstore", address, "--pool-bytes", str(256 * 512)]

    def _follow(self, stream: asyncio.StreamReader | None, lines: list[str]) -> None:
        async def read() -> None:
            assert stream is not None
            async for line in stream:
                lines.append(line.decode(errors="replace"))

        task = asyncio.create_task(read())
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[FAILED] = report.failed


FAILED = pytest.StashKey[bool]()


@pytest.fixture
async def suite(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Suite]:
    """An empty suite; what the test starts is stopped at its end."""
    running = Suite(tmp_path)
    try:
        yield running
    finally:
        await running.close()
        if request.node.stash.get(FAILED, True):
            running.show_logs()


@dataclass(eq=False)
class Choice:
    """What a decode worker has told of one choice. Checks that token indexes have no gap."""

    first_index: int | None = None
    tokens: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: int = 0
    error: decode_pb2.SequenceError | None = None

    @property
    def ended(self) -> bool:
        return bool(self.finish_reason) or self.error is not None

    def take(self, delta: decode_pb2.SequenceDelta) -> None:
        assert not self.ended, "news of a choice that has ended"
        if delta.tokens:
            if self.first_index is None:
                self.first_index = delta.first_token_index
            assert delta.first_token_index == self.first_index + len(self.tokens)
        self.tokens += [token.id for token in delta.tokens]
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        self.finish_reason = delta.finish_reason
        self.error = delta.error if delta.HasField("error") else None


class Attachment:
    """A router's stream to a decode worker, driven by hand."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = decode_pb2_grpc.DecodeServiceStub(channel).Attach()
        self.choices: dict[tuple[str, int], Choice] = {}
        self.status: grpc.StatusCode | None = None
        self.details = ""
        self.num_messages = 0
        self.reading = asyncio.Event()
        self.reading.set()
        self._changed = asyncio.Condition()
        self._reader = asyncio.create_task(self._read())

    async def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        *,
        lease: common_pb2.LeaseRef | None = None,
        max_tokens: int = 8,
        n: int = 1,
        seed: int | None = 7,
        temperature: float = 0.0,
        logprobs: int | None = None,
        **fields: object,
    ) -> None:
        sampling = common_pb2.SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            n=n,
            seed=seed,
            ignore_eos=True,
            logprobs=logprobs,
        )
        submit = decode_pb2.Submit(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=sampling,
            lease=lease,
            **fields,
        )
        await self.call.write(decode_pb2.AttachRequest(submit=submit))

    async def start(self, request_id: str, first_token_ids: Sequence[int]) -> None:
        start = decode_pb2.Start(request_id=request_id, first_token_ids=first_token_ids)
        await self.call.write(decode_pb2.AttachRequest(start=start))

    async def cancel(self, request_id: str, choice: int | None = None) -> None:
        cancel = decode_pb2.Cancel(request_id=request_id, choice=choice)
        await self.call.write(decode_pb2.AttachRequest(cancel=cancel))

    def choice(self, request_id: str, choice: int = 0) -> Choice:
        return self.choices.setdefault((request_id, choice), Choice())

    async def until(self, condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Wait until news make the condition true."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(condition)

    async def result(self, request_id: str, choice: int = 0) -> Choice:
        """A choice that has ended."""
        seen = self.choice(request_id, choice)
        await self.until(lambda: seen.ended or self.status is not None)
        assert seen.ended, f"the stream ended first: {self.status} {self.details}"
        return seen

    async def close(self) -> None:
        self.call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _read(self) -> None:
        try:
            while True:
                await self.reading.wait()
                message = await self.call.read()
                if message is grpc.aio.EOF:
                    break
                self.num_messages += 1
                for delta in message.deltas:
                    self.choice(delta.request_id, delta.choice).take(delta)
                await self._tell()
        except grpc.aio.AioRpcError:
            pass
        self.status, self.details = await self.call.code(), await self.call.details()
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@pytest.fixture
async def attach() -> AsyncIterator[Callable[[Service], Attachment]]:
    """Opens streams to decode workers; they are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        def open_attachment(service: Service) -> Attachment:
            channel = open_channel(service.address)
            stack.push_async_callback(channel.close)
            attachment = Attachment(channel)
            stack.push_async_callback(attachment.close)
            return attachment

        yield open_attachment


@pytest.fixture
def worker_state() -> Callable[[Service], Awaitable[worker_pb2.WorkerState]]:
    """One report of a worker."""

    async def read(service: Service) -> worker_pb2.WorkerState:
        async with service.channel() as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            call = stub.WatchState(worker_pb2.WatchStateRequest(interval_ms=20), timeout=10)
            try:
                async for report in call:
                    return report.state
            finally:
                call.cancel()
        raise AssertionError("no report")

    return read


@pytest.fixture
def pages_free(
    worker_state: Callable[[Service], Awaitable[worker_pb2.WorkerState]],
) -> Callable[[Service], Awaitable[None]]:
    """Waits until no live sequence holds a page."""

    async def wait(service: Service, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while True:
                state = await worker_state(service)
                if state.free_pages == state.total_pages and not state.running + state.waiting:
                    return
                await asyncio.sleep(POLL_S)

    return wait
