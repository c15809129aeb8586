"""What a suite still holds: pages, leases, blocks, requests, shared memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import grpc

from splitserve.v1 import kvstore_pb2, kvstore_pb2_grpc

from .suite import Service, eventually

ARENA = re.compile(r" (\d+) +/memfd:splitserve-kv")


async def held(services: Iterable[Service]) -> dict[str, int]:
    """What is held, by tier and kind; empty once nothing is."""
    found: dict[str, int] = {}
    for service in services:
        counts = await COUNTERS[service.tier](service)
        found |= {f"{service.tier} {kind}": count for kind, count in counts.items() if count}
    return found


async def nothing_held(*services: Service, within_s: float) -> None:
    """Wait until nothing is held anywhere. Fails with what still is."""
    last: dict[str, int] = {}

    async def free() -> bool:
        nonlocal last
        last = await held(services)
        return not last

    try:
        await eventually(free, within_s)
    except TimeoutError:
        raise AssertionError(f"still held after {within_s:g} s: {last}") from None


def shared_files() -> set[str]:
    """Names of POSIX shared memory on this machine."""
    return set(os.listdir("/dev/shm"))


def arenas_of(service: Service) -> set[str]:
    """Inodes of the stores' arenas that a process maps."""
    return set(ARENA.findall(Path(f"/proc/{service.pid}/maps").read_text()))


async def _of_worker(service: Service) -> dict[str, int]:
    state = await service.worker_state()
    return {
        "pages": state.total_pages - state.free_pages,
        "running": state.running,
        "waiting": state.waiting,
    }


async def _of_store(service: Service) -> dict[str, int]:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = kvstore_pb2_grpc.KvStoreServiceStub(channel)
        stats = await stub.GetStats(kvstore_pb2.GetStatsRequest(), timeout=5)
    return {
        "leases": stats.live_leases,
        "reserved blocks": stats.reserved_blocks,
        "held blocks": stats.held_blocks,
    }


async def _of_router(service: Service) -> dict[str, int]:
    metrics = await service.metrics()
    return {
        "running": int(metrics["splitserve_num_requests_running"]),
        "waiting": int(metrics["splitserve_num_requests_waiting"]),
    }


COUNTERS = {
    "prefill": _of_worker,
    "decode": _of_worker,
    "kvstore": _of_store,
    "router": _of_router,
}
