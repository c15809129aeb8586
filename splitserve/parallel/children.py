"""The other ranks of a node, as child processes of its first."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from splitserve.parallel.ending import Ending
from splitserve.parallel.rendezvous import ParallelConfig

FOLLOWER_COMMAND = (sys.executable, "-m", "splitserve.parallel.follower")
_STDERR = 2
STOP_S = 5.0
KILL_S = 2.0


class LocalRanks:
    """Starts the ranks of `config.node_ranks` but this one, and watches them.

    They are new processes, not forks: this one has threads. Each is started by the thread that
    then watches it, so that it ends with this process (`die_with_parent` goes by the thread), and
    with the group's connection, whichever is noticed first. One that ends before `ending` expects
    it ends this process, too.
    """

    def __init__(
        self,
        config: ParallelConfig,
        meeting_folder: str,
        ending: Ending,
        command: Sequence[str] = FOLLOWER_COMMAND,
    ) -> None:
        self._ending = ending
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watches: dict[int, threading.Thread] = {}
        ending.before_exit(self.kill)
        for local_rank, rank in enumerate(config.node_ranks):
            if rank == config.rank:
                continue
            arguments = _arguments(config, rank, local_rank, meeting_folder)
            started: Future[None] = Future()
            watch = threading.Thread(
                target=self._run, args=(rank, [*command, *arguments], started), daemon=True
            )
            watch.start()
            self._watches[rank] = watch
            started.result()

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: process.pid for rank, process in self._processes.items()}

    def await_verdict(self, rank: int, timeout_s: float) -> None:
        """Give the watch of a rank that seems to be gone the time to say how it ended."""
        if rank in self._watches:
            self._watches[rank].join(timeout_s)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Wait for the ends of ranks that were told to stop, then kill what is left."""
        for watch in self._watches.values():
            watch.join(timeout_s)
        self.kill()
        for watch in self._watches.values():
            watch.join(KILL_S)

    def kill(self) -> None:
        """End them at once."""
        for process in self._processes.values():
            process.kill()

    def _run(self, rank: int, command: Sequence[str], started: Future[None]) -> None:
        try:
            process = self._processes[rank] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                # stdout is this process's to announce itself on.
                stdout=_STDERR,
                # Ctrl-C in a terminal is for this process, which stops the others in their time.
                process_group=0,
            )
        except OSError as error:
            started.set_exception(error)
            return
        started.set_result(None)
        status = process.wait()
        if not self._ending.is_expected:
            self._ending.fail(describe_end(rank, status))


def describe_end(rank: int, status: int) -> str:
    """One line about a rank that ended when it should not have."""
    if status < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-status).name
            hint = "; if memory ran out, lower --pool-bytes" if name == "SIGKILL" else ""
            return f"rank {rank} was ended by {name}, so this worker ends; start it again{hint}"
    return f"rank {rank} ended with exit code {status}, so this worker ends; start it again"


def _arguments(
    config: ParallelConfig, rank: int, local_rank: int, meeting_folder: str
) -> list[str]:
    values: dict[str, str | int] = {
        "--rank": rank,
        "--size": config.size,
        "--nnodes": config.nnodes,
        "--local-rank": local_rank,
        "--local-size": config.local_size,
    }
    if meeting_folder:
        values["--meeting-folder"] = meeting_folder
    else:
        values |= {"--master-addr": config.master_addr, "--master-port": config.master_port}
    return [str(part) for pair in values.items() for part in pair]
