"""What other quantisers write, packed here one number at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from splitserve.quant.matrix import Weight
from splitserve.weights.hf_matrix import StoredMatrix, find_matrix
from splitserve.weights.quantization import Quantization, read_quantization
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import Headers

MODULE = "model.layers.0.mlp.up_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_along_columns(
    codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """(rows, columns) to (rows, words): place i of a word holds the code `order[i]` of its own."""
    per_word = 32 // bits
    rows, columns = codes.shape
    words = np.zeros((rows, -(-columns // per_word)), np.uint64)
    for word in range(words.shape[1]):
        for place in range(per_word):
            column = word * per_word + (order or range(per_word))[place]
            if column < columns:
                words[:, word] |= codes[:, column].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


@dataclass
class Example:
    """One module's tensors, the config that describes them, and the weight they stand for."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    name: str = f"{MODULE}.weight"
    stack: int = 0
    index: int = 0
    transposed: bool = False

    @property
    def source(self) -> MatrixSource:
        shape = (self.weight.shape[0], self.weight.shape[1])
        return MatrixSource(
            self.name, shape, index=self.index, stack=self.stack, transposed=self.transposed
        )

    def save(self, directory: Path) -> Opened:
        path = directory / "model.safetensors"
        save_file({name: each.contiguous() for name, each in self.tensors.items()}, path)
        (directory / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        return Opened(Headers(path, read_safetensors(path)), read_quantization(directory))


@dataclass
class Opened:
    headers: Headers
    quantization: Quantization | None

    def find(self, source: MatrixSource) -> StoredMatrix:
        return find_matrix(self.headers, self.quantization, source)

    def read(self, source: MatrixSource, dtype: torch.dtype = torch.float32) -> Weight:
        return self.find(source).read(dtype)


def gptq(
    rng: np.random.Generator,
    *,
    bits: int = 4,
    group: int = 16,
    shape: tuple[int, int] = (16, 64),
    act_order: bool = False,
    symmetric: bool = False,
    version: str = "gptq",
) -> Example:
    rows, columns = shape
    size = columns if group == -1 else group
    groups = columns // size
    codes = rng.integers(0, 1 << bits, (rows, columns))
    scales = rng.uniform(0.5, 2, (rows, groups)).astype(np.float16).astype(np.float32)
    middle = 1 << (bits - 1)
    zeros = (
        np.full((rows, groups), middle) if symmetric else rng.integers(0, 1 << bits, (rows, groups))
    )
    g_idx = np.arange(columns) // size
    if act_order:
        g_idx = rng.permutation(g_idx)
    weight = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    stored_zeros = (zeros - 1) % (1 << bits) if version == "gptq" else zeros
    return Example(
        config={"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order,
                "sym": symmetric, "checkpoint_format": version},
        tensors={
            f"{MODULE}.qweight": pack_along_columns(codes, bits).T,
            f"{MODULE}.qzeros": pack_along_columns(stored_zeros.T, bits),
            f"{MODULE}.scales": torch.from_numpy(scales.T.astype(np.float16)),
            f"{MODULE}.g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        },
        weight=torch.from_numpy(weight.astype(np.float32)),
    )  # fmt: skip


def awq(rng: np.random.Generator, *, group: int = 16, shape: tuple[int, int] = (16, 64)) -> Example:
    rows, columns = shape
    groups = columns // group
    codes = rng.integers(0, 16, (rows, columns))
    zeros = rng.integers(0, 16, (rows, groups))
    scales = rng.uniform(0.5, 2, (rows, groups)).astype(np.float16).astype(np.float32)
    each = np.arange(columns) // group
    return Example(
        config={"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
                "zero_point": True, "modules_to_not_convert": None},
        tensors={
            f"{MODULE}.qweight": pack_along_columns(codes.T, 4, AWQ_ORDER),
            f"{MODULE}.qzeros": pack_along_columns(zeros.T, 4, AWQ_ORDER),
            f"{MODULE}.scales": torch.from_numpy(scales.T.astype(np.float16)),
        },
        weight=torch.from_numpy(((codes - zeros[:, each]) * scales[:, each]).astype(np.float32)),
    )  # fmt: skip


def config_group(stored: str, weights: dict[str, Any], inputs: Any = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": stored, "ignore": ["lm_head"],
            "config_groups": {"group_0": group}}  # fmt: skip


def packed(
    rng: np.random.Generator, *, bits: int = 4, group: int = 16, symmetric: bool = False,
    act_order: bool = False, shape: tuple[int, int] = (13, 64),
) -> Example:  # fmt: skip
    rows, columns = shape
    groups = columns // group
    codes = rng.integers(0, 1 << bits, (rows, columns))
    middle = 1 << (bits - 1)
    zeros = (
        np.full((rows, groups), middle) if symmetric else rng.integers(0, 1 << bits, (rows, groups))
    )
    scales = torch.from_numpy(rng.uniform(0.5, 2, (rows, groups))).bfloat16()
    g_idx = np.arange(columns) // group
    if act_order:
        g_idx = rng.permutation(g_idx)
    tensors = {
        f"{MODULE}.weight_packed": pack_along_columns(codes, bits),
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors[f"{MODULE}.weight_zero_point"] = pack_along_columns(zeros.T, bits).T
    if act_order:
        tensors[f"{MODULE}.weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group,
               "symmetric": symmetric}  # fmt: skip
    values = torch.from_numpy((codes - zeros[:, g_idx]).astype(np.float32))
    return Example(
        config_group("pack-quantized", weights), tensors, values * scales.float()[:, g_idx]
    )


def fp8(
    rng: np.random.Generator, *, strategy: str = "channel", static: bool = False,
    shape: tuple[int, int] = (24, 64),
) -> Example:  # fmt: skip
    rows, columns = shape
    codes = torch.from_numpy(rng.normal(size=shape)).to(torch.float8_e4m3fn)
    scale_shape = {"channel": (rows, 1), "tensor": (1,), "block": (3, 4), "group": (rows, 4)}[
        strategy
    ]
    scales = torch.from_numpy(rng.uniform(0.5, 2, scale_shape)).to(torch.float32)
    spread = scales.expand(rows, columns) if strategy in ("channel", "tensor") else (
        scales.repeat_interleave(rows // scale_shape[0], 0).repeat_interleave(16, 1)
    )  # fmt: skip
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scales}
    inputs = {"num_bits": 8, "type": "float", "dynamic": not static, "strategy": "token"}
    if static:
        tensors[f"{MODULE}.input_scale"] = torch.tensor([0.25])
        inputs["strategy"] = "tensor"
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = [8, 16]
    if strategy == "group":
        weights["group_size"] = 16
    return Example(
        config_group("float-quantized", weights, inputs), tensors, codes.float() * spread
    )


def int8(rng: np.random.Generator, *, symmetric: bool = True) -> Example:
    codes = torch.from_numpy(rng.integers(-128, 128, (24, 64)).astype(np.int8))
    scales = torch.from_numpy(rng.uniform(0.5, 2, (24, 1))).bfloat16()
    tensors = {f"{MODULE}.weight": codes, f"{MODULE}.weight_scale": scales}
    zeros = torch.zeros(24, 1)
    if not symmetric:
        tensors[f"{MODULE}.weight_zero_point"] = (codes[:, :1] // 2).contiguous()
        zeros = (codes[:, :1] // 2).float()
    inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": symmetric}
    return Example(
        config_group("int-quantized", weights, inputs),
        tensors,
        (codes.float() - zeros) * scales.float(),
    )


def modelopt(rng: np.random.Generator) -> Example:
    codes = torch.from_numpy(rng.normal(size=(24, 64))).to(torch.float8_e4m3fn)
    tensors = {
        f"{MODULE}.weight": codes,
        f"{MODULE}.weight_scale": torch.tensor(0.5),
        f"{MODULE}.input_scale": torch.tensor(0.125),
        "model.layers.0.self_attn.k_proj.k_scale": torch.tensor(1.0),
    }
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8",
              "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}  # fmt: skip
    return Example(config, tensors, codes.float() * 0.5)


FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def mxfp4(rng: np.random.Generator, *, index: int = 2) -> Example:
    experts, rows, columns = 3, 12, 96
    codes = rng.integers(0, 16, (experts, rows, columns))
    exponents = rng.integers(120, 131, (experts, rows, columns // 32))
    values = np.array(FP4, np.float32)[codes] * np.exp2(exponents - 127.0).repeat(32, axis=2)
    blocks = (codes[:, :, 0::2] | codes[:, :, 1::2] << 4).reshape(experts, rows, columns // 32, 16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return Example(
        config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        tensors={
            f"{name}_blocks": torch.from_numpy(blocks.astype(np.uint8)),
            f"{name}_scales": torch.from_numpy(exponents.astype(np.uint8)),
        },
        weight=torch.from_numpy(values[index].astype(np.float32)),
        name=name,
        stack=experts,
        index=index,
        transposed=True,
    )


EXAMPLES = {
    "gptq": gptq,
    "gptq v2": partial(gptq, version="gptq_v2"),
    "gptq 8 bits": partial(gptq, bits=8),
    "gptq symmetric": partial(gptq, symmetric=True),
    "gptq symmetric 8 bits": partial(gptq, symmetric=True, bits=8),
    "gptq whole rows": partial(gptq, group=-1),
    "gptq act-order": partial(gptq, act_order=True),
    "gptq act-order 8 bits": partial(gptq, act_order=True, bits=8),
    "awq": awq,
    "packed": packed,
    "packed symmetric": partial(packed, symmetric=True),
    "packed 8 bits": partial(packed, bits=8),
    "packed act-order": partial(packed, act_order=True),
    "fp8 channels": fp8,
    "fp8 tensor": partial(fp8, strategy="tensor"),
    "fp8 blocks": partial(fp8, strategy="block"),
    "fp8 groups": partial(fp8, strategy="group"),
    "fp8 static": partial(fp8, static=True),
    "int8": int8,
    "int8 with zeros": partial(int8, symmetric=False),
    "modelopt": modelopt,
    "mxfp4": mxfp4,
}
