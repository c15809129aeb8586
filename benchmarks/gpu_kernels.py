"""The attention kernels on this GPU: right in every type, then timed beside torch's SDPA.

    python benchmarks/gpu_kernels.py --json out.json

Every check draws fresh inputs over a scattered pool, NaN wherever nothing may be read, and writes
into an output of NaN. Times are medians of replays of a CUDA graph that goes over the layers of a
pool larger than the L2 cache, so launches cost nothing and every layer comes from memory. SDPA
reads keys and values that were made contiguous beforehand, which a paged pool never has; `gathered`
is SDPA with that copy, what the engine would do without these kernels. The two ceilings, a large
copy and a large matrix product, are measured first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from machine import describe_machine
from splitserve_kernels.paged_decode import choose_splits, paged_decode, paged_decode_reference
from splitserve_kernels.paged_kv import TOLERANCE
from splitserve_kernels.paged_prefill import paged_prefill, paged_prefill_reference
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

BLOCK_TOKENS, LAYERS, REPLAYS = 16, 4, 15
GPU = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    """`count` new tokens in each sequence, the last ones of `context`."""

    sequences: int
    count: int
    context: int
    heads: int
    kv_heads: int
    head_dim: int


DECODES = [
    Shape(1, 1, 32768, 32, 8, 128),
    Shape(16, 1, 4096, 32, 8, 128),
    Shape(64, 1, 2048, 32, 8, 128),
    Shape(128, 1, 1024, 9, 3, 64),
]
PREFILLS = [
    Shape(1, 4096, 4096, 32, 8, 128),
    Shape(8, 1024, 1024, 32, 8, 128),
    Shape(1, 512, 8192, 32, 8, 128),
    Shape(1, 4096, 4096, 9, 3, 64),
]
HEADS = [(4, 4, 64), (9, 3, 64), (8, 2, 80), (32, 4, 128), (8, 2, 256)]


class Inputs:
    """Random queries and a scattered pool on the GPU."""

    def __init__(
        self, lengths: list[int], rows: int, shape: Shape, dtype: torch.dtype, *, layers: int = 1
    ) -> None:
        needed = [-(-length // BLOCK_TOKENS) for length in lengths]
        num_pages = sum(needed) + 7
        size = (num_pages, layers, 2, BLOCK_TOKENS, shape.kv_heads, shape.head_dim)
        pool = torch.full(size, torch.nan, dtype=dtype, device=GPU)
        order = torch.randperm(num_pages, device=GPU)
        # What is left over stays NaN, and pads the table.
        self.page_table = order[-1].repeat(len(lengths), max(needed))
        for row, (length, pages) in enumerate(zip(lengths, needed, strict=True)):
            own, order = order[:pages], order[pages:]
            self.page_table[row, :pages] = own
            pool[own] = torch.randn((pages, *size[1:]), device=GPU).to(dtype)
            pool[own[-1], :, :, length - (pages - 1) * BLOCK_TOKENS :] = torch.nan
        self.layers = [(pool[:, i, 0], pool[:, i, 1]) for i in range(layers)]
        self.lengths = torch.tensor(lengths, device=GPU)
        self.queries = torch.randn((rows, shape.heads, shape.head_dim), device=GPU).to(dtype)
        self.out = torch.full_like(self.queries, torch.nan)

    def contiguous(self) -> list[tuple[Tensor, Tensor]]:
        """Each layer's (sequences, kv_heads, tokens, head_dim); all lengths are whole pages."""
        return [(self.gather(keys), self.gather(values)) for keys, values in self.layers]

    def gather(self, pool: Tensor) -> Tensor:
        """One layer's keys or values: (sequences, kv_heads, tokens, head_dim), contiguous."""
        return pool[self.page_table].flatten(1, 2).transpose(1, 2).contiguous()


