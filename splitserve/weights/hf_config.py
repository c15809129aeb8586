"""Reads a model's shape from a Hugging Face config.json."""

from __future__ import annotations

from pathlib import Path

from splitserve.errors import CheckpointError
from splitserve.models.config import LinearRope, Llama3Rope, ModelConfig, RopeScaling
from splitserve.weights.fields import Fields


def read_hf_config(directory: Path) -> ModelConfig:
    """The model's shape from config.json, with the ends of generation_config.json if there is one.

    Raises `CheckpointError` for another family, for code that would have to be run, and for
    whatever would change the arithmetic and is not implemented.
    """
    fields = Fields.from_json_file(directory / "config.json")
    _refuse_what_would_be_wrong(fields)
    try:
        return _model_config(fields, _generation_config(directory))
    except CheckpointError as exc:
        if exc.message.startswith(str(directory)):
            raise
        raise CheckpointError(f"{fields.source}: {exc.message}") from exc


def _model_config(fields: Fields, generation: Fields) -> ModelConfig:
    architecture = _architecture(fields)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    attention_bias = is_qwen2 or fields.boolean("attention_bias", False)
    bos = generation if "bos_token_id" in generation else fields
    eos = generation if "eos_token_id" in generation else fields
    return ModelConfig(
        architecture=architecture,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=_head_dim(fields, hidden_size, num_heads),
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        rope_scaling=_rope_scaling(fields),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=attention_bias,
        # Qwen2 has biases on query, key and value only; Llama's flag covers all four.
        attention_output_bias=attention_bias and not is_qwen2,
        mlp_bias=fields.boolean("mlp_bias", False),
        bos_token_id=bos.optional_integer("bos_token_id"),
        eos_token_ids=frozenset(eos.integers("eos_token_id")),
    )


def _generation_config(directory: Path) -> Fields:
    path = directory / "generation_config.json"
    return Fields.from_json_file(path) if path.is_file() else Fields(path, {})


def _refuse_what_would_be_wrong(fields: Fields) -> None:
    if "auto_map" in fields:
        raise fields.error("auto_map", "names code to run; models that carry code are refused")
    if "quantization_config" in fields:
        method = fields.nested("quantization_config").raw("quant_method")
        raise fields.error(
            "quantization_config", f"(method {method!r}) is not supported; use bf16 weights or GGUF"
        )
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise fields.error("hidden_act", f"{activation!r} is not supported, only 'silu'")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise fields.error("partial_rotary_factor", "is not supported")
    window = fields.optional_integer("sliding_window")
    uses_window = fields.boolean("use_sliding_window", "use_sliding_window" not in fields)
    if window is not None and uses_window and window < fields.integer("max_position_embeddings"):
        raise fields.error("sliding_window", f"{window} is not supported, only full attention")


def _architecture(fields: Fields) -> str:
    names = fields.texts("architectures")
    if len(names) != 1:
        raise fields.error("architectures", f"must name one architecture, has {len(names)}")
    return names[0]


def _head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    if "head_dim" in fields:
        return fields.integer("head_dim")
    if num_heads < 1 or hidden_size % num_heads:
        raise fields.error(
            "hidden_size", f"{hidden_size} is not a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads


def _rope_theta(fields: Fields) -> float:
    parameters = fields.nested("rope_parameters")
    if "rope_theta" in parameters:
        return parameters.number("rope_theta")
    return fields.number("rope_theta", 10000.0)


def _rope_scaling(fields: Fields) -> RopeScaling | None:
    key = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    scaling = fields.nested(key)
    kind = scaling.text("rope_type" if "rope_type" in scaling else "type", "default")
    match kind:
        case "default":
            return None
        case "linear":
            return LinearRope(scaling.number("factor"))
        case "llama3":
            return Llama3Rope(
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_max_context_tokens=scaling.integer("original_max_position_embeddings"),
            )
        case _:
            raise scaling.error(
                "rope_type", f"{kind!r} is not supported; supported: default, linear, llama3"
            )
