"""The attention kernels on this GPU: right in every type and rule, then timed beside torch's SDPA.

    PYTHONPATH=kernels:. python benchmarks/kernels/attention.py --json out.json

Every check draws fresh inputs over a scattered pool, NaN wherever nothing may be read, and writes
into an output of NaN. Times are medians of replays of a CUDA graph that goes over the layers of a
pool larger than the L2 cache, so launches cost nothing and every layer comes from memory. SDPA
reads keys and values that were made contiguous beforehand, which a paged pool never has.

The floor of a decode is its keys and values, codes and scales, over the bandwidth of a large copy;
that of a prefill its products over the rate of a large bf16 matrix product. Both are measured
first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from splitserve_kernels.paged_decode import paged_decode, paged_decode_reference, plan_decode
from splitserve_kernels.paged_kv import TOLERANCE
from splitserve_kernels.paged_prefill import paged_prefill, paged_prefill_reference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.timing import copy_bytes_per_s, graph_us
from benchmarks.machine import describe_machine
from tests.kernels.paged_cases import learned, make_case, worst_error

BLOCK_TOKENS = 16
POOL_BYTES = 1 << 28
"""Several times the L2 cache."""
GPU = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, INT8 = torch.float8_e4m3fn, torch.int8

TYPES = [(t, c) for t in (BF16, FP16, FP32) for c in (None, FP8, INT8)]
HEADS = [(4, 4, 64), (9, 3, 64), (71, 1, 64), (8, 2, 80), (8, 4, 96), (32, 8, 128), (8, 2, 256)]
RULES: list[dict[str, Any]] = [
    {"scale": 0.2},
    {"window": 100},
    {"window": 1000},
    {"soft_cap": 4.0},
    {"slopes": 1},
    {"sinks": 2},
    {"scale": 0.2, "window": 700, "soft_cap": 5.0, "slopes": 3, "sinks": 4},
]
"""Of slopes and sinks the seed."""


@dataclass(frozen=True)
class Shape:
    """Sequences of (new tokens, the last ones of, tokens in all)."""

    name: str
    chunks: list[tuple[int, int]]
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    codes: torch.dtype | None = None
    rules: dict[str, Any] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one query."""
        return all(count == 1 for count, _ in self.chunks)

    @property
    def layer_bytes(self) -> int:
        """What a decode reads."""
        window = self.rules.get("window", math.inf)
        tokens = sum(int(min(length, window)) for _, length in self.chunks)
        head_bytes = self.head_dim + 2 if self.codes else 2 * self.head_dim
        return 2 * tokens * self.kv_heads * head_bytes

    @property
    def flops(self) -> float:
        """Products of what each query sees."""
        window = self.rules.get("window", math.inf)
        seen = 0.0
        for count, length in self.chunks:
            positions = torch.arange(length - count, length, dtype=torch.float64) + 1
            seen += float(positions.clamp(max=window).sum())
        return 4 * seen * self.heads * self.head_dim


def ragged(sequences: int, mean: int) -> list[tuple[int, int]]:
    """Lengths with a heavy tail, the longest ten times the mean, of the same sum as uniform."""
    generator = torch.Generator().manual_seed(sequences)
    weights = torch.randn(sequences, generator=generator).mul_(1.2).exp_()
    lengths = (weights / weights.sum() * sequences * mean).long().clamp_min_(1)
    lengths[0] += sequences * mean - lengths.sum()
    return [(1, length) for length in lengths.tolist()]


