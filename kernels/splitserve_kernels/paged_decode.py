"""Attention of one query a sequence over a paged pool, in equal runs.

Programs take the runs of a `DecodePlan`: pieces of sequences, each for the query heads of one KV
head, which share a tile so that keys and values are read once. Where several programs share a head
of a sequence, as in Flash-Decoding (Dao, Haziza, Massa, Sizov 2023), each leaves its state, and the
last one to finish merges them in order, so that the result does not depend on who that is. The
launch grid depends on shapes alone, never on lengths, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.paged_kv import check_pool, gather, scale_strides, tile_dim
from splitserve_kernels.paged_plan import UNIT_TOKENS, DecodePlan, plan_decode, seen_range
from splitserve_kernels.paged_rules import (
    LEAST,
    finish,
    load_learned,
    load_query,
    reference_rows,
    score_numbers,
)
from splitserve_kernels.paged_tokens import PLAIN, as_words, attend_pages

__all__ = ["DecodePlan", "paged_decode", "paged_decode_reference", "plan_decode"]


def paged_decode(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    out: Tensor,
    *,
    plan: DecodePlan,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write the mixed values of each sequence's one query into `out`.

    queries, out: (sequences, heads, head_dim), contiguous in the last dimension
    keys, values, key_scales, value_scales, page_table: see `paged_kv`
    lengths: (sequences,) int32 or int64, tokens to attend to; 0 gives zeros
    plan: `plan_decode` of these lengths, with this window
    scale: of the products, default head_dim**-0.5
    window: how many tokens a query sees, its own included
    soft_cap: scores are soft_cap * tanh(score / soft_cap)
    slopes: (heads,) fp32, times the key's position less the query's is added to scores
    sinks: (heads,) fp32, scores that take part in the softmax and have no value

    Raises `ValueError` for shapes, types and numbers that do not go together.
    """
    check_pool(queries, keys, values, page_table, out, key_scales, value_scales)
    sequences, heads, head_dim = queries.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    numbers = score_numbers(heads, head_dim, scale, window, soft_cap, slopes, sinks)
    if plan.window != window or plan.arrivals.shape != (sequences, kv_heads):
        raise ValueError(
            f"the plan is for window {plan.window} and {tuple(plan.arrivals.shape)} sequences and "
            f"KV heads, not for {window} and {(sequences, kv_heads)}"
        )
    keys, codes = as_words(keys)
    values, _ = as_words(values)
    # Two states a program: of the piece that begins its run, and of another that ends it.
    states = (plan.programs, 2, group)
    mixed = torch.empty((*states, head_dim), dtype=torch.float32, device=out.device)
    sums = torch.empty((*states, 2), dtype=torch.float32, device=out.device)
    tile_group, dim = int(triton.next_power_of_2(group)), tile_dim(head_dim)
    early = launches_early(queries.device)
    _attend_run[(plan.programs,)](
        queries,
        keys,
        values,
        key_scales,
        value_scales,
        slopes,
        sinks,
        page_table,
        lengths,
        out,
        plan.begins,
        plan.arrivals,
        mixed,
        sums,
        numbers.score_scale,
        numbers.soft_cap,
        window,
        sequences,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        *scale_strides(key_scales),
        page_table.stride(0),
        out.stride(0),
        out.stride(1),
        KV_HEADS=kv_heads,
        GROUP=group,
        CODES=codes,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=keys.shape[1],
        UNIT_TOKENS=UNIT_TOKENS,
        TILE_ROWS=max(16, tile_group),
        TILE_GROUP=tile_group,
        TILE_DIM=dim,
        TILE_STATES=max(1, min(16, 8192 // (tile_group * dim))),
        **_tiles(dim, queries.element_size(), codes != PLAIN.value),
        EARLY=early,
        launch_pdl=early,
    )


def paged_decode_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, a sequence at a time: (sequences, heads, head_dim) in fp32."""
    out = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for i, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        first = 0 if window is None else max(0, length - window)
        seen = (page_table[i], first, length, queries.shape[1])
        out[i : i + 1] = reference_rows(
            queries[i : i + 1],
            gather(keys, key_scales, *seen),
            gather(values, value_scales, *seen),
            torch.arange(first - length + 1, 1, device=queries.device)[None],
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            slopes=slopes,
            sinks=sinks,
        )
    return out


def _tiles(dim: int, element_size: int, is_coded: bool) -> dict[str, int]:
    """Tiles of 16 KiB of keys, two of them and of their values under way, for each of two programs
    a processor. For heads of 128 in 16 bits within 2% of the fastest of fifteen on an H100. Codes:
    of as many bytes.
    """
    tokens = min(128, max(16, 16384 // (dim * element_size)))
    if is_coded:
        tokens = min(128, 2 * tokens)
    return {"TILE_TOKENS": tokens, "STAGES": 3, "num_warps": 4}


@triton.jit(do_not_specialize=["table_stride", "window", "sequences"])
def _attend_run(
    # pointers
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slopes: tl.tensor,
    sinks: tl.tensor,
    page_table: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    begins: tl.tensor,
    arrivals: tl.tensor,
    states: tl.tensor,
    state_sums: tl.tensor,
    # numbers
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    window: tl.tensor,
    sequences: tl.tensor,
    # strides, in elements
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_page_stride: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_page_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    scale_token_stride: tl.tensor,
    scale_head_stride: tl.tensor,
    table_stride: tl.tensor,
    out_stride: tl.tensor,
    out_head_stride: tl.tensor,
    # constants
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    UNIT_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_STATES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One run: pieces of (sequence, KV head) pairs, the first and the last maybe shared."""
    if EARLY:
        wait_for_the_kernel_before()
    program = tl.program_id(0)
    sequence = tl.load(begins + program * 4)
    before = tl.load(begins + program * 4 + 1)
    length = tl.load(begins + program * 4 + 2)
    run = tl.load(begins + program * 4 + 3)
    begin = program * run
    rows = tl.arange(0, TILE_ROWS)
    own = rows < GROUP
    dims = tl.arange(0, TILE_DIM)

    at = begin
    while (at < begin + run) & (sequence < sequences):
        least, origin, units = seen_range(length, window, UNIT_TOKENS)
        # Where on the line the (sequence, KV head) pair begins, and where in it the piece.
        kv_head = (at - before * KV_HEADS) // (units + 1)
        pair_at = before * KV_HEADS + kv_head * (units + 1)
        unit = at - pair_at
        count = tl.minimum(units - unit, begin + run - at)
        if count > 0:
            wide_sequence = sequence.to(tl.int64)
            heads = kv_head * GROUP + rows
            query_rows = wide_sequence * query_stride + heads * query_head_stride
            q, row_scale = load_query(queries, query_rows, own, CODES != PLAIN, HEAD_DIM, TILE_DIM)
            row_slopes = load_learned(slopes, heads, own) if slopes is not None else None
            head_key_scales = key_scales
            head_value_scales = value_scales
            if CODES != PLAIN:
                head_key_scales = key_scales + kv_head * scale_head_stride
                head_value_scales = value_scales + kv_head * scale_head_stride
            peak, total, mixed = attend_pages(
                tl.full([TILE_ROWS], LEAST, tl.float32),
                tl.zeros([TILE_ROWS], tl.float32),
                tl.zeros([TILE_ROWS, TILE_DIM], tl.float32),
                q,
                row_scale,
                tl.zeros([TILE_ROWS], tl.int32) + (length - 1),
                score_scale,
                soft_cap,
                row_slopes,
                None,
                tl.maximum(origin + unit * UNIT_TOKENS, least),
                tl.minimum(origin + (unit + count) * UNIT_TOKENS, length),
                least,
                page_table + wide_sequence * table_stride,
                keys + kv_head * key_head_stride,
                values + kv_head * value_head_stride,
                head_key_scales,
                head_value_scales,
                key_page_stride,
                key_token_stride,
                value_page_stride,
                value_token_stride,
                scale_page_stride,
                scale_token_stride,
                MASKED=True,
                CAUSAL=False,
                CODES=CODES,
                HEAD_DIM=HEAD_DIM,
                BLOCK_TOKENS=BLOCK_TOKENS,
                TILE_TOKENS=TILE_TOKENS,
                TILE_DIM=TILE_DIM,
                STAGES=STAGES,
            )

            inside = own[:, None] & (dims < HEAD_DIM)[None, :]
            head_out = out + wide_sequence * out_stride + kv_head * GROUP * out_head_stride
            if count == units:
                row_sinks = load_learned(sinks, heads, own) if sinks is not None else None
                result = finish(peak, total, mixed, row_sinks).to(out.dtype.element_ty)
                tl.store(
                    head_out + rows[:, None] * out_head_stride + dims[None, :], result, mask=inside
                )
            else:
                slot = program * 2 + (at > begin).to(tl.int32)
                state_rows = slot * GROUP + rows
                tl.store(state_sums + state_rows * 2, peak, mask=own)
                tl.store(state_sums + state_rows * 2 + 1, total, mask=own)
                state_places = state_rows[:, None] * HEAD_DIM + dims[None, :]
                tl.store(states + state_places, mixed, mask=inside)
                # Every thread's part is written before the program arrives.
                tl.debug_barrier()
                arrival = arrivals + sequence * KV_HEADS + kv_head
                first_program = pair_at // run
                sharing = (pair_at + units - 1) // run - first_program + 1
                if tl.atomic_add(arrival, 1, sem="acq_rel") == sharing - 1:
                    _merge(
                        states,
                        state_sums,
                        sinks,
                        head_out,
                        kv_head,
                        first_program,
                        sharing,
                        (pair_at > first_program * run).to(tl.int32),
                        out_head_stride,
                        GROUP=GROUP,
                        HEAD_DIM=HEAD_DIM,
                        TILE_GROUP=TILE_GROUP,
                        TILE_DIM=TILE_DIM,
                        TILE_STATES=TILE_STATES,
                    )
                    tl.store(arrival, 0)

        # Past the unit for the time between, if the pair is done.
        done = unit + count == units
        at += count + done.to(tl.int32)
        if done & (kv_head == KV_HEADS - 1):
            before += units + 1
            sequence += 1
            length = tl.load(lengths + sequence, mask=sequence < sequences, other=0).to(tl.int32)


@triton.jit
def _merge(
    # pointers
    states: tl.tensor,
    state_sums: tl.tensor,
    sinks: tl.tensor,
    head_out: tl.tensor,
    # numbers
    kv_head: tl.tensor,
    first_program: tl.tensor,
    sharing: tl.tensor,
    first_slot: tl.tensor,
    # strides, in elements
    out_head_stride: tl.tensor,
    # constants
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_STATES: tl.constexpr,
) -> None:
    """Merge the states of `sharing` programs into the result of one (sequence, KV head) pair.

    Of the first program it is the state in `first_slot`, of the others in slot 0. Other programs
    wrote them in this launch: read from the L2 cache.
    """
    rows = tl.arange(0, TILE_GROUP)
    dims = tl.arange(0, TILE_DIM)
    own = rows < GROUP
    inside = own[:, None] & (dims < HEAD_DIM)[None, :]
    peak = tl.full([TILE_GROUP], LEAST, tl.float32)
    total = tl.zeros([TILE_GROUP], tl.float32)
    mixed = tl.zeros([TILE_GROUP, TILE_DIM], tl.float32)
    for at in range(0, sharing, TILE_STATES):
        state = at + tl.arange(0, TILE_STATES)
        slots = (first_program + state) * 2 + tl.where(state == 0, first_slot, 0)
        places = slots[:, None] * GROUP + rows[None, :]
        live = (state < sharing)[:, None] & own[None, :]
        sums = state_sums + places * 2
        peaks = tl.load(sums, mask=live, other=LEAST, cache_modifier=".cg")
        totals = tl.load(sums + 1, mask=live, other=0.0, cache_modifier=".cg")
        places = places[:, :, None] * HEAD_DIM + dims[None, None, :]
        live = live[:, :, None] & (dims < HEAD_DIM)[None, None, :]
        parts = tl.load(states + places, mask=live, other=0.0, cache_modifier=".cg")
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        shrink = tl.exp2(peak - new_peak)
        weights = tl.exp2(peaks - new_peak[None, :])
        total = total * shrink + tl.sum(totals * weights, 0)
        mixed = mixed * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        peak = new_peak
    row_sinks = load_learned(sinks, kv_head * GROUP + rows, own) if sinks is not None else None
    result = finish(peak, total, mixed, row_sinks).to(head_out.dtype.element_ty)
    places = rows[:, None] * out_head_stride + dims[None, :]
    tl.store(head_out + places, result, mask=inside)
