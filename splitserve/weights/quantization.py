"""Reads how a Hugging Face checkpoint is quantised. Never imports torch.

What a config says is checked here; what the tensors are is checked where they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from splitserve.fields import Fields
from splitserve.weights.modules import EVERY_MODULE, Modules, read_paths, read_targets

_MOST_GROUP: Final = 1 << 17


@dataclass(frozen=True)
class ScaledCodes:
    """One byte a code, stored (out, in). `block` is the (rows, columns) that share a scale, 0 for
    all of them. `input_scale` says that activations have a fixed scale, which is stored.
    """

    kind: Literal["int8", "fp8"]
    block: tuple[int, int]
    symmetric: bool = True
    quantizes_input: bool = False
    input_scale: bool = False
    scale_name: str = "weight_scale"


@dataclass(frozen=True)
class PackedCodes:
    """compressed-tensors' words of codes along the input. A group of 0 is a whole row."""

    bits: int
    group_size: int
    symmetric: bool
    quantizes_input: bool


@dataclass(frozen=True)
class GptqCodes:
    """GPTQ's words of codes along the input, stored (in, out). `zeros_less_one` is format v1."""

    bits: int
    group_size: int
    zeros_less_one: bool


@dataclass(frozen=True)
class AwqCodes:
    """AWQ's words of 4-bit codes along the output, stored (in, out), interleaved."""

    group_size: int


@dataclass(frozen=True)
class Mxfp4Codes:
    """Experts as FP4 (E2M1) in groups of 32 that share a power of two."""


ModuleScheme: TypeAlias = ScaledCodes | PackedCodes | GptqCodes | AwqCodes | Mxfp4Codes


@dataclass(frozen=True)
class Quantization:
    """How each module is stored: by the first rule for it, unless it is one of `plain`."""

    rules: tuple[tuple[Modules, ModuleScheme], ...]
    plain: Modules

    def scheme(self, module: str) -> ModuleScheme | None:
        """How the module is stored, None for plain numbers."""
        if module in self.plain:
            return None
        return next((scheme for modules, scheme in self.rules if module in modules), None)


def read_quantization(directory: Path) -> Quantization | None:
    """What config.json or ModelOpt's own file says, None for a checkpoint of plain numbers.

    Raises `CheckpointError` that names key and value for a method, version or option that is
    not known.
    """
    fields = Fields.from_json_file(directory / "config.json")
    if "quantization_config" in fields:
        return _read_method(fields.nested("quantization_config"))
    modelopt = directory / "hf_quant_config.json"
    if modelopt.is_file():
        return _read_modelopt(Fields.from_json_file(modelopt).nested("quantization"))
    return None


def _read_method(fields: Fields) -> Quantization:
    readers = {
        "compressed-tensors": _read_compressed_tensors,
        "modelopt": _read_modelopt,
        "fp8": _read_fp8,
        "awq": _read_awq,
        "gptq": _read_gptq,
        "mxfp4": _read_mxfp4,
    }
    method = fields.text("quant_method")
    if method not in readers:
        raise fields.error("quant_method", _unsupported(method, *readers))
    return readers[method](fields)


def _read_compressed_tensors(fields: Fields) -> Quantization:
    for key in ("sparsity_config", "transform_config"):
        if fields.nested(key).names() and fields.nested(key).raw("format") != "dense":
            raise fields.error(key, "is not supported")
    groups = fields.nested("config_groups")
    if not groups.names():
        raise fields.error("config_groups", "is missing or empty")
    rules = []
    for name in groups.names():
        group = groups.nested(name)
        layout = group if "format" in group else fields
        rules.append((read_targets(group, "targets"), _read_group(group, layout)))
    return Quantization(tuple(rules), read_targets(fields, "ignore"))


def _read_group(group: Fields, layout: Fields) -> ModuleScheme:
    weights = group.nested("weights")
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int")
    quantizes_input, input_scale = _read_activations(group.nested("input_activations"))
    inputs = group.nested("input_activations")
    if quantizes_input and inputs.text("type", "int") != kind:
        raise inputs.error(
            "type", f"{inputs.text('type', 'int')!r} is not supported with weights of {kind!r}"
        )
    if group.nested("output_activations").names():
        raise group.error("output_activations", "is not supported")
    symmetric = weights.boolean("symmetric", True)
    block = _read_strategy(weights)
    stored = layout.text("format")
    if stored == "pack-quantized":
        if kind != "int" or bits not in (4, 8):
            raise weights.error("num_bits", f"{bits} of type {kind!r} is not supported in {stored}")
        if input_scale or block[0] != 1:
            raise weights.error("strategy", "must be 'group' or 'channel', with dynamic inputs")
        return PackedCodes(bits, block[1], symmetric, quantizes_input)
    if stored not in ("int-quantized", "float-quantized", "naive-quantized"):
        known = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
        raise layout.error("format", _unsupported(stored, *known))
    if bits != 8 or kind not in ("int", "float"):
        raise weights.error("num_bits", f"{bits} of type {kind!r} is not supported in {stored}")
    return ScaledCodes(
        kind="int8" if kind == "int" else "fp8",
        block=block,
        symmetric=symmetric,
        quantizes_input=quantizes_input,
        input_scale=input_scale,
    )


