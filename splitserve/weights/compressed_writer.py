"""Quantised matrices as compressed-tensors stores them: the tensors and the config that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from splitserve.quant.matrix import QuantizedMatrix
from splitserve.weights.compressed import SMOOTHING

_FORMATS: Final = {"int4": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
_OFFSET: Final = 8


def stored_tensors(module: str, matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """The tensors that stand for a module's weight, by name.

    Besides those of the format there is `<module>.input_smoothing`, (in,) F32, for a matrix with
    smoothing: the module's input is divided by it. Other readers than this project's do not
    know of it. Raises `ValueError` for what the format cannot hold: an order of the input, zeros
    that are not whole or do not fit.
    """
    if matrix.input_order is not None:
        raise ValueError(f"{module}: a matrix with an order of its input cannot be written")
    pack = _packed if matrix.kind == "int4" else _plain
    tensors = {f"{module}.{name}": tensor for name, tensor in pack(matrix).items()}
    tensors[f"{module}.weight_scale"] = matrix.scales.float()
    if matrix.input_scale is not None:
        tensors[f"{module}.input_scale"] = torch.tensor([matrix.input_scale])
    if matrix.smoothing is not None:
        tensors[f"{module}.{SMOOTHING}"] = matrix.smoothing.float()
    return tensors


@dataclass
class CompressedConfig:
    """What config.json has to say of the modules that were written."""

    _modules: dict[str, list[str]] = field(default_factory=dict)
    """Modules by the text of their config group."""
    _plain: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether any module is stored quantised."""
        return bool(self._modules)

    def add(self, module: str, matrix: QuantizedMatrix) -> None:
        """A module that is stored quantised."""
        group = json.dumps(_config_group(matrix), sort_keys=True)
        self._modules.setdefault(group, []).append(module)

    def add_plain(self, module: str) -> None:
        """A module whose weight is stored as plain numbers."""
        self._plain.append(module)

    def to_json(self) -> dict[str, object]:
        """The value of `quantization_config`."""
        groups: dict[str, object] = {}
        formats = set()
        for number, (text, modules) in enumerate(self._modules.items()):
            group = json.loads(text)
            formats.add(group["format"])
            targets: Sequence[str] = ["Linear"] if len(self._modules) == 1 else modules
            groups[f"group_{number}"] = group | {"targets": targets}
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(self._plain),
            "kv_cache_scheme": None,
        }


def _config_group(matrix: QuantizedMatrix) -> dict[str, object]:
    number: dict[str, object] = {"num_bits": 8, "type": "float" if matrix.kind == "fp8" else "int"}
    weights: dict[str, object] = number | {"symmetric": matrix.zeros is None, "dynamic": False}
    if matrix.scales.shape[1] == 1:
        weights |= {"strategy": "channel", "group_size": None}
    else:
        weights |= {"strategy": "group", "group_size": matrix.group_size}
    if matrix.kind == "int4":
        weights["num_bits"] = 4
    inputs: dict[str, object] | None = None
    if matrix.quantizes_input:
        dynamic = matrix.input_scale is None
        strategy = "token" if dynamic else "tensor"
        inputs = number | {"symmetric": True, "dynamic": dynamic, "strategy": strategy}
    return {
        "format": _FORMATS[matrix.kind],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _plain(matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    tensors = {"weight": matrix.codes}
    if matrix.zeros is not None:
        tensors["weight_zero_point"] = _whole(matrix.zeros, -128, 127).to(torch.int8)
    return tensors


def _packed(matrix: QuantizedMatrix) -> dict[str, torch.Tensor]:
    """Codes of 0..15 with zeros are as they are stored; those of -8..7 are moved to 0..15."""
    rows, columns = matrix.shape
    codes, zeros = matrix.codes, matrix.zeros
    if int(codes.min()) < 0 or zeros is None:
        codes = codes + _OFFSET
        zeros = None if zeros is None else zeros + _OFFSET
    if columns % 8 or int(codes.min()) < 0 or int(codes.max()) > 15:
        raise ValueError(f"a matrix of {columns} columns with codes that are not of four bits")
    tensors = {"weight_packed": _words(codes), "weight_shape": torch.tensor([rows, columns])}
    if zeros is not None:
        padded = torch.nn.functional.pad(_whole(zeros, 0, 15), (0, 0, 0, -rows % 8))
        tensors["weight_zero_point"] = _words(padded.to(torch.int8).t()).t().contiguous()
    return tensors


def _words(codes: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of 0..15 to (rows, columns / 8) int32, the first in the lowest bits."""
    pairs = codes.to(torch.uint8).reshape(codes.shape[0], -1, 2)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).contiguous().view(torch.int32)


def _whole(zeros: torch.Tensor, least: int, most: int) -> torch.Tensor:
    if not torch.equal(zeros, zeros.round()) or zeros.min() < least or zeros.max() > most:
        raise ValueError(f"zeros must be whole numbers of {least} to {most} to be written")
    return zeros
