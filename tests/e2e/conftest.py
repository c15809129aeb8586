"""The real small model, served by four real processes, and alone in this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from splitserve.client import Client
from splitserve.launcher.config import SuiteConfig
from splitserve.launcher.signals import StopSignals
from splitserve.launcher.suite import LocalSuite

StartSuite = Callable[..., contextlib.AbstractContextManager[Client]]


@pytest.fixture
def start_suite(model_path: Path, tmp_path: Path) -> StartSuite:
    """Starts router, prefill, decode and kvstore; `worker` flags go to both worker tiers."""

    @contextlib.contextmanager
    def start(*worker: str, router: tuple[str, ...] = ()) -> Iterator[Client]:
        config = SuiteConfig(
            model=str(model_path),
            flags={"prefill": worker, "decode": worker, "router": router},
        )
        with StopSignals() as signals, LocalSuite(config, signals, tmp_path) as suite:
            suite.start()
            with Client(suite.target) as client:
                yield client

    return start
