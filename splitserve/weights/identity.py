"""A cheap name for a checkpoint's weights, the same on every host that has the same files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Final

from splitserve.models.config import ModelConfig
from splitserve.weights.quantization import Quantization
from splitserve.weights.stored import StoredTensor

_SAMPLE_BYTES: Final = 512


def weights_identity(
    config: ModelConfig,
    tensors: Iterable[StoredTensor],
    file_bytes: Iterable[int],
    quantization: Quantization | None = None,
) -> bytes:
    """32 bytes: a SHA-256 over the config, how weights are quantised, every tensor's name, shape
    and type, the sizes of the files, and a sample of every tensor's beginning, middle and end.

    It tells different models and different trainings of one model apart. It is no proof against
    someone who alters weights between the samples.
    """
    digest = hashlib.sha256(b"splitserve-weights-2\0")
    digest.update(_canonical(config))
    digest.update(_canonical(quantization))
    digest.update(json.dumps(sorted(file_bytes)).encode())
    for tensor in sorted(tensors, key=lambda t: t.name):
        described = json.dumps([tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes])
        digest.update(described.encode())
        digest.update(_sample(tensor))
    return digest.digest()


def _canonical(config: object) -> bytes:
    return json.dumps(_plain(config), sort_keys=True).encode()


def _plain(value: object) -> object:
    """A dataclass as JSON can hold it, with the names of the classes in it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return [type(value).__name__, {name: _plain(each) for name, each in fields.items()}]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, re.Pattern):
        return value.pattern
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


def _sample(tensor: StoredTensor) -> bytes:
    size = min(_SAMPLE_BYTES, tensor.size_bytes)
    last = tensor.size_bytes - size
    samples = bytearray(3 * size)
    for index, start in enumerate((0, last // 2, last)):
        tensor.read_into(memoryview(samples)[index * size : (index + 1) * size], start)
    return bytes(samples)
