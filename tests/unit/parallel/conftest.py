"""The toy rank as a module, and an ending that ends nothing."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path
from types import ModuleType

import pytest

from splitserve.parallel.ending import Ending


class Recorded:
    """An `Ending` whose line and exit are kept. In the main thread `fail` raises SystemExit, and
    in others, daemons all, it never returns.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.codes: list[int] = []
        self.ended = threading.Event()
        self.ending = Ending(self.lines.append, self._exit)

    def _exit(self, code: int) -> None:
        self.codes.append(code)
        self.ended.set()
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(code)


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    path = Path(__file__).with_name("toy_rank.py")
    spec = importlib.util.spec_from_file_location("toy_rank", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def make_recorded() -> type[Recorded]:
    return Recorded
