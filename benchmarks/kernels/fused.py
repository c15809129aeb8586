"""The fused elementwise kernels on this GPU: right in every type, then timed beside their floor.

    PYTHONPATH=kernels:. python benchmarks/kernels/fused.py --json out.json

Every check draws fresh inputs, compares with the plain torch reference, and starts with memory in
which every byte is 0xFF: NaN in any float. A check's error is in units of what it may be: 1 is the
most. Checks run in processes of their own, so that kernels are compiled side by side.

Times are medians of replays of a CUDA graph of several calls. The floor is the bytes that must be
read and written over the bandwidth of a large copy, measured first. Small inputs stay in the L2
cache, as they do between the kernels of a step, and then it is the launch that counts, not the
floor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import triton
from splitserve_kernels.activation import (
    Activation,
    activate,
    activate_fp8,
    activate_fp8_reference,
    activate_reference,
)
from splitserve_kernels.argmax import argmax_rows
from splitserve_kernels.fp8_rows import quantize_rows_fp8, quantize_rows_fp8_reference
from splitserve_kernels.head_codes import encode_reference
from splitserve_kernels.kv_pages import (
    pack_pages,
    pack_pages_reference,
    unpack_pages,
    unpack_pages_reference,
)
from splitserve_kernels.norm import (
    add_norm,
    add_norm_fp8,
    add_norm_fp8_reference,
    add_norm_reference,
    heads_norm,
    heads_norm_reference,
)
from splitserve_kernels.penalties import forbid, forbid_reference, penalise, penalise_reference
from splitserve_kernels.rotary import (
    rotate_and_store,
    rotate_and_store_codes,
    rotation,
    rotation_reference,
    store_reference,
    turn_reference,
)
from splitserve_kernels.sampling import sample, truncated_reference
from torch import Tensor

from benchmarks.kernels.timing import copy_bytes_per_s, graph_us
from benchmarks.machine import describe_machine

GPU = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn
TYPES = (BF16, FP16, FP32)
ULP = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-23}
VOCAB = 128256
CALLS, PROCESSES = 10, 16

Check = tuple[str, float]
"""A name and an error in units of what it may be."""


# Checks


def poison() -> None:
    """From now on `torch.empty` gives memory full of NaN."""
    plain_empty = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        memory = plain_empty(*args, **kwargs)
        memory.view(torch.uint8).fill_(0xFF)
        return memory

    torch.empty = empty


def draw(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


def off(out: Tensor, exact: Tensor, roundings: float, atol: float = 1e-6) -> float:
    """The largest error, 1 where it is `roundings` units in the last place of the type."""
    ulp = ULP[out.dtype]
    if out.dtype is FP32:
        roundings *= 8  # sums and exponentials in another order, and another way
    wide, right = out.double(), exact.double()
    error = ((wide - right).abs() / (atol + roundings * ulp * right.abs())).max()
    return float("inf") if wide.isnan().any() else float(error)


def codes_off(codes: Tensor, steps: Tensor, expected: Tensor, expected_steps: Tensor) -> float:
    """1 where a step is 2^-6 off, two roundings of bfloat16, or 5% of the codes are not those
    expected, or one is two codes away. All of a row's codes follow its step.
    """
    step_error = ((steps - expected_steps).abs() / expected_steps).max() * 2**6
    number, right = codes.float(), expected.float()
    different = float((number != right).float().mean()) / 0.05
    distance = ((number - right).abs() / (right.abs() * 2**-2).clamp_min(2**-7)).max()
    worst = max(float(step_error), different, float(distance))
    return float("inf") if bool(steps.isnan().any() or number.isnan().any()) else worst


def check_norm(dtype: torch.dtype) -> Iterator[Check]:
    settings = [("rms", False, False), ("rms", True, False), ("layer", False, True)]
    for (kind, wide, biased), width in itertools.product(settings, (4096, 576)):
        name = f"{kind}{'/wide' if wide else ''}/{width}"
        x, delta = draw(37, 2 * width, dtype=dtype)[:, width:], draw(37, width, dtype=dtype)
        weight_type = FP32 if wide else dtype
        weight = 1 + draw(width, dtype=weight_type)
        bias = draw(width, dtype=weight_type) if biased else None
        arguments = (x, delta, weight, bias, 1e-5)
        how: Any = {"kind": kind, "wide_weight": wide}
        total, normed = add_norm(*arguments, **how)
        right_total, right = add_norm_reference(*arguments, **how)
        yield (
            f"add_norm/{name}",
            max(off(normed, right, 2.5, 1e-5), 2.0 * (not torch.equal(total, right_total))),
        )
        if width == 4096:
            _, codes, steps = add_norm_fp8(*arguments, **how)
            yield (
                f"add_norm_fp8/{name}",
                codes_off(codes, steps, *add_norm_fp8_reference(*arguments, **how)[1:]),
            )
    for kind, by_head in (("rms", False), ("layer", True)):
        qkv = draw(33, 48, 128, dtype=dtype)
        weight = draw(40, 128) if by_head else draw(128, dtype=dtype)
        how = {"kind": kind, "wide_weight": by_head}
        right = heads_norm_reference(qkv[:, :40], weight, None, 1e-5, **how)
        out = heads_norm(qkv[:, :40], weight, None, 1e-5, **how)
        yield f"heads_norm/{kind}", off(out, right, 2.5, 1e-5)
    for width in (4096, 28672):
        x = draw(33, width, dtype=dtype)
        x[3] = 0
        yield (
            f"quantize_rows_fp8/{width}",
            codes_off(*quantize_rows_fp8(x), *quantize_rows_fp8_reference(x)),
        )


def check_activation(dtype: torch.dtype) -> Iterator[Check]:
    for name in get_args(Activation):
        gate_up = 3 * draw(33, 28672, dtype=dtype)
        out = activate(gate_up, name, gated=True)
        # Where 1 + erf or 1 + tanh cancels, torch's result has few digits.
        atol = 1e-4 if "gelu" in name else 1e-6
        yield f"activate/{name}", off(out, activate_reference(gate_up, name, gated=True), 4, atol)
    for name, width in (("silu", 28672), ("silu", 50000), ("clamped_swiglu", 5760)):
        gate_up = 3 * draw(33, width, dtype=dtype)
        yield (
            f"activate_fp8/{name}/{width}",
            codes_off(
                *activate_fp8(gate_up, name, gated=True),
                *activate_fp8_reference(gate_up, name, gated=True),
            ),
        )
    x = draw(5, 1001, dtype=dtype)
    right = activate_reference(x, "relu", gated=False)
    yield "activate/relu/ungated", off(activate(x, "relu", gated=False), right, 1)


def pool_of(kv_heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """(pages, layers, 2, block_tokens, kv_heads, width), all bytes 0xFF."""
    return torch.empty((9, 3, 2, 16, kv_heads, width), dtype=dtype, device=GPU)


def check_rotary(dtype: torch.dtype) -> Iterator[Check]:
    inverse = 500000.0 ** -(torch.arange(64, device=GPU) / 64)
    positions = torch.randint(0, 131072, (4000,), device=GPU)
    for interleaved in (False, True):
        made = rotation(positions, inverse, 1.25, dtype, interleaved=interleaved)
        exact = rotation_reference(positions, inverse, 1.25, dtype, interleaved=interleaved)
        error = max(off(a, b, 2.5, 1e-6) for a, b in zip(made, exact, strict=True))
        yield f"rotation/{interleaved}", error
    shapes = [(32, 8, 128, 128, False), (12, 4, 96, 64, True), (71, 1, 64, 64, False)]
    for (heads, kv_heads, size, dims, interleaved), codes in itertools.product(
        shapes, (None, FP8, torch.int8)
    ):
        rows = 70
        qkv = draw(rows, heads + 2 * kv_heads, size, dtype=dtype)
        parts = qkv.split([heads, kv_heads, kv_heads], dim=1)
        turning = rotation_reference(
            positions[:rows], inverse[: dims // 2], 1.0, dtype, interleaved=interleaved
        )
        turned = [turn_reference(x, *turning, interleaved=interleaved) for x in parts[:2]]
        before = parts[2].clone()
        places = torch.randperm(9 * 16, device=GPU)[:rows]
        places[5] = -1
        name = f"{heads}/{kv_heads}/{size}"
        how: Any = {"interleaved": interleaved, "keep_keys": codes is None}
        if codes is None:
            pool, right = pool_of(kv_heads, size, dtype), pool_of(kv_heads, size, dtype)
            rotate_and_store(*parts, *turning, pool[:, 1, 0], pool[:, 1, 1], places, **how)
            store_reference(turned[1], right[:, 1, 0], places)
            store_reference(before, right[:, 1, 1], places)
            error = off(pool.nan_to_num(7.0), right.nan_to_num(7.0), 2, 2 * ULP[dtype])
            error = max(error, off(parts[1], turned[1], 2, 2 * ULP[dtype]))
            yield (
                f"rotate_and_store/{name}",
                max(error, off(parts[0], turned[0], 2, 2 * ULP[dtype])),
            )
            continue
        pool, scales = pool_of(kv_heads, size, codes), pool_of(kv_heads, 1, BF16)
        rotate_and_store_codes(
            *parts, *turning, pool[:, 1, 0], pool[:, 1, 1], scales[:, 1, 0], scales[:, 1, 1],
            places, **how,
        )  # fmt: skip
        error = 0.0
        for i, source in enumerate((turned[1], before)):
            right_codes, right_scales = encode_reference(source, codes)
            live = places >= 0
            where = (places[live] // 16, places[live] % 16)
            stored = pool[:, 1, i].view(torch.uint8)[where].view(codes).float()
            stored *= scales[:, 1, i][where].float()
            wide = (right_codes.float() * right_scales.float())[live]
            lost = (stored - source[live].float()).norm(dim=-1)
            right_lost = (wide - source[live].float()).norm(dim=-1)
            # Equal, but where a rounding tipped which scale is best.
            different = float((stored != wide).float().mean()) / 0.02
            error = max(error, different, float((lost / (right_lost * 1.01 + 1e-6)).max()))
        touched = pool.view(torch.uint8).ne(0xFF).sum() <= 2 * (rows - 1) * kv_heads * size
        yield f"rotate_and_store_codes/{name}/{codes}", error if touched else float("inf")


def check_argmax(dtype: torch.dtype) -> Iterator[Check]:
    for rows in (1, 7, 200, 600):
        logits = draw(rows, VOCAB if rows < 600 else 3000, dtype=dtype)
        logits[0, ::7] = 9  # ties
        right = logits.cpu().argmax(-1)
        yield f"argmax_rows/{rows}", 2.0 * (not torch.equal(argmax_rows(logits).cpu(), right))


def check_sampling(dtype: torch.dtype) -> Iterator[Check]:
    settings = list(
        itertools.product((0.3, 1.0, 2.0), (0, 1, 41, 5003), (1.0, 0.9, 0.3), (0.0, 0.05))
    )
    for spread in (0.0, 0.1, 2.5, 8.0):
        logits = (draw(len(settings), VOCAB) * spread).to(dtype)
        if not spread:  # so many are equal that no list holds them; no p * k is a whole number
            logits = torch.randint(-1, 3, logits.shape, device=GPU).to(dtype)
        logits[:, ::5] = -torch.inf
        columns = [torch.tensor(column, device=GPU) for column in zip(*settings, strict=True)]
        uniforms = torch.rand(len(settings), dtype=torch.float64, device=GPU)
        tokens = sample(logits, columns[0], columns[1].int(), columns[2], columns[3], uniforms)
        worst = 0.0
        for i, token in enumerate(tokens.tolist()):
            how = (float(column[i]) for column in columns)
            shares = truncated_reference(logits[i], *how)
            ends = shares.cumsum(-1) / shares.sum()
            below = float(ends[token - 1]) if token else 0.0
            outside = max(below - float(uniforms[i]), float(uniforms[i]) - float(ends[token]))
            worst = max(worst, outside)
        # Of many equal tokens rounding may keep one more or one less: of the 12,000 or 17,000 that
        # p = 0.3 keeps at a temperature of 1 or 2 that is 8e-5 or 6e-5. Else it moves a boundary.
        yield f"sample/{spread}", worst / (2e-5 if spread else 1e-4)
    zeros = torch.zeros(50, device=GPU)
    logits = draw(50, VOCAB, dtype=dtype)
    tokens = sample(logits, zeros, zeros.int(), zeros + 1, zeros, zeros)
    yield "sample/greedy", 2.0 * (not torch.equal(tokens.cpu(), logits.cpu().argmax(-1)))


def lists_for(rows: int, count: int) -> tuple[Tensor, ...]:
    """Starts, distinct tokens and counts, up to `count` tokens a row."""
    lengths = torch.randint(0, count + 1, (rows,))
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
    tokens = torch.cat([torch.randperm(VOCAB)[:n] for n in lengths.tolist()]).int()
    counts = torch.randint(0, 4, tokens.shape).int()
    return starts.to(GPU), tokens.to(GPU), counts.to(GPU)


def check_penalties(dtype: torch.dtype) -> Iterator[Check]:
    rows = 9
    logits = draw(rows, VOCAB, dtype=dtype)
    right = logits.clone()
    starts, tokens, counts = lists_for(rows, 3000)
    penalties = (torch.rand(rows, device=GPU) + 0.5, draw(rows), draw(rows))
    newest = torch.randint(0, VOCAB, (rows,), device=GPU)
    newest[0], newest[1] = -1, tokens[starts[1]]
    penalise(logits, starts, tokens, counts, *penalties, newest)
    penalise_reference(right, starts, tokens, counts, *penalties, newest)
    yield "penalise", off(logits, right, 2)
    forbid(logits, starts, tokens)
    forbid_reference(right, starts, tokens)
    yield "forbid", 2.0 * (not torch.equal(logits.isneginf(), right.isneginf()))


def check_pages(_: torch.dtype) -> Iterator[Check]:
    for page_bytes, first, end in ((1 << 20, 4096, 1 << 19), (5000, 8, 3004), (777, 1, 700)):
        pool = torch.randint(0, 256, (40, page_bytes), dtype=torch.uint8, device=GPU)
        pages = torch.randperm(40, device=GPU)[:13]
        out, right = (torch.empty((13, end - first), dtype=torch.uint8, device=GPU) for _ in "ab")
        pack_pages(pool, pages, first, end, out)
        pack_pages_reference(pool, pages, first, end, right)
        same = torch.equal(out, right)
        filled = pool.clone()
        rows = out.flip(0).contiguous()
        unpack_pages(pool, pages, first, end, rows)
        unpack_pages_reference(filled, pages, first, end, rows)
        yield f"pages/{page_bytes}", 2.0 * (not (same and torch.equal(pool, filled)))


FAMILIES: dict[str, Callable[[torch.dtype], Iterator[Check]]] = {
    "sampling": check_sampling,
    "rotary": check_rotary,
    "norm": check_norm,
    "activation": check_activation,
    "argmax": check_argmax,
    "penalties": check_penalties,
    "pages": check_pages,
}


def run_family(family: str, dtype: torch.dtype, seed: int) -> list[dict[str, object]]:
    """One family's checks in one type; what is raised is a check that failed."""
    torch.manual_seed(seed)
    poison()
    results: list[dict[str, object]] = []
    try:
        for name, error in FAMILIES[family](dtype):
            results.append({"check": name, "dtype": str(dtype), "error": error, "ok": error <= 1})
    except Exception:
        failed = {"check": family, "dtype": str(dtype), "error": None, "ok": False}
        results.append({**failed, "raised": traceback.format_exc()[-3000:]})
    return results


