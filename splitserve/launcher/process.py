"""One service as a child process: started, asked for its health, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.launcher.config import ServicePlan
from splitserve.rpc.health import READINESS
from splitserve.rpc.options import channel_options

HEALTH_TIMEOUT_S = 1.0
LOG_TAIL_BYTES = 4096
KILL_WAIT_S = 5.0


class ServiceProcess:
    """A running service. Its output goes to `log_file`, or to this process's stderr."""

    def __init__(self, plan: ServicePlan, log_file: Path | None) -> None:
        """Starts it. Call from the main thread: the child ends when that thread does."""
        self.plan = plan
        self._log_file = log_file
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(log_file.open("ab")) if log_file else None
            self._process = subprocess.Popen(
                plan.command,
                stdin=subprocess.DEVNULL,
                stdout=log or subprocess.DEVNULL,
                stderr=log,
                # Out of the terminal's group: Ctrl-C reaches the launcher, which stops them all
                # in their order.
                process_group=0,
            )
        self._channel = grpc.insecure_channel(plan.address, options=channel_options())
        self._health = health_pb2_grpc.HealthStub(self._channel)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll()

    def is_ready(self) -> bool:
        """Whether its health service says so."""
        request = health_pb2.HealthCheckRequest(service=READINESS)
        try:
            reply = self._health.Check(request, timeout=HEALTH_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def last_words(self) -> str:
        """The last line of its log, or where to look for it."""
        if self._log_file is None:
            return "see its message above"
        with self._log_file.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"

    def ask_to_stop(self) -> None:
        """SIGTERM. Does nothing once it has ended."""
        self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float) -> None:
        """Waits for its end, and kills it after `timeout_s`. Returns when it is gone."""
        self._channel.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(KILL_WAIT_S)