DECODES = [
    Shape("1x1k", [(1, 1024)]),
    Shape("1x8k", [(1, 8192)]),
    Shape("1x32k", [(1, 32768)]),
    Shape("16x1k", [(1, 1024)] * 16),
    Shape("16x4k", [(1, 4096)] * 16),
    Shape("64x1k", [(1, 1024)] * 64),
    Shape("64x1k ragged", ragged(64, 1024)),
    Shape("256x1k", [(1, 1024)] * 256),
    Shape("256x1k ragged", ragged(256, 1024)),
    Shape("64x1k mha", [(1, 1024)] * 64, kv_heads=32),
    Shape("64x1k gptj", [(1, 1024)] * 64, heads=16, kv_heads=16, head_dim=256),
    Shape("128x1k 9/3x64", [(1, 1024)] * 128, heads=9, kv_heads=3, head_dim=64),
    Shape("64x4k fp8", [(1, 4096)] * 64, codes=FP8),
    Shape("64x4k int8", [(1, 4096)] * 64, codes=INT8),
    Shape("64x4k window 1k", [(1, 4096)] * 64, rules={"window": 1024}),
    Shape("64x1k capped", [(1, 1024)] * 64, rules={"soft_cap": 30.0}),
]
PREFILLS = [
    Shape("1x1k", [(1024, 1024)]),
    Shape("1x4k", [(4096, 4096)]),
    Shape("1x8k", [(8192, 8192)]),
    Shape("8x1k", [(1024, 1024)] * 8),
    Shape("1x512 of 8k", [(512, 8192)]),
    Shape("8k beside 60x64", [(8192, 8192)] + [(64, 64)] * 60),
    Shape("1x4k mha", [(4096, 4096)], kv_heads=32),
    Shape("1x4k 9/3x64", [(4096, 4096)], heads=9, kv_heads=3, head_dim=64),
    Shape("1x2k gptj", [(2048, 2048)], heads=16, kv_heads=16, head_dim=256),
    Shape("1x8k window 1k", [(8192, 8192)], rules={"window": 1024}),
    Shape("1x4k capped", [(4096, 4096)], rules={"soft_cap": 30.0}),
    Shape("1x4k fp8", [(4096, 4096)], codes=FP8),
]


def rules_on_gpu(rules: dict[str, Any], heads: int) -> dict[str, Any]:
    made = dict(rules)
    if "slopes" in made:
        made["slopes"] = learned(heads, made["slopes"], "cuda").abs() / 16
    if "sinks" in made:
        made["sinks"] = learned(heads, made["sinks"], "cuda")
    return made


def check(
    kernel: str,
    dtype: torch.dtype,
    codes: torch.dtype | None,
    heads: tuple[int, int, int],
    named: dict[str, Any],
    seed: int,
) -> dict[str, object]:
    counts = [1] * 7 if kernel == "decode" else [1, 16, 33, 300, 257, 200]
    lengths = (
        [1, 0, 16, 17, 500, 2048, 3001] if kernel == "decode" else [1, 16, 100, 300, 1500, 900]
    )
    window = named.get("window", 1 << 20)
    case = make_case(
        lengths,
        rows=sum(counts),
        kv_heads=heads[1],
        group=heads[0] // heads[1],
        head_dim=heads[2],
        dtype=dtype,
        codes=codes,
        seed=seed,
        unread=[max(0, n - c + 1 - window) for c, n in zip(counts, lengths, strict=True)],
        device="cuda",
    )
    rules = {**rules_on_gpu(named, heads[0]), **case.scales}
    errors = []
    if kernel == "decode":
        exact = paged_decode_reference(*case.fixed, **rules)
        for processors in (1, 132):
            plan = plan_decode(
                case.lengths,
                kv_heads=heads[1],
                num_processors=processors,
                window=named.get("window"),
            )
            for _ in range(2):
                out = case.poisoned_out
                paged_decode(*case.fixed, out, plan=plan, **rules)
                errors.append(worst_error(out, exact))
    else:
        starts = torch.tensor([0, *counts], device=GPU).cumsum(0)
        fixed = (*case.fixed[:4], starts, case.lengths)
        exact = paged_prefill_reference(*fixed, **rules)
        news = (
            [{}]
            if codes
            else [{}, new_rows(case.keys, case.values, case.page_table, counts, lengths)]
        )
        for new in news:
            out = case.poisoned_out
            paged_prefill(*fixed, out, **new, **rules)
            errors.append(worst_error(out, exact))
    error = max(errors, key=lambda value: math.inf if math.isnan(value) else value)
    return {
        "kernel": kernel,
        "heads": heads,
        "dtype": str(dtype),
        "codes": str(codes),
        "rules": named,
        "error": error,
        "ok": error <= TOLERANCE[dtype],
    }


