"""What `--quantization` does: which weights are rounded to what, and with whose help."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from torch import Tensor

from splitserve.engine.calibration import Calibration
from splitserve.engine.factory import Quantization
from splitserve.errors import CheckpointError, ConfigError
from splitserve.models.linear import Linear, MakeLinear, Products
from splitserve.models.load import LoadObserver
from splitserve.quant.matrix import QuantizedMatrix, Weight
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8
from splitserve.quant.scales import InputSeen, activation_aware, smooth
from splitserve.tokenizer import Tokenizer

_ROUND: Final[Mapping[Quantization, Callable[[Tensor], QuantizedMatrix]]] = {
    "fp8": quantize_fp8,
    "int8": quantize_int8,
    "int4": quantize_int4,
}
_CALIBRATED: Final = frozenset({"int8-smooth", "int4-awq"})
_TEXTS: Final = 8
_TEXT_TOKENS: Final = 512


def quantizing(
    products: Products, quantization: Quantization, model: str
) -> tuple[Products, list[LoadObserver]]:
    """Products that quantise plain weights, and what has to see the model being loaded for it.

    The unembedding is int8 wherever projections are integers: it is the largest matrix, and the
    logits are what its rounding would be seen in. Weights that are stored quantised stay as
    they are.
    """
    if quantization == "none":
        return products, []
    unembedding = products.unembedding
    if quantization.startswith("int"):
        unembedding = _rounding(quantize_int8, products.unembedding)
    if quantization not in _CALIBRATED:
        projection = _rounding(_ROUND[quantization], products.projection)
        return replace(products, projection=projection, unembedding=unembedding), []
    quantize = _smooth_int8 if quantization == "int8-smooth" else _aware_int4
    calibration = Calibration(_texts(model), quantize, products.projection)
    products = replace(products, projection=calibration.projection, unembedding=unembedding)
    return products, [calibration]


def _rounding(quantize: Callable[[Tensor], QuantizedMatrix], make: MakeLinear) -> MakeLinear:
    def make_rounded(weight: Weight, bias: Tensor | None) -> Linear:
        return make(quantize(weight) if isinstance(weight, Tensor) else weight, bias)

    return make_rounded


def _smooth_int8(weight: Tensor, seen: InputSeen | None) -> QuantizedMatrix:
    if seen is None:
        return replace(quantize_int8(weight), quantizes_input=True)
    return smooth(weight, seen)


def _aware_int4(weight: Tensor, seen: InputSeen | None) -> QuantizedMatrix:
    return quantize_int4(weight) if seen is None else activation_aware(weight, seen)


def _texts(model: str) -> Sequence[Sequence[int]]:
    """English that every Python has: the end of its own documentation."""
    try:
        tokenizer = Tokenizer.from_checkpoint(model)
    except CheckpointError as error:
        raise ConfigError(
            f"int8-smooth and int4-awq run the model on text while loading it: {error.message}"
        ) from error
    topics = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = tokenizer.encode(topics[-_TEXTS * _TEXT_TOKENS * 16 :])
    starts = range(0, _TEXTS * _TEXT_TOKENS, _TEXT_TOKENS)
    return [tokens[start : start + _TEXT_TOKENS] for start in starts]
