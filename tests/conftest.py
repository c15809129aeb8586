"""Fixtures that every kind of test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
