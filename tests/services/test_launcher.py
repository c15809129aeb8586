"""Processes that start together, are watched, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from splitserve.client import Client
from splitserve.engine.fake import expected_tokens
from splitserve.errors import Unavailable
from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig
from splitserve.sampling import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0


def wait_until_gone(pids: list[int], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_suite_starts_serves_and_stops(tmp_path: Path):
    ready = []
    config = SuiteConfig(engine="fake", num_prefill=2, drain_grace_s=1.0)
    with StopSignals() as signals, LocalSuite(config, signals, tmp_path) as suite:
        suite.start(START_S, on_ready=lambda plan: ready.append(plan.name))
        pids = suite.pids
        assert len(set(pids)) == 5
        with Client(suite.target) as client:
            output = client.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 3
    names = ["decode", "kvstore", "prefill", "prefill-1", "router"]
    assert sorted(ready) == names
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert not any(_runs(pid) for pid in pids)
    host, port = suite.target.rsplit(":", 1)
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def test_a_suite_without_a_prefill_tier_serves(tmp_path: Path):
    config = SuiteConfig(engine="fake", num_prefill=0, num_decode=2, drain_grace_s=1.0)
    prompt = list(range(1, 100))
    with StopSignals() as signals, LocalSuite(config, signals, tmp_path) as suite:
        suite.start(START_S)
        assert len(suite.pids) == 4
        with Client(suite.target) as client:
            params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
            output = client.generate(prompt, params)
    assert output.outputs[0].token_ids == expected_tokens(prompt, 5)


def test_a_process_that_cannot_start_is_told_in_its_own_words(tmp_path: Path):
    flags = {"decode": ("--max-batch", "0")}
    config = SuiteConfig(engine="fake", flags=flags, drain_grace_s=1.0)
    with StopSignals() as signals, LocalSuite(config, signals, tmp_path) as suite:
        with pytest.raises(Unavailable, match=r"decode ended with exit code 2: .*--max-batch"):
            suite.start(START_S)
        pids = suite.pids
    assert not any(_runs(pid) for pid in pids)


def test_a_process_that_is_killed_is_noticed(tmp_path: Path):
    config = SuiteConfig(engine="fake", drain_grace_s=1.0)
    with StopSignals() as signals, LocalSuite(config, signals, tmp_path) as suite:
        suite.start(START_S)
        pids = suite.pids
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(Unavailable, match="kvstore ended with exit code -9"):
            suite.wait()
    assert not any(_runs(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_serve_takes_its_services_with_it(number: signal.Signals):
    command = [
        *(sys.executable, "-m", "splitserve.cli", "serve", "--engine", "fake"),
        *("--port", "0", "--prefill-port", "0", "--decode-port", "0", "--kvstore-port", "0"),
        *("--free-metrics-ports", "--drain-grace-s", "1"),
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as serve:
        try:
            assert serve.stdout is not None
            assert serve.stdout.readline().startswith("serving fake on 127.0.0.1:")
            children = [child.pid for child in psutil.Process(serve.pid).children()]
            assert len(children) == 4
            serve.send_signal(number)
            code = serve.wait(timeout=30)
            said = serve.stderr.read() if serve.stderr else ""
        finally:
            serve.kill()
    assert code == (-9 if number == signal.SIGKILL else 130)
    assert "Traceback" not in said
    wait_until_gone(children)
