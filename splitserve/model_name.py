"""The name that a model is served under unless the user gives one."""

from __future__ import annotations

from pathlib import Path


def default_model_name(model: str | Path) -> str:
    """The directory's name, or the .gguf file's without its suffix. All services must agree on
    it: a router gives requests only to workers of its own model.
    """
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.resolve().name
