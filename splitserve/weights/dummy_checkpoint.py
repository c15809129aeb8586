"""A checkpoint of random weights, of which only config.json exists: for measuring speed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from splitserve.fields import read_json_object
from splitserve.weights.hf_config import read_hf_config
from splitserve.weights.source import MatrixSource, TensorSource

if TYPE_CHECKING:
    import torch

_SPREAD = 0.02


class DummyCheckpoint:
    """See `Checkpoint`. Weights are drawn on `device`, the same in every run: a tensor's numbers
    depend on its name and its part of it alone, so that ranks agree on what all of them have.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        import torch

        self.path = path
        self.config = read_hf_config(path)
        self.metadata: Mapping[str, object] = read_json_object(path / "config.json")
        self._device = device
        self._generator = torch.Generator(device)

    def tensor_names(self) -> Sequence[str]:
        """None are stored."""
        return ()

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.tensor`. Vectors are near 1, as norms are."""
        values = self._draw(source.name, source.read_shape, dtype)
        return values + 1 if values.ndim == 1 else values

    def matrix(self, source: MatrixSource, dtype: torch.dtype) -> torch.Tensor:
        """See `Checkpoint.matrix`."""
        return self._draw(source.name, source.read_shape, dtype)

    def check_tensor(self, source: TensorSource) -> None:
        """Nothing can be missing."""

    def check_matrix(self, source: MatrixSource) -> None:
        """Nothing can be missing."""

    def weight_bytes(self, source: MatrixSource) -> float | None:
        """None is quantised."""
        return None

    def identity(self) -> bytes:
        """See `Checkpoint.identity`."""
        return hashlib.sha256(b"dummy" + repr(self.config).encode()).digest()

    def _draw(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        self._generator.manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return values.normal_(std=_SPREAD, generator=self._generator)
