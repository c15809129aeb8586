"""The router never loads torch."""

from __future__ import annotations

import subprocess
import sys


def test_router_is_free_of_torch() -> None:
    code = "import sys, services.router.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
