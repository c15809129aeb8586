"""However a rank ends, all ranks end, at once and with one line."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

TOY = Path(__file__).with_name("toy_rank.py")
START_S = 40.0
END_S = 2.0


class Group(NamedTuple):
    leader: subprocess.Popen[str]
    followers: list[int]
    pidfds: list[int]


@contextmanager
def running(size: int, folder: Path) -> Iterator[Group]:
    """A group that computes steps without a pause."""
    command = subprocess.Popen(
        [sys.executable, str(TOY), "lead", str(size)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
    )
    with command as leader, ExitStack() as stack:
        stack.callback(leader.kill)
        assert leader.stdout
        readable, _, _ = select.select([leader.stdout], [], [], START_S)
        assert readable, "the ranks did not start"
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        yield Group(leader, pids, pidfds)


def all_end_within(pidfds: list[int], deadline: float) -> bool:
    poll = select.poll()
    for pidfd in pidfds:
        poll.register(pidfd, select.POLLIN)
    ended = 0
    while ended < len(pidfds) and time.monotonic() < deadline:
        for pidfd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            poll.unregister(pidfd)
            ended += 1
    return ended == len(pidfds)


@pytest.mark.timeout(90)
def test_a_rank_killed_in_mid_step_ends_all_with_one_line(tmp_path: Path) -> None:
    with running(3, tmp_path) as group:
        began = time.monotonic()
        os.kill(group.followers[0], signal.SIGKILL)
        assert group.leader.wait(END_S) == 1
        assert all_end_within(group.pidfds, began + END_S)
        assert group.leader.stderr
        lines = group.leader.stderr.read().splitlines()
    assert len(lines) == 1, lines
    assert "rank 1 was ended by SIGKILL, so this worker ends; start it again" in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(90)
def test_rank_0_killed_ends_its_followers(tmp_path: Path) -> None:
    with running(2, tmp_path) as group:
        began = time.monotonic()
        group.leader.kill()
        assert all_end_within(group.pidfds, began + END_S)
        assert group.leader.stderr
        assert group.leader.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []
