"""What a family is: how its checkpoints' configs are read. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from splitserve.fields import Fields
from splitserve.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A row of `splitserve models --families`.

    `read` makes a model's config from its config.json, without ends of sequence, and raises
    `CheckpointError` for what would change the arithmetic and is not implemented. `ships_code`:
    published checkpoints still name the code (`auto_map`) from before transformers had the
    family. It is not run.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Fields], ModelConfig]
    ships_code: bool = False
