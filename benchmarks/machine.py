"""What a result must say of where it was measured."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path

PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "numpy")


def describe_machine() -> dict[str, object]:
    """Processor, threads, versions, commit and time."""
    return {
        "cpu": _cpu_name(),
        "cores": _cores(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip()
