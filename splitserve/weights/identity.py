"""A cheap name for a checkpoint's weights, the same on every host that has the same files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Final

from splitserve.models.config import ModelConfig
from splitserve.weights.stored import StoredTensor

_SAMPLE_BYTES: Final = 512


def weights_identity(
    config: ModelConfig, tensors: Iterable[StoredTensor], file_bytes: Iterable[int]
) -> bytes:
    """SHA-256 over the config, every tensor's name, shape and type, the sizes of the
    files, and a sample of every tensor's bytes (its beginning, middle and end). 32 bytes.

    It tells different models and different trainings of one model apart. It is no proof against
    someone who alters weights between the samples.
    """
    digest = hashlib.sha256(b"splitserve-weights-1\0")
    digest.update(_canonical(config))
    digest.update(json.dumps(sorted(file_bytes)).encode())
    for tensor in sorted(tensors, key=lambda t: t.name):
        described = json.dumps([tensor.name, tensor.dtype, tensor.shape, tensor.size_bytes])
        digest.update(described.encode())
        digest.update(_sample(tensor))
    return digest.digest()


def _canonical(config: ModelConfig) -> bytes:
    fields = dataclasses.asdict(config)
    fields["eos_token_ids"] = sorted(config.eos_token_ids)
    fields["rope_scaling"] = [type(config.rope_scaling).__name__, fields["rope_scaling"]]
    return json.dumps(fields, sort_keys=True).encode()


def _sample(tensor: StoredTensor) -> bytes:
    size = min(_SAMPLE_BYTES, tensor.size_bytes)
    last = tensor.size_bytes - size
    samples = bytearray(3 * size)
    for index, start in enumerate((0, last // 2, last)):
        tensor.read_into(memoryview(samples)[index * size : (index + 1) * size], start)
    return bytes(samples)
