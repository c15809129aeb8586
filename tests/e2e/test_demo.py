"""`make demo` as a newcomer sees it, and what it leaves behind: nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 110
STOP_TIMEOUT_S = 30
TIERS = ("router", "prefill", "decode", "kvstore")

pytestmark = [pytest.mark.model, pytest.mark.slow]

StartDemo = Callable[[], subprocess.Popen[str]]


@pytest.fixture
def start_demo(model_path: Path, tmp_path: Path) -> Iterator[StartDemo]:
    """Starts the demo with `tmp_path` as its only place for temporary files."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        demo = subprocess.Popen(
            [sys.executable, "scripts/demo.py", "--model", str(model_path)],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(demo)
        return demo

    yield start
    for demo in started:
        demo.kill()
        demo.wait()
        for stream in (demo.stdout, demo.stderr):
            if stream:
                stream.close()


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_nothing_left(pids: list[int], temporary: Path) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while left := [pid for pid in pids if not is_gone(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
    assert list(temporary.iterdir()) == []


def read_until(stream: IO[str] | None, start: str) -> str:
    assert stream is not None
    for line in stream:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line starts with {start!r}")


def pids_in(line: str) -> list[int]:
    found = [int(each) for each in re.findall(r"\d+", line)]
    assert len(found) == 4
    return found


def test_the_answer_its_speed_and_its_trace_are_shown(start_demo: StartDemo, tmp_path: Path):
    shared_memory = set(Path("/dev/shm").iterdir())
    demo = start_demo()
    out, errors = demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 0, errors
    assert "Traceback" not in errors
    assert "because of a process called Rayleigh scattering" in out
    measured = re.search(r"TTFT (\d+) ms, ([\d.]+) tokens/s, (\d+) tokens", out)
    assert measured is not None
    assert int(measured[1]) > 0
    assert float(measured[2]) > 1
    assert int(measured[3]) > 20
    tree = out[out.index("\ntrace ") :]
    for tier in TIERS:
        assert re.search(rf"─ {tier}: ", tree), f"no span of {tier} in {tree}"
    assert "first_token +" in tree
    [pids_line] = [line for line in out.splitlines() if line.startswith("they are ready")]
    assert_nothing_left(pids_in(pids_line), tmp_path)
    assert set(Path("/dev/shm").iterdir()) <= shared_memory


def test_ctrl_c_in_the_answer_leaves_nothing(start_demo: StartDemo, tmp_path: Path):
    demo = start_demo()
    pids = pids_in(read_until(demo.stdout, "they are ready"))
    read_until(demo.stdout, "> Explain")
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=STOP_TIMEOUT_S)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert_nothing_left(pids, tmp_path)


def test_ctrl_c_while_starting_leaves_nothing(start_demo: StartDemo, tmp_path: Path):
    demo = start_demo()
    deadline = time.monotonic() + TIMEOUT_S
    while len(children := psutil.Process(demo.pid).children()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    demo.send_signal(signal.SIGINT)
    _, errors = demo.communicate(timeout=STOP_TIMEOUT_S)
    assert demo.returncode == 130
    assert "Traceback" not in errors
    assert_nothing_left([child.pid for child in children], tmp_path)
