"""Sums between GPUs by our own kernel, through `CudaGroup`. This file is also a rank's program."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows of whole and of odd widths, fewer and more rows than programs, and the longest message.
SHAPES = ((1, 4096), (3, 7), (300, 129), (64, 2048), (17, 576), (1, 1), (16, 8192))
EPS = 1e-5
# Two roundings; fp32 sums go in another order.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
BURSTS, CALLS, REPLAYS = 20, 25, 300
SLEEP_CYCLES = (0, 0, 1000, 50_000, 2_000_000)
UNREACHABLE = 77
TIMEOUT_S = 240
WAIT_S = 3.0
"""In ns it takes 64 bits, as what is set in service does."""


@pytest.mark.timeout(TIMEOUT_S + 30)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_all_ranks_get_the_sum(size: int, tmp_path: Path) -> None:
    """Every type; launches one behind the other with random delays; graphs with new inputs."""
    for status, output in run_ranks("check", size, tmp_path):
        assert status == 0, output


@pytest.mark.timeout(TIMEOUT_S + 30)
def test_a_wait_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    (status, output), _ = run_ranks("wait_alone", 2, tmp_path)
    assert status == 0, output


def run_ranks(task: str, size: int, folder: Path) -> list[tuple[int, str]]:
    """Each rank's exit status and output, also of one that had to be killed; skips the test where
    there are too few GPUs.
    """
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    # Tests of kernels on the CPU set it for this process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, task, str(size), str(folder / "store")]
    logs = [folder / f"rank{rank}.log" for rank in range(size)]
    with contextlib.ExitStack() as files:
        ranks = [
            subprocess.Popen(
                [*command, str(rank)],
                env=environment,
                stdout=files.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
    until = time.monotonic() + TIMEOUT_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, until - time.monotonic()))
    for rank in ranks:
        rank.kill()
        rank.wait()
    if all(rank.returncode == UNREACHABLE for rank in ranks):
        pytest.skip("GPUs do not reach each other's memory")
    return [(rank.returncode, log.read_text()) for rank, log in zip(ranks, logs, strict=True)]


# What a rank does


def run_rank(task: str, size: int, store: str, rank: int) -> None:
    from splitserve.parallel.cuda_group import CudaGroup
    from splitserve.parallel.ending import Ending
    from splitserve.parallel.peer_sums import open_peer_sums

    device = torch.device("cuda", rank)
    group = CudaGroup(
        FileStore(store, size), rank, size, device, Ending(), one_node=True, small_sums="own"
    )
    if group.peers(torch.zeros(1, 8, device=device)) is None:
        other = torch.device("cuda", (rank + 1) % size)
        if not torch.cuda.can_device_access_peer(device, other):
            os._exit(UNREACHABLE)
        # The group goes on without what it cannot open; here that is a failure, and this says why.
        open_peer_sums(dist.group.WORLD, device, 60.0)
        raise AssertionError("the group has not opened what can be opened")
    # A stream of its own: all launches of the group must be in the order of one.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        TASKS[task](group)
    group.close()
    os._exit(0)  # what libraries do at an interpreter's end is not what is tested


def check(group: Any) -> None:
    for dtype in DTYPES:
        check_bursts(group, dtype)
        check_graph(group, dtype)


@dataclasses.dataclass
class Message:
    """All ranks' rows, the same on every rank, and what is to come of them."""

    parts: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, size: int, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Message:
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*of: int) -> Tensor:
            return torch.randn(of, generator=generator, device="cuda").to(dtype)

        width = shape[1]
        bias = draw(width) if seed % 2 else None
        return cls(draw(size, *shape), draw(*shape), 1 + draw(width), bias)

    def renew(self, seed: int) -> None:
        size, *shape = self.parts.shape
        new = Message.of(size, tuple(shape), self.parts.dtype, seed)
        for own, other in ((self.parts, new.parts), (self.residual, new.residual)):
            own.copy_(other)

    @property
    def how(self) -> dict[str, Any]:
        return {"kind": "rms" if self.bias is None else "layer", "wide_weight": False}

    def reduce(self, group: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The sum alone, the sum with the residual, the norm: by two launches."""
        from splitserve_kernels.all_reduce import all_reduce_add_norm

        own = self.parts[group.rank]
        peers = group.peers(own)
        weights = (self.weight, self.bias, EPS)
        return (
            group.all_reduce(own),
            *all_reduce_add_norm(own, self.residual, *weights, peers, **self.how),
        )

    def check(self, group: Any, results: tuple[Tensor, Tensor, Tensor]) -> None:
        from splitserve_kernels.all_reduce import (
            all_reduce_add_norm_reference,
            all_reduce_reference,
        )

        parts = list(self.parts)
        weights = (self.weight, self.bias, EPS)
        total, normed = all_reduce_add_norm_reference(parts, self.residual, *weights, **self.how)
        assert torch.equal(results[0], all_reduce_reference(parts)), "sum"
        assert torch.equal(results[1], total), "sum with the residual"
        if total.shape[1] > 7 or self.bias is None:  # norms of few numbers are differences
            rtol = TOLERANCE[total.dtype]
            torch.testing.assert_close(results[2], normed, rtol=rtol, atol=rtol)
        own = results[2].reshape(1, -1).view(torch.uint8)
        everyones = group.all_gather_columns(own).view(group.size, -1)
        assert (everyones == own).all(), "ranks differ"


def delays(rank: int) -> Iterator[None]:
    """Each rank's own: of its device, of its host, or none."""
    rng = random.Random(rank)
    while True:
        torch.cuda._sleep(rng.choice(SLEEP_CYCLES))
        if rng.random() < 0.1:
            time.sleep(rng.random() * 1e-3)
        yield


def check_bursts(group: Any, dtype: torch.dtype) -> None:
    """Launches of changing shapes that no rank waits for, so that they run into each other."""
    delay = delays(group.rank)
    for burst in range(BURSTS):
        messages = [
            Message.of(group.size, SHAPES[(burst + call) % len(SHAPES)], dtype, 1000 * burst + call)
            for call in range(CALLS)
        ]
        results = []
        for call, message in enumerate(messages):
            if call % 3 == 0:
                next(delay)
            results.append(message.reduce(group))
        for message, result in zip(messages, results, strict=True):
            message.check(group, result)


def check_graph(group: Any, dtype: torch.dtype) -> None:
    """An odd number of launches, so that every replay begins with the other half."""
    delay = delays(group.rank)
    messages = [Message.of(group.size, shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    for message in messages:
        message.reduce(group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    # NCCL's watchdog asks for events meanwhile.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        results = [message.reduce(group) for message in messages]
        group.all_reduce(messages[0].parts[group.rank])
    for replay in range(REPLAYS):
        for index, message in enumerate(messages):
            message.renew(10 * replay + index)
        for result in results:
            for tensor in result:
                tensor.fill_(torch.nan)
        next(delay)
        graph.replay()
        if replay % 10 == 0:  # and launches between replays
            extra = messages[replay // 10 % len(messages)]
            extra.check(group, extra.reduce(group))
        for message, result in zip(messages, results, strict=True):
            message.check(group, result)


def wait_alone(group: Any) -> None:
    """Rank 0 sums, and nobody else comes: a launch failure, and not before its time."""
    from splitserve_kernels.all_reduce import all_reduce

    x = torch.ones(1, 64, device="cuda")
    peers = dataclasses.replace(group.peers(x), timeout_s=WAIT_S)
    all_reduce(x, peers)  # compiles, and shows that all are there
    torch.cuda.synchronize()
    if group.rank == 0:
        began = time.monotonic()
        all_reduce(x, peers)
        with pytest.raises(RuntimeError):
            torch.cuda.synchronize()
        waited = time.monotonic() - began
        print(f"waited {waited:.2f} s", flush=True)
        os._exit(0 if WAIT_S - 0.1 < waited < 20 else 1)
    time.sleep(10)
    os._exit(0)


TASKS = {"check": check, "wait_alone": wait_alone}

if __name__ == "__main__":
    run_rank(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
