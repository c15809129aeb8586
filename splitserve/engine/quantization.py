"""What `--quantization` does: which weights are rounded to what, and with whose help."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from torch import Tensor

from splitserve.engine.calibration import Calibration
from splitserve.engine.factory import Quantization
from splitserve.errors import CheckpointError, ConfigError
from splitserve.fields import Fields
from splitserve.models.linear import Linear, MakeLinear, Products
from splitserve.models.load import LoadObserver
from splitserve.quant.matrix import QuantizedMatrix, Weight
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8
from splitserve.quant.scales import InputSeen, activation_aware, smooth
from splitserve.tokenizer import Tokenizer
from splitserve.weights.checkpoint import read_config
from splitserve.weights.ggml_blocks import BLOCK_TYPES
from splitserve.weights.gguf_file import read_gguf
from splitserve.weights.quantization import read_quantization
from splitserve.weights.writer import NOTES

ROUNDED_UNEMBEDDING: Final = "rounded_unembedding"
"""A note in config.json that says what a plain unembedding is rounded to while loading."""

_ROUND: Final[Mapping[Quantization, Callable[[Tensor], QuantizedMatrix]]] = {
    "fp8": quantize_fp8,
    "int8": quantize_int8,
    "int4": quantize_int4,
}
_CALIBRATED: Final = frozenset({"int8-smooth", "int4-awq"})
_TEXT_TOKENS: Final = 4096
_WINDOW_TOKENS: Final = 512
_INT4_GROUP: Final = 32


def quantizing(
    products: Products, quantization: Quantization, model: str
) -> tuple[Products, list[LoadObserver]]:
    """Products that quantise plain weights, and what has to see the model being loaded for it.

    The unembedding is int8 wherever projections are integers: it is the largest matrix, and the
    logits are what its rounding would be seen in. Raises `ConfigError` for a checkpoint that is
    quantised already, and for one without a tokenizer where text is needed.
    """
    if quantization == "none":
        if _notes_rounded_unembedding(Path(model)):
            rounded = _rounding(quantize_int8, products.unembedding)
            products = replace(products, unembedding=rounded)
        return products, []
    _check_is_plain(Path(model))
    unembedding = products.unembedding
    if rounds_unembedding(quantization):
        unembedding = _rounding(quantize_int8, products.unembedding)
    if quantization not in _CALIBRATED:
        projection = _rounding(_ROUND[quantization], products.projection)
        return replace(products, projection=projection, unembedding=unembedding), []
    quantize = _smooth_int8 if quantization == "int8-smooth" else _aware_int4
    calibration = Calibration(_texts(model), quantize, products.projection)
    group_size = 1 if quantization == "int8-smooth" else _INT4_GROUP
    projection = _checking(group_size, calibration.projection)
    return replace(products, projection=projection, unembedding=unembedding), [calibration]


def recipe(quantization: Quantization, model: str, ranks: int) -> str:
    """Names what the weights become besides what the checkpoint says, for fingerprints.

    A scale of a row, or one chosen by what a layer saw, is made of the columns that a rank has:
    over another number of ranks it is another. Groups of 4 bits are the same in any part. The
    text may be another in another version of Python.
    """
    if quantization in ("none", "int4"):
        return quantization
    name = f"{quantization} over {ranks}"
    if quantization in _CALIBRATED:
        name += " " + hashlib.sha256(repr(_texts(model)).encode()).hexdigest()
    return name


def rounds_unembedding(quantization: Quantization) -> bool:
    """Whether a plain unembedding is rounded to int8 while loading."""
    return quantization.startswith("int")


def _rounding(quantize: Callable[[Tensor], QuantizedMatrix], make: MakeLinear) -> MakeLinear:
    def make_rounded(weight: Weight, bias: Tensor | None) -> Linear:
        return make(quantize(weight) if isinstance(weight, Tensor) else weight, bias)

    return make_rounded


def _checking(group_size: int, make: MakeLinear) -> MakeLinear:
    """Refuses at once what rounding would refuse when the layer has been run."""

    def make_checked(weight: Weight, bias: Tensor | None) -> Linear:
        if isinstance(weight, Tensor):
            if weight.shape[1] % group_size:
                raise ValueError(f"groups of {group_size} do not divide {weight.shape[1]} columns")
            if not weight.isfinite().all():
                raise ValueError("a weight that is not finite cannot be quantised")
        return make(weight, bias)

    return make_checked


def _smooth_int8(weight: Tensor, seen: InputSeen | None) -> QuantizedMatrix:
    if seen is None:
        return replace(quantize_int8(weight), quantizes_input=True)
    return smooth(weight, seen)


def _aware_int4(weight: Tensor, seen: InputSeen | None) -> QuantizedMatrix:
    if seen is None:
        return quantize_int4(weight, _INT4_GROUP)
    return activation_aware(weight, seen, _INT4_GROUP)


def _check_is_plain(model: Path) -> None:
    """Raises `ConfigError` that says how the checkpoint is quantised."""
    if model.is_dir():
        if read_quantization(model) is None:
            return
        fields = Fields.from_json_file(model / "config.json").nested("quantization_config")
        stored = fields.optional_text("quant_method") or "modelopt"
    else:
        types = {tensor.dtype for tensor in read_gguf(model).tensors.values()}
        stored = ", ".join(sorted(types & set(BLOCK_TYPES)))
        if not stored:
            return
    raise ConfigError(f"{model}: is quantised already ({stored}); leave --quantization out")


def _notes_rounded_unembedding(model: Path) -> bool:
    """Whether the checkpoint was written by `splitserve quantize` for it; see `export`."""
    if not model.is_dir():
        return False
    fields = Fields.from_json_file(model / "config.json").nested(NOTES)
    fields.expect(ROUNDED_UNEMBEDDING, "int8")
    return ROUNDED_UNEMBEDDING in fields


def _texts(model: str) -> Sequence[Sequence[int]]:
    """English that every Python has: the end of its own documentation, in windows that the model
    has positions for.
    """
    try:
        tokenizer = Tokenizer.from_checkpoint(model)
    except CheckpointError as error:
        raise ConfigError(
            f"int8-smooth and int4-awq run the model on text while loading it: {error.message}"
        ) from error
    import pydoc_data.topics as text  # of 700 KB, which others need not load

    topics = "\n".join(text.topics[name] for name in sorted(text.topics))
    tokens = tokenizer.encode(topics[-_TEXT_TOKENS * 16 :])[:_TEXT_TOKENS]
    config = read_config(model)
    if not tokens or max(tokens) >= config.vocab_size:
        raise ConfigError(
            f"{model}: the tokenizer does not fit the model's vocabulary of {config.vocab_size}"
        )
    window = min(_WINDOW_TOKENS, config.max_context_tokens)
    return [tokens[start : start + window] for start in range(0, len(tokens), window)]
