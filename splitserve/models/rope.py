"""Rotary embedding: its shape, its scalings and the frequencies they give. Never imports torch.

A scaling that depends on the length of the sequence (dynamic, LongRoPE) is fixed when an engine
starts, by the context that it serves: the keys in the cache were turned by one set of
frequencies, and a prefix may be shared by a short and a long sequence. See
docs/adr/0008-length-dependent-rope.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from splitserve.errors import CheckpointError
from splitserve.models.limits import check_at_least_one, check_count, check_positive

MOST_CONTEXT: Final = 1 << 27

Frequencies: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check_at_least_one("rope_scaling.factor", self.factor)


@dataclass(frozen=True)
class DynamicRope:
    """A base that grows with the context beyond the original one (NTK-aware, by "bloc97")."""

    factor: float
    original_context: int

    def __post_init__(self) -> None:
        check_at_least_one("rope_scaling.factor", self.factor)
        check_count(
            "rope_scaling.original_max_position_embeddings", self.original_context, MOST_CONTEXT
        )


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths by `factor`, short ones not, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        check_at_least_one("rope_scaling.factor", self.factor)
        check_positive("rope_scaling.low_freq_factor", self.low_freq_factor)
        check_positive("rope_scaling.high_freq_factor", self.high_freq_factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError("rope_scaling.high_freq_factor must be above low_freq_factor")
        check_count(
            "rope_scaling.original_max_position_embeddings", self.original_context, MOST_CONTEXT
        )


@dataclass(frozen=True)
class YarnRope:
    """YaRN (Peng et al. 2023): a ramp over dimensions, and cosines and sines scaled by
    `attention_factor`.
    """

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check_at_least_one("rope_scaling.factor", self.factor)
        check_positive("rope_scaling.attention_factor", self.attention_factor)
        check_positive("rope_scaling.beta_fast", self.beta_fast)
        check_positive("rope_scaling.beta_slow", self.beta_slow)
        check_count(
            "rope_scaling.original_max_position_embeddings", self.original_context, MOST_CONTEXT
        )


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): a factor for each frequency, one set within the original
    context and one beyond it.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context: int
    attention_factor: float

    def __post_init__(self) -> None:
        check_positive("rope_scaling.attention_factor", self.attention_factor)
        check_count("original_max_position_embeddings", self.original_context, MOST_CONTEXT)
        for factor in (*self.short_factors, *self.long_factors):
            check_positive("rope_scaling.short_factor or long_factor", factor)


@dataclass(frozen=True)
class FactorsRope:
    """Each inverse frequency divided by its own factor, as GGUF files store Llama 3.1's scaling."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            check_positive("rope_freqs", factor)


RopeScaling: TypeAlias = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope | FactorsRope


@dataclass(frozen=True)
class RopeConfig:
    """Turns the first `dims` dimensions of each head, the others are left.

    Dimension i is paired with i + dims / 2, or with its neighbour if `interleaved`.
    """

    theta: float
    dims: int
    scaling: RopeScaling | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_at_least_one("rope_theta", self.theta)
        if self.dims < 2 or self.dims % 2:
            raise CheckpointError(
                f"rotary embedding of {self.dims} dimensions; it needs pairs of them"
            )
        if isinstance(self.scaling, YarnRope) and self.theta <= 1:
            raise CheckpointError(f"rope_theta is {self.theta}, YaRN needs more than 1")
        for name, factors in self._factors():
            if len(factors) != self.dims // 2:
                raise CheckpointError(
                    f"{name} has {len(factors)} factors, {self.dims} rotary dimensions need "
                    f"{self.dims // 2}"
                )

    @property
    def attention_factor(self) -> float:
        """What cosines and sines are multiplied by."""
        if isinstance(self.scaling, YarnRope | LongRope):
            return self.scaling.attention_factor
        return 1.0

    def inverse_frequencies(self, context: int) -> Frequencies:
        """Radians a position turns each pair by, in an engine that serves up to `context` tokens.

        Shape (dims // 2,), fp32.
        """
        inverse = _inverse(self.theta, self.dims)
        match self.scaling:
            case None:
                return inverse
            case LinearRope(factor):
                return np.asarray(inverse / factor, np.float32)
            case DynamicRope() as scaling:
                return _dynamic(self.theta, self.dims, scaling, context)
            case FactorsRope(factors):
                return _divided(inverse, factors)
            case LongRope() as scaling:
                long = context > scaling.original_context
                return _divided(inverse, scaling.long_factors if long else scaling.short_factors)
            case Llama3Rope() as scaling:
                return _llama3(inverse, scaling)
            case YarnRope() as scaling:
                return _yarn(inverse, self.theta, self.dims, scaling)

    def _factors(self) -> list[tuple[str, tuple[float, ...]]]:
        match self.scaling:
            case FactorsRope(factors):
                return [("rope_freqs", factors)]
            case LongRope() as scaling:
                return [
                    ("rope_scaling.short_factor", scaling.short_factors),
                    ("rope_scaling.long_factor", scaling.long_factors),
                ]
        return []


def _inverse(theta: float, dims: int) -> Frequencies:
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    return np.asarray(np.float32(1) / np.power(np.float32(theta), exponents), np.float32)


def _divided(inverse: Frequencies, factors: tuple[float, ...]) -> Frequencies:
    return np.asarray(inverse / np.asarray(factors), np.float32)


def _dynamic(theta: float, dims: int, scaling: DynamicRope, context: int) -> Frequencies:
    original, factor = scaling.original_context, scaling.factor
    grown = factor * max(context, original) / original - (factor - 1)
    return _inverse(theta * grown ** (dims / max(dims - 2, 1)), dims)


def _llama3(inverse: Frequencies, scaling: Llama3Rope) -> Frequencies:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / inverse
    # 0 where the wavelength is long (fully scaled), 1 where it is short (left as it is).
    kept = np.clip((scaling.original_context / wavelength - low) / (high - low), 0, 1)
    scaled = (1 - kept) * inverse / scaling.factor + kept * inverse
    return scaled.astype(np.float32)


def _yarn(inverse: Frequencies, theta: float, dims: int, scaling: YarnRope) -> Frequencies:
    def turning(rotations: float) -> float:
        """The dimension whose pair turns so many times within the original context."""
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return dims * math.log(turns) / (2 * math.log(theta))

    low, high = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = (np.arange(dims // 2, dtype=np.float32) - low) / ((high - low) or 1e-3)
    kept = 1 - np.clip(ramp, 0, 1)
    scaled = inverse / scaling.factor * (1 - kept) + inverse * kept
    return np.asarray(scaled, np.float32)
