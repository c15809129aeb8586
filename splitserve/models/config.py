"""The shape of a Llama-family model, checked where it is made. Never imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

from splitserve.errors import CheckpointError

ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"})

# Far above any real model and far below what makes an allocation a denial of service.
_MOST: Final = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_context_tokens": 1 << 27,
}
# So that a base or a factor and what is divided by it are numbers in fp32, too.
_MOST_FACTOR: Final = 1e18


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_at_least_one("rope_scaling.factor", self.factor)


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths by `factor`, short ones not, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context_tokens: int

    def __post_init__(self) -> None:
        _check_at_least_one("rope_scaling.factor", self.factor)
        _check_positive("rope_scaling.low_freq_factor", self.low_freq_factor)
        _check_positive("rope_scaling.high_freq_factor", self.high_freq_factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError("rope_scaling.high_freq_factor must be above low_freq_factor")
        _check_count(
            "rope_scaling.original_max_position_embeddings",
            self.original_max_context_tokens,
            _MOST["max_context_tokens"],
        )


@dataclass(frozen=True)
class FactorsRope:
    """Each inverse frequency divided by its own factor, as GGUF files store Llama 3.1's scaling."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            _check_positive("rope_freqs", factor)


RopeScaling: TypeAlias = LinearRope | Llama3Rope | FactorsRope


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and constants of one model.

    `attention_bias` adds biases to the query, key and value projections, `attention_output_bias`
    to the output projection, `mlp_bias` to all three of the MLP. Raises `CheckpointError` for
    what no model can have; the reader of a file adds the file's name.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise CheckpointError(
                f"architecture {self.architecture!r} is not supported; supported: {known}"
            )
        for name, most in _MOST.items():
            _check_count(name, getattr(self, name), most)
        self._check_heads()
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        if self.rms_norm_eps >= 1:
            raise CheckpointError(f"rms_norm_eps is {self.rms_norm_eps}, must be below 1")
        _check_at_least_one("rope_theta", self.rope_theta)
        self._check_token_ids()

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")
        scaling = self.rope_scaling
        if isinstance(scaling, FactorsRope) and len(scaling.factors) != self.head_dim // 2:
            raise CheckpointError(
                f"rope_freqs has {len(scaling.factors)} factors, head_dim {self.head_dim} needs "
                f"{self.head_dim // 2}"
            )

    def _check_token_ids(self) -> None:
        ids = set(self.eos_token_ids)
        if self.bos_token_id is not None:
            ids.add(self.bos_token_id)
        for token_id in sorted(ids):
            if not 0 <= token_id < self.vocab_size:
                raise CheckpointError(
                    f"bos or eos token {token_id} is outside the vocabulary of {self.vocab_size}"
                )


def _check_count(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise CheckpointError(f"{name} is {value}, must be 1 to {most}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"{name} is {value}, must be a positive number")


def _check_at_least_one(name: str, value: float) -> None:
    if not 1 <= value <= _MOST_FACTOR:
        raise CheckpointError(f"{name} is {value}, must be 1 to {_MOST_FACTOR:.0e}")
