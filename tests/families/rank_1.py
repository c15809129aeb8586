"""Rank 1 of a group, for one model after another: a program that importing torch costs once.

Each line on stdin is a port of loopback, where rank 0 will be listening in a moment.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

import torch

from splitserve.parallel.ending import Ending
from splitserve.parallel.follow import follow
from splitserve.parallel.opening import open_rank
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig


def await_listener(port: int) -> None:
    """Sooner than `follow`, which polls for pods that may take minutes."""
    while True:
        with (
            contextlib.suppress(ConnectionRefusedError),
            socket.create_connection((LOOPBACK, port)),
        ):
            return
        time.sleep(0.005)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        await_listener(int(line))
        rank = ParallelConfig(2, 1, 1, 1, 2, LOOPBACK, int(line))
        with contextlib.suppress(SystemExit):  # what it cannot open, rank 0 raises
            follow(rank, open_rank, Ending(), is_child=True)
