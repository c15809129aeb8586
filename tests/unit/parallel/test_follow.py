"""Two nodes of one process: rank 0 in a thread, rank 1 in the main thread, over TCP."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from splitserve.engine.protocol import Draw, Slice
from splitserve.errors import CheckpointError, ConfigError
from splitserve.parallel.follow import follow
from splitserve.parallel.leader import Leader
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig
from splitserve.sampling import SamplingParams

pytestmark = pytest.mark.slow

JOIN_S = 20.0
DRAW = Draw(SamplingParams(), 0, 0, (), ())


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as server:
        port: int = server.getsockname()[1]
        return port


def node(rank: int, port: int, size: int = 2) -> ParallelConfig:
    return ParallelConfig(size, rank, size, 0, 1, LOOPBACK, port)


class Rank0:
    """Runs `act(leader)` in a thread and keeps what it returned or raised."""

    def __init__(self, recorded: Any, port: int, act: Callable[[Leader], object]) -> None:
        self.result: object = None
        self._recorded = recorded
        self._port = port
        self._act = act
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> object:
        self._thread.join(JOIN_S)
        assert not self._thread.is_alive()
        return self.result

    def _run(self) -> None:
        leader = Leader(node(0, self._port), self._recorded.ending, start_timeout_s=JOIN_S)
        try:
            self.result = self._act(leader)
        except BaseException as error:
            self.result = error
        finally:
            leader.close()


@pytest.fixture(autouse=True)
def _own_sigterm() -> Any:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_two_nodes_compute_and_stop(toy: Any, make_recorded: Any) -> None:
    leads, follows, port = make_recorded(), make_recorded(), free_port()

    def act(leader: Leader) -> object:
        engine = toy.open_group(leader, 2, leads.ending, {})
        [[drawn]] = engine.step([Slice([1], 0, [0], [DRAW])])
        engine.close()
        return drawn.token_id

    rank0 = Rank0(leads, port, act)
    follow(node(1, port), toy.open_rank, follows.ending, is_child=False, start_timeout_s=JOIN_S)
    assert rank0.join() == 10
    assert leads.lines + follows.lines == []


def test_what_a_rank_cannot_open_is_raised_on_rank_0(toy: Any, make_recorded: Any) -> None:
    leads, follows, port = make_recorded(), make_recorded(), free_port()

    def act(leader: Leader) -> None:
        leader.assemble({"refuses": True})
        leader.await_ready()

    rank0 = Rank0(leads, port, act)
    with pytest.raises(CheckpointError, match="layer 0 is not there"):
        follow(node(1, port), toy.open_rank, follows.ending, is_child=False, start_timeout_s=JOIN_S)
    error = rank0.join()
    assert isinstance(error, CheckpointError)
    assert error.message == "layer 0 is not there"
    assert leads.lines + follows.lines == []


def test_a_rank_that_fails_says_why_on_rank_0(toy: Any, make_recorded: Any) -> None:
    leads, follows, port = make_recorded(), make_recorded(), free_port()

    def act(leader: Leader) -> bool:
        leader.assemble({"fails_in_step": True})
        group = toy.GlooGroup(leader.store, 0, 2, leads.ending, host=LOOPBACK)
        leader.await_ready()
        leader.send_step([Slice([1], 0, [0], [])], toy.BLOCK_TOKENS)
        ended: bool = leads.ended.wait(JOIN_S)
        group.close()
        return ended

    rank0 = Rank0(leads, port, act)
    with pytest.raises(SystemExit):
        follow(node(1, port), toy.open_rank, follows.ending, is_child=False, start_timeout_s=JOIN_S)
    assert rank0.join() is True
    assert leads.lines == ["rank 1 failed, so this worker ends: ArithmeticError: no more numbers"]
    assert follows.lines == []


def test_a_rank_that_is_told_to_stop_passes_it_on(
    toy: Any, make_recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leads, follows, port = make_recorded(), make_recorded(), free_port()
    passed_on = threading.Event()

    def act(leader: Leader) -> bool:
        leader.assemble({})
        group = toy.GlooGroup(leader.store, 0, 2, leads.ending, host=LOOPBACK)
        leader.await_ready()
        os.kill(os.getpid(), signal.SIGTERM)  # rank 1's handler is this process's
        heard = passed_on.wait(JOIN_S)
        leader.close()
        group.close()
        return heard

    real_kill = os.kill

    def kill(pid: int, number: int) -> None:
        if threading.current_thread().name == "watch-rank-1":
            passed_on.set()
        else:
            real_kill(pid, number)

    monkeypatch.setattr(os, "kill", kill)
    rank0 = Rank0(leads, port, act)
    follow(node(1, port), toy.open_rank, follows.ending, is_child=False, start_timeout_s=JOIN_S)
    assert rank0.join() is True
    assert leads.lines + follows.lines == []


def test_sizes_that_differ_are_refused(toy: Any, make_recorded: Any) -> None:
    leads, follows, port = make_recorded(), make_recorded(), free_port()

    def act(leader: Leader) -> None:
        leader.assemble({})

    rank0 = Rank0(leads, port, act)
    for size, rank, line in (
        (3, 1, "tensor_parallel_size is 3 on rank 1 and 2 on rank 0"),
        (3, 2, "tensor_parallel_size is 3 on rank 2 and 2 on rank 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            follow(
                node(rank, port, size),
                toy.open_rank,
                follows.ending,
                is_child=False,
                start_timeout_s=JOIN_S,
            )
        assert caught.value.message == line
    follow_error: list[BaseException] = []
    try:
        follow(
            node(1, port),
            lambda membership: (_ for _ in ()).throw(ConfigError("enough")),
            follows.ending,
            is_child=False,
            start_timeout_s=JOIN_S,
        )
    except ConfigError as error:
        follow_error.append(error)
    assert [str(error) for error in follow_error] == ["enough"]
    assert rank0.join() is None


def test_a_rank_that_does_not_come_is_named(make_recorded: Any) -> None:
    leader = Leader(node(0, free_port()), make_recorded().ending, start_timeout_s=0.2)
    with pytest.raises(ConfigError) as caught:
        leader.assemble({})
    leader.close()
    assert caught.value.message == (
        "rank 1 of tensor_parallel_size 2 did not join within 0 s; see its own log"
    )


def test_rank_0_that_is_not_there_is_named(toy: Any, make_recorded: Any) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match=f"rank 1 does not reach rank 0 at 127.0.0.1:{port}"):
        follow(
            node(1, port),
            toy.open_rank,
            make_recorded().ending,
            is_child=False,
            start_timeout_s=0.3,
        )