def run_checks(seed: int) -> list[dict[str, object]]:
    tasks = [
        (family, dtype) for family in FAMILIES for dtype in (TYPES if family != "pages" else [BF16])
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        futures = [pool.submit(run_family, *task, seed + i) for i, task in enumerate(tasks)]
        results = [entry for future in futures for entry in future.result()]
    for entry in results:
        verdict = "PASS" if entry["ok"] else "FAIL"
        print(f"{verdict} {entry['check']:<44} {entry['dtype']:<15} {entry['error']}", flush=True)
        if "raised" in entry:
            print(entry["raised"])
    return results


# Times


def host_us(call: Callable[[], object]) -> float:
    """Microseconds that one eager launch takes of the host."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        call()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / 50 * 1e6


def cases(rows: int) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Names, calls and the bytes that each must move, in bf16."""
    width, heads, kv_heads, size = 4096, 32, 8, 128
    x, delta, weight = draw(rows, width, dtype=BF16), draw(rows, width, dtype=BF16), draw(width)
    plain: Any = {"kind": "rms", "wide_weight": False}
    narrow = weight.to(BF16)
    yield "add_norm", lambda: add_norm(x, delta, narrow, None, 1e-5, **plain), 4 * x.nbytes
    yield (
        "add_norm_fp8",
        lambda: add_norm_fp8(x, delta, narrow, None, 1e-5, **plain),
        x.nbytes * 7 // 2,
    )
    yield "quantize_rows_fp8", lambda: quantize_rows_fp8(x), x.nbytes * 3 // 2

    gate_up = draw(rows, 28672, dtype=BF16)
    yield "activate", lambda: activate(gate_up, "silu", gated=True), gate_up.nbytes * 3 // 2
    fp8_bytes = gate_up.nbytes * 5 // 4
    yield "activate_fp8", lambda: activate_fp8(gate_up, "silu", gated=True), fp8_bytes

    qkv = draw(rows, heads + 2 * kv_heads, size, dtype=BF16)
    parts = qkv.split([heads, kv_heads, kv_heads], dim=1)
    positions = torch.randint(0, 4096, (rows,), device=GPU)
    inverse = torch.rand(64, device=GPU)
    made = rotation(positions, inverse, 1.0, BF16, interleaved=False)
    yield (
        "rotation",
        lambda: rotation(positions, inverse, 1.0, BF16, interleaved=False),
        2 * made[0].nbytes,
    )
    pages = -(-rows // 16) + 3
    places = torch.randperm(pages * 16, device=GPU)[:rows]
    pool = torch.zeros((pages, 2, 16, kv_heads, size), dtype=BF16, device=GPU)
    turn_bytes = 2 * qkv.nbytes + 2 * made[0].nbytes
    yield (
        "rotate_and_store",
        lambda: rotate_and_store(*parts, *made, pool[:, 0], pool[:, 1], places),
        turn_bytes,
    )
    codes = torch.zeros((pages, 2, 16, kv_heads, size), dtype=FP8, device=GPU)
    scales = torch.zeros((pages, 2, 16, kv_heads, 1), dtype=BF16, device=GPU)
    sections = (codes[:, 0], codes[:, 1], scales[:, 0], scales[:, 1])
    yield (
        "rotate_and_store_codes/fp8",
        lambda: rotate_and_store_codes(*parts, *made, *sections, places),
        turn_bytes - 2 * rows * kv_heads * size,
    )
    head_weight = draw(size, dtype=BF16)
    keyed = qkv[:, : heads + kv_heads]
    yield (
        "heads_norm",
        lambda: heads_norm(keyed, head_weight, None, 1e-5, **plain),
        2 * rows * (heads + kv_heads) * size * 2,
    )
    if rows > 256:
        return
    logits = draw(rows, VOCAB)
    yield "argmax_rows", lambda: argmax_rows(logits), logits.nbytes
    ones = torch.ones(rows, device=GPU)
    uniforms = torch.rand(rows, dtype=torch.float64, device=GPU)
    for name, k, p, m in (
        ("plain", 0, 1.0, 0.0),
        ("top_k", 50, 1.0, 0.0),
        ("top_p", 0, 0.9, 0.0),
        ("both", 50, 0.9, 0.0),
        ("min_p", 0, 1.0, 0.1),
    ):
        settings = (ones, (ones * k).int(), ones * p, ones * m, uniforms)
        # Only the launches that these need, as the engine does.
        any_of: Any = {"any_top_k_or_p": k > 0 or p < 1.0, "any_min_p": m > 0.0}
        call = partial(sample, logits, *settings, **any_of)
        yield f"sample/{name}", call, logits.nbytes
    # What a model is sure of: some tens of tokens have 90%. Then what it is most unsure of.
    top_p = (ones, (ones * 0).int(), ones * 0.9, ones * 0, uniforms)
    peaked, even = logits * 5, torch.rand_like(logits) * 10
    yield "sample/top_p/peaked", lambda: sample(peaked, *top_p), logits.nbytes
    yield "sample/top_p/even", lambda: sample(even, *top_p), logits.nbytes
    lists = lists_for(rows, 2000)
    penalties = (ones * 1.0001, ones * 0, ones * 0)
    listed = len(lists[1])
    yield "penalise", lambda: penalise(logits, *lists, *penalties), 16 * listed
    if rows == 64:
        page_pool = torch.zeros((96, 1 << 21), dtype=torch.uint8, device=GPU)
        numbers = torch.randperm(96, device=GPU)[:rows]
        buffer = torch.zeros((rows, 1 << 19), dtype=torch.uint8, device=GPU)
        span = (1 << 20, (1 << 20) + (1 << 19))
        yield (
            "pack_pages",
            lambda: pack_pages(page_pool, numbers, *span, buffer),
            2 * buffer.nbytes,
        )


def time_all(bytes_per_us: float) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    for rows in (1, 64, 256, 4096):
        for name, call, size in cases(rows):
            taken, floor = graph_us([call] * CALLS), size / bytes_per_us
            entry = {"kernel": name, "rows": rows, "us": taken, "floor_us": floor}
            if rows == 64:
                entry["host_us"] = host_us(call)
            results.append({**entry, "ratio": taken / floor})
            host = f" host {entry['host_us']:6.1f} us" if rows == 64 else ""
            print(
                f"{name:<28} {rows:>5} rows {taken:9.2f} us  floor {floor:9.2f} us  "
                f"{taken / floor:7.2f} x{host}",
                flush=True,
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    arguments = parser.parse_args()
    began = time.perf_counter()
    checks = run_checks(arguments.seed)
    took = time.perf_counter() - began
    failed = [entry for entry in checks if not entry["ok"]]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {took:.0f} s", flush=True)
    torch.manual_seed(arguments.seed)
    bytes_per_us = copy_bytes_per_s() / 1e6
    print(f"{torch.cuda.get_device_name()}: copies {bytes_per_us / 1e6:.2f} TB/s")
    times = time_all(bytes_per_us)
    print(f"{time.perf_counter() - began:.0f} s in all")
    if arguments.json:
        result = {
            "machine": describe_machine(),
            "gpu": torch.cuda.get_device_name(),
            "triton": triton.__version__,
            "seed": arguments.seed,
            "copy_bytes_per_us": bytes_per_us,
            "checks": checks,
            "times": times,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