def new_rows(
    keys: Tensor, values: Tensor, table: Tensor, counts: list[int], lengths: list[int]
) -> dict[str, Tensor]:
    """What the pool has of all chunks, row by row."""
    pages, slots = [], []
    for own, count, length in zip(table, counts, lengths, strict=True):
        tokens = torch.arange(length - count, length, device=keys.device)
        pages.append(own[tokens // BLOCK_TOKENS])
        slots.append(tokens % BLOCK_TOKENS)
    place = (torch.cat(pages), torch.cat(slots))
    return {"new_keys": keys[place], "new_values": values[place]}


def check_safely(arguments: tuple[Any, ...]) -> dict[str, object]:
    torch.set_num_threads(1)
    try:
        return check(*arguments)
    except Exception as error:
        return {
            "case": str(arguments),
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:400],
        }


def all_checks(seed: int) -> Iterator[tuple[Any, ...]]:
    for kernel in ("prefill", "decode"):
        for (dtype, codes), heads in itertools.product(TYPES, HEADS):
            yield kernel, dtype, codes, heads, {}, seed
        for (dtype, codes), rules in itertools.product(TYPES, RULES):
            if codes is None or dtype != FP32:
                yield kernel, dtype, codes, (32, 8, 128), rules, seed


def run_checks(seed: int, workers: int) -> list[dict[str, object]]:
    """In several processes: nearly all of the time goes into compiling. They are forked from one
    that has imported everything and not touched the GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__"])
    with context.Pool(workers) as pool:
        results = list(pool.imap_unordered(check_safely, all_checks(seed)))
    for entry in results:
        if not entry["ok"]:
            print("WRONG", entry)
    return results


class Inputs:
    """Random queries and a scattered pool of several layers on the GPU."""

    def __init__(self, shape: Shape) -> None:
        lengths = [length for _, length in shape.chunks]
        counts = [count for count, _ in shape.chunks]
        needed = [-(-length // BLOCK_TOKENS) for length in lengths]
        layers = min(64, max(2, -(-POOL_BYTES // shape.layer_bytes))) if shape.is_decode else 2
        order = torch.randperm(sum(needed), device=GPU)
        size = (sum(needed), layers, 2, BLOCK_TOKENS, shape.kv_heads)
        pool = torch.randn((*size, shape.head_dim), device=GPU, dtype=BF16)
        self.scales: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        if shape.codes:
            pool = (pool * 30).to(shape.codes)
            scales = torch.rand((*size, 1), device=GPU, dtype=BF16) / 30
            names = ("key_scales", "value_scales")
            self.scales = [
                {name: scales[:, i, j] for j, name in enumerate(names)} for i in range(layers)
            ]
        self.page_table = torch.zeros((len(lengths), max(needed)), dtype=torch.int64, device=GPU)
        for row, pages in enumerate(needed):
            self.page_table[row, :pages], order = order[:pages], order[pages:]
        self.layers = [(pool[:, i, 0], pool[:, i, 1]) for i in range(layers)]
        self.lengths = torch.tensor(lengths, device=GPU)
        self.starts = torch.tensor([0, *counts], device=GPU).cumsum(0)
        self.queries = torch.randn((sum(counts), shape.heads, shape.head_dim), device=GPU).to(BF16)
        self.out = torch.full_like(self.queries, torch.nan)
        self.new: list[dict[str, Tensor]] = [{} for _ in range(layers)]
        if not shape.is_decode and not shape.codes:
            self.new = [new_rows(k, v, self.page_table, counts, lengths) for k, v in self.layers]

    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's (sequences, kv_heads, tokens, head_dim)."""

        def gather(pool: Tensor) -> Tensor:
            return pool[self.page_table].flatten(1, 2).transpose(1, 2).contiguous()

        return [(gather(keys), gather(values)) for keys, values in self.layers]


def decode_calls(inputs: Inputs, shape: Shape, processors: int) -> list[Callable[[], object]]:
    rules = rules_on_gpu(shape.rules, shape.heads)
    plan = plan_decode(
        inputs.lengths,
        kv_heads=shape.kv_heads,
        num_processors=processors,
        window=shape.rules.get("window"),
    )
    fixed = (inputs.page_table, inputs.lengths, inputs.out)
    return [
        functools.partial(paged_decode, inputs.queries, *kv, *fixed, plan=plan, **scales, **rules)
        for kv, scales in zip(inputs.layers, inputs.scales, strict=True)
    ]


def prefill_calls(inputs: Inputs, shape: Shape) -> list[Callable[[], object]]:
    rules = rules_on_gpu(shape.rules, shape.heads)
    fixed = (inputs.page_table, inputs.starts, inputs.lengths, inputs.out)
    return [
        functools.partial(paged_prefill, inputs.queries, *kv, *fixed, **new, **scales, **rules)
        for kv, new, scales in zip(inputs.layers, inputs.new, inputs.scales, strict=True)
    ]


def sdpa_ms(inputs: Inputs, shape: Shape) -> dict[str, float]:
    """Torch's backends over contiguous inputs, where they can compute the shape."""
    count, length = shape.chunks[0]
    if shape.codes or shape.rules or len(set(shape.chunks)) > 1:
        return {}
    queries = inputs.queries.view(len(shape.chunks), count, shape.heads, -1).transpose(1, 2)
    bias = None if count == 1 else causal_lower_right(count, length)
    contiguous = inputs.contiguous()
    times = {}
    for name, backend in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        causal = {"is_causal": True} if name == "cudnn" and count == length > 1 else {}
        if name == "cudnn" and 1 < count < length:
            continue
        mask = {} if causal else {"attn_mask": bias}
        calls = [
            functools.partial(
                scaled_dot_product_attention, queries, *kv, enable_gqa=True, **mask, **causal
            )
            for kv in contiguous
        ]
        try:
            with sdpa_kernel(backend):
                times[name] = graph_us(calls) / 1e3
        except RuntimeError as error:
            print(f"{shape.name}: {name}: {str(error)[:80]}")
    return times


def ceilings() -> dict[str, float]:
    left, right = (torch.randn(8192, 8192, device=GPU).bfloat16() for _ in range(2))
    product = graph_us([lambda: left @ right])
    return {
        "copy_bytes_per_s": copy_bytes_per_s(),
        "bf16_flop_per_s": 2e6 * 8192**3 / product,
    }


def time_shape(shape: Shape, roof: dict[str, float], processors: int) -> dict[str, object]:
    inputs = Inputs(shape)
    if shape.is_decode:
        calls = decode_calls(inputs, shape, processors)
        amount, rate = shape.layer_bytes, roof["copy_bytes_per_s"]
    else:
        calls = prefill_calls(inputs, shape)
        amount, rate = shape.flops, roof["bf16_flop_per_s"]
    taken = graph_us(calls) / 1e3
    return {
        **asdict(shape),
        "codes": str(shape.codes),
        "kernel_us": taken * 1e3,
        "floor_us": amount / rate * 1e6,
        "measured_over_floor": taken / (amount / rate * 1e3),
        "tera_per_s": amount / taken / 1e9,
        **{f"{name}_us": value * 1e3 for name, value in sdpa_ms(inputs, shape).items()},
    }


def plan_us(sequences: int, processors: int) -> float:
    lengths = torch.full((sequences,), 1024, device=GPU)
    call = functools.partial(plan_decode, lengths, kv_heads=8, num_processors=processors)
    return graph_us([call] * 20)


def show(kind: str, entry: dict[str, Any]) -> str:
    others = " ".join(f"{k}={entry[k]:.1f}" for k in ("flash_us", "cudnn_us") if k in entry)
    ratio = f"{entry['tera_per_s']:7.2f} T/s, {entry['measured_over_floor']:.2f} x floor"
    return f"{kind} {entry['name']:>18}: {entry['kernel_us']:8.1f} us, {ratio} {others}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--workers", type=int, default=14, help="processes of checks, 0 for none")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    properties = torch.cuda.get_device_properties(GPU)
    processors = properties.multi_processor_count
    checks = run_checks(arguments.seed, arguments.workers) if arguments.workers else []
    roof = ceilings()
    print(f"{properties.name}: {roof}")
    result: dict[str, Any] = {
        "machine": describe_machine(),
        "gpu": properties.name,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "seed": arguments.seed,
        "checks": checks,
        "ceilings": roof,
        "plan_us": {str(n): plan_us(n, processors) for n in (1, 64, 256, 1024)},
        "times": {"decode": [], "prefill": []},
    }
    print("plan, us by sequences:", result["plan_us"])
    for kind, shapes in (("decode", DECODES), ("prefill", PREFILLS)):
        for shape in shapes:
            entry = time_shape(shape, roof, processors)
            result["times"][kind].append(entry)
            print(show(kind, entry), flush=True)
    wrong = [entry for entry in checks if not entry["ok"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed")
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
