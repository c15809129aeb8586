"""Fixtures that every kind of test may use."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from splitserve.engine.threads import yield_cores_when_waiting

from .suite import Suite

# Before any test imports torch: tests share their cores with the services they start.
yield_cores_when_waiting()

FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    report = outcome.get_result()
    if report.when == "call":
        item.stash[FAILED] = report.failed


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


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The small real model. Tests that use it are marked `model`."""
    root = Path(__file__).resolve().parent.parent
    path = Path(
        os.environ.get("SPLITSERVE_TEST_MODEL")
        or root / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    if not path.exists():
        pytest.skip(f"{path} is not there; run scripts/fetch_model.py")
    return path
