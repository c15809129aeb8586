"""What the configs of many families have in common, read the same way. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from splitserve.fields import Fields
from splitserve.models.config import MOST_WIDTH, Activation, LayerConfig, NormConfig, num_layers
from splitserve.models.limits import check_count, check_positive
from splitserve.models.rope import (
    MOST_CONTEXT,
    DynamicRope,
    FactorsRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    RopeConfig,
    RopeScaling,
    YarnRope,
)

_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def read_activation(fields: Fields, key: str, default: str) -> Activation:
    """The activation by its Hugging Face name."""
    name = fields.text(key, default)
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise fields.error(key, f"{name!r} is not supported; supported: {known}")
    return _ACTIVATIONS[name]


def either(fields: Fields, *keys: str) -> str:
    """The first of a value's names that the config has, for those that have had several."""
    return next((key for key in keys if key in fields), keys[-1])


def rms_norm(fields: Fields) -> NormConfig:
    """The RMS norm of Llama and its relatives."""
    return NormConfig("rms", fields.number("rms_norm_eps", 1e-6))


def read_head_dim(fields: Fields, hidden: str = "hidden_size", heads: str = "") -> int:
    """The size of a head: named, or what the heads share out of the hidden size."""
    if "head_dim" in fields:
        return fields.integer("head_dim")
    heads = heads or "num_attention_heads"
    hidden_size, num_heads = fields.integer(hidden), fields.integer(heads)
    check_count(hidden, hidden_size, MOST_WIDTH)
    if num_heads < 1 or hidden_size % num_heads:
        raise fields.error(hidden, f"{hidden_size} is not a multiple of {heads} {num_heads}")
    return hidden_size // num_heads


def read_rope(
    fields: Fields,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: float = 1.0,
    interleaved: bool = False,
    layer_type: str = "",
) -> RopeConfig:
    """The rotary embedding from `rope_parameters`, or from `rope_theta` and `rope_scaling`.

    `theta` and `partial` (the part of a head that is turned) are the family's defaults.
    `layer_type` names the entry of a model that has several.
    """
    parameters = fields.nested("rope_parameters")
    if layer_type and layer_type in parameters:
        parameters = parameters.nested(layer_type)
    for name in parameters.names():
        if isinstance(parameters.raw(name), dict):
            raise parameters.error(name, "is a rope of its own; this family has one for all layers")
    scaling = fields.nested("rope_scaling") if "rope_scaling" in fields else parameters
    for source in (parameters, scaling):
        if "rope_theta" in source:
            theta = source.number("rope_theta")
            break
    else:
        theta = fields.number("rope_theta", theta)
    for source in (parameters, fields):
        if "partial_rotary_factor" in source:
            partial = source.number("partial_rotary_factor")
            break
    if not 0 < partial <= 1:
        raise fields.error("partial_rotary_factor", f"is {partial}, must be above 0 and at most 1")
    check_count("head_dim", head_dim, MOST_CONTEXT)
    dims = int(head_dim * partial)
    return RopeConfig(theta, dims, _scaling(fields, scaling), interleaved)


def read_context(fields: Fields, rope: RopeConfig | None) -> int:
    """The longest sequence. `max_position_embeddings`, unless a scaling stretches it: linear and
    dynamic ones are given beside the length before them, YaRN's beside either.
    """
    context = _positions(fields)
    match rope and rope.scaling:
        case LinearRope(factor) | DynamicRope(factor, _):
            return int(context * factor)
        case YarnRope() as yarn:
            return max(context, int(yarn.original_context * yarn.factor))
    return context


def _positions(fields: Fields) -> int:
    """`max_position_embeddings`, small enough to be divided and multiplied."""
    positions = fields.integer("max_position_embeddings")
    check_count("max_position_embeddings", positions, MOST_CONTEXT)
    return positions


def _scaling(fields: Fields, scaling: Fields) -> RopeScaling | None:
    kind = scaling.text("rope_type" if "rope_type" in scaling else "type", "default")
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(scaling.number("factor"))
        case "dynamic":
            return DynamicRope(scaling.number("factor"), _positions(fields))
        case "llama3":
            return Llama3Rope(
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_context=scaling.integer("original_max_position_embeddings"),
            )
        case "yarn":
            return _yarn(fields, scaling)
        case "longrope" | "su":
            return _longrope(fields, scaling)
        case "factors":
            return FactorsRope(tuple(scaling.numbers("factors")))
        case _:
            known = "default, linear, dynamic, llama3, yarn, longrope"
            raise scaling.error("rope_type", f"{kind!r} is not supported; supported: {known}")


def _original_context(fields: Fields, scaling: Fields) -> int:
    key = "original_max_position_embeddings"
    for source in (scaling, fields):
        if key in source:
            return source.integer(key)
    return _positions(fields)


def _factor(fields: Fields, scaling: Fields, original: int) -> float:
    if "factor" in scaling:
        return scaling.number("factor")
    return _positions(fields) / max(original, 1)


def _yarn(fields: Fields, scaling: Fields) -> YarnRope:
    original = _original_context(fields, scaling)
    factor = _factor(fields, scaling, original)

    def growth(strength: float) -> float:
        return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = growth(1.0)
    mscale, mscale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if mscale and mscale_all:
        check_positive("rope_scaling.mscale", mscale)
        check_positive("rope_scaling.mscale_all_dim", mscale_all)
        attention_factor = growth(mscale) / growth(mscale_all)
    return YarnRope(
        factor=factor,
        original_context=original,
        attention_factor=scaling.number("attention_factor", attention_factor),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.boolean("truncate", True),
    )


def _longrope(fields: Fields, scaling: Fields) -> LongRope:
    original = _original_context(fields, scaling)
    factor = _factor(fields, scaling, original)
    attention_factor = 1.0
    if factor > 1 and original > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        short_factors=tuple(scaling.numbers("short_factor")),
        long_factors=tuple(scaling.numbers("long_factor")),
        original_context=original,
        attention_factor=scaling.number("attention_factor", attention_factor),
    )


def read_layers(
    fields: Fields,
    rope: RopeConfig | None,
    *,
    window: int | None = None,
    count: str = "",
    pattern: int = 0,
) -> tuple[LayerConfig, ...]:
    """Layers that differ at most in whether they slide: by `layer_types`, else all but every
    `pattern`-th one, else all.

    `window` is the sliding one, None for none. `count` is the key of the number of layers.
    """
    total = num_layers(fields.integer(count or "num_hidden_layers"))
    types = fields.texts("layer_types")
    if not types and pattern:
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in total]
    if window is None or not types:
        return tuple(LayerConfig(window, rope) for _ in total)
    if len(types) != len(total):
        raise fields.error("layer_types", f"names {len(types)} layers of {len(total)}")
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise fields.error("layer_types", f"{min(unknown)!r} is not supported")
    return tuple(
        LayerConfig(window if kind == "sliding_attention" else None, rope) for kind in types
    )
