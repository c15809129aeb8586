"""The rotary embedding's inverse frequencies, with every scaling that is supported."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from splitserve.models.config import FactorsRope, LinearRope, Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Radians a position turns each pair of dimensions by. Shape (head_dim // 2,), fp32.

    Pair i is made of dimensions i and i + head_dim // 2 (Hugging Face's rotate-half order).
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    inverse: NDArray[np.float32] = np.float32(1) / np.power(
        np.float32(config.rope_theta), exponents
    )
    match config.rope_scaling:
        case None:
            return np.asarray(inverse, np.float32)
        case LinearRope(factor):
            return np.asarray(inverse / factor, np.float32)
        case FactorsRope(factors):
            return np.asarray(inverse / np.asarray(factors), np.float32)
        case Llama3Rope() as scaling:
            return _llama3(inverse, scaling)


def _llama3(inverse: NDArray[np.float32], scaling: Llama3Rope) -> NDArray[np.float32]:
    context = scaling.original_max_context_tokens
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    # 0 where the wavelength is long (fully scaled), 1 where it is short (left as it is).
    kept = np.clip((context / wavelength - low) / (high - low), 0, 1)
    scaled = (1 - kept) * inverse / scaling.factor + kept * inverse
    return scaled.astype(np.float32)