def _read_activations(fields: Fields) -> tuple[bool, bool]:
    """Whether activations are quantised and whether by a stored scale."""
    if not fields.names():
        return False, False
    if fields.integer("num_bits", 8) != 8:
        raise fields.error("num_bits", f"{fields.raw('num_bits')!r} is not supported, only 8")
    if not fields.boolean("symmetric", True):
        raise fields.error("symmetric", "false is not supported")
    if fields.boolean("dynamic", False):
        return True, False
    strategy = fields.text("strategy", "tensor")
    if strategy != "tensor":
        raise fields.error("strategy", _unsupported(strategy, "tensor"))
    return True, True


def _read_strategy(weights: Fields) -> tuple[int, int]:
    strategy = weights.text("strategy", "group" if "group_size" in weights else "tensor")
    match strategy:
        case "tensor":
            return 0, 0
        case "channel":
            return 1, 0
        case "group":
            return 1, _group_size(weights)
        case "block":
            return _block(weights, "block_structure")
    raise weights.error("strategy", _unsupported(strategy, "tensor", "channel", "group", "block"))


def _read_modelopt(fields: Fields) -> Quantization:
    algorithm = fields.text("quant_algo")
    if algorithm != "FP8":
        raise fields.error("quant_algo", _unsupported(algorithm, "FP8"))
    # Scales of a quantised KV cache (k_scale, v_scale) are stored beside the weights and are no
    # part of them: how the cache is stored here is chosen when the engine starts.
    kv_cache = fields.optional_text("kv_cache_quant_algo")
    if kv_cache not in (None, "FP8"):
        raise fields.error("kv_cache_quant_algo", _unsupported(kv_cache, "FP8"))
    key = "exclude_modules" if "exclude_modules" in fields else "ignore"
    scheme = ScaledCodes("fp8", (0, 0), quantizes_input=True, input_scale=True)
    return _for_all(scheme, read_paths(fields, key))


def _read_fp8(fields: Fields) -> Quantization:
    number_format = fields.text("fmt", "e4m3")
    if number_format not in ("e4m3", "float8_e4m3fn"):
        raise fields.error("fmt", _unsupported(number_format, "e4m3"))
    activations = fields.text("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise fields.error("activation_scheme", _unsupported(activations, "dynamic", "static"))
    plain = read_paths(fields, "modules_to_not_convert")
    if "weight_block_size" not in fields:
        static = activations == "static"
        return _for_all(ScaledCodes("fp8", (0, 0), True, True, static), plain)
    if activations == "static":
        raise fields.error("activation_scheme", "'static' is not supported with blocks")
    block = _block(fields, "weight_block_size")
    return _for_all(ScaledCodes("fp8", block, scale_name="weight_scale_inv"), plain)


def _read_awq(fields: Fields) -> Quantization:
    bits = fields.integer("bits" if "bits" in fields else "w_bit")
    if bits != 4:
        raise fields.error("bits", _unsupported(bits, 4))
    version = fields.text("version", "gemm")
    if version.lower() != "gemm":
        raise fields.error("version", _unsupported(version, "gemm"))
    if not fields.boolean("zero_point", True):
        raise fields.error("zero_point", "false is not supported")
    scheme = AwqCodes(
        _group_size(fields, "group_size" if "group_size" in fields else "q_group_size")
    )
    return _for_all(scheme, read_paths(fields, "modules_to_not_convert"))


def _read_gptq(fields: Fields) -> Quantization:
    bits = fields.integer("bits")
    if bits not in (4, 8):
        raise fields.error("bits", _unsupported(bits, 4, 8))
    stored = fields.text("checkpoint_format", fields.text("format", "gptq"))
    if stored not in ("gptq", "gptq_v2"):
        raise fields.error("checkpoint_format", _unsupported(stored, "gptq", "gptq_v2"))
    if fields.boolean("is_marlin_format", False):
        raise fields.error("is_marlin_format", "true is not supported")
    if fields.nested("dynamic").names():
        raise fields.error("dynamic", "(options of single modules) is not supported")
    packed = fields.text("pack_dtype", "int32")
    if packed != "int32":
        raise fields.error("pack_dtype", _unsupported(packed, "int32"))
    scheme = GptqCodes(bits, _group_size(fields), zeros_less_one=stored == "gptq")
    return _for_all(scheme, read_paths(fields, "modules_to_not_convert"))


def _read_mxfp4(fields: Fields) -> Quantization:
    return _for_all(Mxfp4Codes(), read_paths(fields, "modules_to_not_convert"))


def _for_all(scheme: ModuleScheme, plain: Modules) -> Quantization:
    return Quantization(((EVERY_MODULE, scheme),), plain)


def _group_size(fields: Fields, key: str = "group_size") -> int:
    """Columns of a group, 0 for all of them, which configs write as -1."""
    size = fields.integer(key)
    if size != -1 and not 1 <= size <= _MOST_GROUP:
        raise fields.error(key, f"is {size}, must be -1 or 1 to {_MOST_GROUP}")
    return max(size, 0)


def _block(fields: Fields, key: str) -> tuple[int, int]:
    sizes = fields.integers(key)
    if len(sizes) != 2 or not all(1 <= size <= _MOST_GROUP for size in sizes):
        raise fields.error(key, f"is {fields.raw(key)!r}, must be two sizes")
    return sizes[0], sizes[1]


def _unsupported(value: object, *known: object) -> str:
    return f"{value!r} is not supported; supported: {', '.join(map(str, known))}"
