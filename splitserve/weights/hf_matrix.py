"""Finds how a Hugging Face checkpoint stores a matrix. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from splitserve.weights.awq import AwqMatrix
from splitserve.weights.compressed import PackedMatrix, ScaledMatrix
from splitserve.weights.dense import DenseMatrix
from splitserve.weights.gptq import GptqMatrix
from splitserve.weights.mxfp4 import Mxfp4Matrix
from splitserve.weights.quantization import (
    AwqCodes,
    GptqCodes,
    Mxfp4Codes,
    PackedCodes,
    Quantization,
    ScaledCodes,
)
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import PLAIN_TYPES, Headers

if TYPE_CHECKING:
    import torch

    from splitserve.quant.matrix import Weight


class StoredMatrix(Protocol):
    """A matrix whose tensors are there, with the right types and shapes."""

    @property
    def weight_bytes(self) -> float | None:
        """About what one weight takes in memory as codes, None for plain numbers."""

    def read(self, dtype: torch.dtype) -> Weight:
        """What its source takes of it, contiguous, on the CPU; plain numbers in `dtype`.

        Raises `CheckpointError` if the file cannot be read or holds what cannot be.
        """


def find_matrix(
    headers: Headers, quantization: Quantization | None, source: MatrixSource
) -> StoredMatrix:
    """The matrix as it is stored. Raises `CheckpointError` naming the tensor at fault."""
    scheme = quantization.scheme(source.module) if quantization else None
    plain = headers.tensors.get(source.name)
    # Configs of AWQ and GPTQ do not say that they leave some modules, lm_head above all, alone.
    if scheme is None or (plain is not None and plain.dtype in PLAIN_TYPES):
        return DenseMatrix.find(headers, source)
    match scheme:
        case ScaledCodes():
            return ScaledMatrix.find(headers, source, scheme)
        case PackedCodes():
            return PackedMatrix.find(headers, source, scheme)
        case GptqCodes():
            return GptqMatrix.find(headers, source, scheme)
        case AwqCodes():
            return AwqMatrix.find(headers, source, scheme)
        case Mxfp4Codes():
            return Mxfp4Matrix.find(headers, source)
