"""The four services of one machine as one thing that starts, serves and stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import TracebackType

from splitserve.errors import DeadlineExceeded, Unavailable
from splitserve.launcher.config import ServicePlan, SuiteConfig, plan
from splitserve.launcher.process import ServiceProcess
from splitserve.launcher.signals import StopSignals
from splitserve.models.check import check_weights
from splitserve.weights.checkpoint import open_checkpoint

START_TIMEOUT_S = 180.0
POLL_S = 0.05
# Beyond the services' own grace, before they are killed.
STOP_MARGIN_S = 5.0
STOP_STAGE = {"router": 0, "prefill": 1, "decode": 1, "kvstore": 2}

OnReady = Callable[[ServicePlan], object]


class LocalSuite:
    """Processes of this machine that live at most as long as this object is entered.

    with StopSignals() as signals, LocalSuite(config, signals) as suite:
        suite.start()
        ... Client(suite.target) ...

    They end with the `with`, with this process, and with its main thread. Use it there.
    """

    def __init__(
        self, config: SuiteConfig, signals: StopSignals, log_dir: Path | None = None
    ) -> None:
        """`log_dir` gets one file a process; None sends their logs to stderr."""
        self._config = config
        self._signals = signals
        self._log_dir = log_dir
        self._processes: list[ServiceProcess] = []
        self.target = ""
        """HOST:PORT of the router."""

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order of starting."""
        return [process.pid for process in self._processes]

    def address_of(self, name: str) -> str:
        """HOST:PORT of one process, such as `prefill` or `decode-1`."""
        return next(p.plan.address for p in self._processes if p.plan.name == name)

    def start(
        self, timeout_s: float = START_TIMEOUT_S, on_ready: OnReady = lambda plan: None
    ) -> None:
        """Starts all at once and returns when each is ready; `on_ready` hears of each.

        Raises CheckpointError or ConfigError before anything is started, Unavailable with the last
        words of a process that ended, DeadlineExceeded naming those that were not ready within
        `timeout_s`.
        """
        if self._config.model and self._config.load_format == "auto":
            # A broken checkpoint is one line here and would be one of each process.
            check_weights(open_checkpoint(self._config.model), self._config.tensor_parallel_size)
        for each in plan(self._config):
            with self._signals.held():
                self._processes.append(ServiceProcess(each, self._log_file(each.name)))
            if each.tier == "router":
                self.target = each.address
        waiting = list(self._processes)
        deadline = time.monotonic() + timeout_s
        while waiting:
            self._check_alive()
            for process in [p for p in waiting if p.is_ready()]:
                waiting.remove(process)
                on_ready(process.plan)
            if time.monotonic() > deadline:
                names = ", ".join(process.plan.name for process in waiting)
                raise DeadlineExceeded(f"not ready within {timeout_s:.0f} s: {names}")
            time.sleep(POLL_S if waiting else 0)

    def wait(self) -> None:
        """Blocks while all run. Raises Unavailable as soon as one has ended."""
        while True:
            self._check_alive()
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Stops router, workers and store in this order; returns when all are gone.

        Each gets the grace that it was started with; a further stop signal kills what is left.
        """
        with self._signals.held():
            ordered = sorted(self._processes, key=_stop_stage)
            for _, stage in groupby(ordered, _stop_stage):
                self._stop_together(list(stage))
            self._processes.clear()

    def __enter__(self) -> LocalSuite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _stop_together(self, processes: list[ServiceProcess]) -> None:
        for process in processes:
            process.ask_to_stop()
        signals_before = self._signals.count
        deadline = time.monotonic() + self._config.drain_grace_s + STOP_MARGIN_S
        while any(p.exit_code is None for p in processes) and time.monotonic() < deadline:
            if self._signals.count > signals_before:
                break
            time.sleep(POLL_S)
        for process in processes:
            process.stop(timeout_s=0)

    def _check_alive(self) -> None:
        for process in self._processes:
            if process.exit_code is not None:
                raise Unavailable(
                    f"{process.plan.name} ended with exit code {process.exit_code}: "
                    f"{process.last_words()}"
                )

    def _log_file(self, name: str) -> Path | None:
        return self._log_dir / f"{name}.log" if self._log_dir else None


def _stop_stage(process: ServiceProcess) -> int:
    return STOP_STAGE[process.plan.tier]