def worst_error(out: Tensor, exact: Tensor) -> float:
    return float(((out.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


def check_decode(heads: tuple[int, int, int], dtype: torch.dtype, num_splits: int) -> float:
    lengths = [1, 16, 17, 500, 2048, 3001]
    inputs = Inputs(lengths, len(lengths), Shape(0, 1, 0, *heads), dtype)
    fixed = (inputs.queries, *inputs.layers[0], inputs.page_table, inputs.lengths)
    paged_decode(*fixed, inputs.out, num_splits=num_splits)
    return worst_error(inputs.out, paged_decode_reference(*fixed))


def check_prefill(heads: tuple[int, int, int], dtype: torch.dtype) -> float:
    counts = [1, 16, 33, 300, 257]
    lengths = [1, 16, 100, 300, 1500]
    inputs = Inputs(lengths, sum(counts), Shape(0, 1, 0, *heads), dtype)
    starts = torch.tensor([0, *counts], device=GPU).cumsum(0)
    fixed = (inputs.queries, *inputs.layers[0], inputs.page_table, starts, inputs.lengths)
    paged_prefill(*fixed, inputs.out, max_queries=max(counts))
    return worst_error(inputs.out, paged_prefill_reference(*fixed))


def check_all() -> list[dict[str, object]]:
    results = []
    for dtype, heads in itertools.product(TOLERANCE, HEADS):
        errors = {f"decode/{n}": check_decode(heads, dtype, n) for n in (1, 7, 64)}
        errors["prefill"] = check_prefill(heads, dtype)
        for kernel, error in errors.items():
            ok = error <= TOLERANCE[dtype]
            entry = {
                "kernel": kernel,
                "heads": heads,
                "dtype": str(dtype),
                "error": error,
                "ok": ok,
            }
            results.append(entry)
            if not ok:
                print("WRONG", entry)
    return results


def graph_ms(calls: list[Callable[[], object]]) -> float:
    """Milliseconds a call: the median replay of a graph of all `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return statistics.median(times[3:])


def host_us(call: Callable[[], object]) -> float:
    """Microseconds that one eager launch takes of the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / 50 * 1e6


def time_shape(shape: Shape, dtype: torch.dtype, processors: int) -> dict[str, object]:
    """Times of one shape. Bytes: keys and values once. Operations: what causality leaves."""
    inputs = Inputs(
        [shape.context] * shape.sequences,
        shape.sequences * shape.count,
        shape,
        dtype,
        layers=LAYERS,
    )
    fixed = (inputs.page_table, inputs.lengths, inputs.out)
    if shape.count == 1:
        splits = choose_splits(shape.sequences, shape.kv_heads, shape.context, processors)

        def kernel(keys: Tensor, values: Tensor) -> None:
            paged_decode(inputs.queries, keys, values, *fixed, num_splits=splits)
    else:
        starts = torch.arange(shape.sequences + 1, device=GPU) * shape.count
        table, lengths, out = fixed

        def kernel(keys: Tensor, values: Tensor) -> None:
            queries, most = inputs.queries, shape.count
            paged_prefill(queries, keys, values, table, starts, lengths, out, max_queries=most)

    bias = None if shape.count == 1 else causal_lower_right(shape.count, shape.context)
    queries = inputs.queries.view(shape.sequences, shape.count, shape.heads, -1).transpose(1, 2)

    def sdpa(keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=True)

    def gathered(keys: Tensor, values: Tensor) -> Tensor:
        return sdpa(inputs.gather(keys), inputs.gather(values))

    times = {
        "kernel_ms": graph_ms([lambda kv=kv: kernel(*kv) for kv in inputs.layers]),
        "sdpa_ms": graph_ms([lambda kv=kv: sdpa(*kv) for kv in inputs.contiguous()]),
        "gathered_ms": graph_ms([lambda kv=kv: gathered(*kv) for kv in inputs.layers]),
    }
    seen = shape.count * (shape.context - (shape.count - 1) / 2) * shape.sequences
    flops = 4 * seen * shape.heads * shape.head_dim
    size = 2 * shape.sequences * shape.context * shape.kv_heads * shape.head_dim * dtype.itemsize
    return {
        **asdict(shape),
        "dtype": str(dtype),
        **times,
        "host_us": host_us(lambda: kernel(*inputs.layers[0])),
        "kernel_gb_per_s": size / times["kernel_ms"] / 1e6,
        "kernel_tflop_per_s": flops / times["kernel_ms"] / 1e9,
        "sdpa_gb_per_s": size / times["sdpa_ms"] / 1e6,
        "sdpa_tflop_per_s": flops / times["sdpa_ms"] / 1e9,
    }


def ceilings() -> dict[str, float]:
    source = torch.randn(1 << 29, device=GPU)
    target = torch.empty_like(source)
    copy = graph_ms([lambda: target.copy_(source)])
    left, right = (torch.randn(8192, 8192, device=GPU).bfloat16() for _ in range(2))
    product = graph_ms([lambda: left @ right])
    return {
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e6,
        "bf16_tflop_per_s": 2 * 8192**3 / product / 1e9,
    }


def show(entry: dict[str, object]) -> str:
    names = ("sequences", "count", "context", "heads", "kv_heads", "head_dim")
    shape = "/".join(str(entry[name]) for name in names)
    numbers = {k: v for k, v in entry.items() if isinstance(v, float)}
    return f"{shape:>26} " + " ".join(f"{k}={v:.4g}" for k, v in numbers.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    properties = torch.cuda.get_device_properties(GPU)
    result: dict[str, object] = {
        "machine": describe_machine(),
        "gpu": properties.name,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "seed": arguments.seed,
    }
    checks = check_all()
    result["checks"] = checks
    result["ceilings"] = ceilings()
    print(f"{properties.name}: {result['ceilings']}")
    processors = properties.multi_processor_count
    times = [time_shape(s, torch.bfloat16, processors) for s in DECODES + PREFILLS]
    result["times"] = times
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for entry in times:
        print(show(entry))
    wrong = [entry for entry in checks if not entry["ok"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
