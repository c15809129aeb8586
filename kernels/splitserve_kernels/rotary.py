"""Rotary embedding, with the keys' and values' way into the page pool in the same launch.

A pair (a, b) becomes (a cos - b sin, b cos + a sin), rounded as the layers do
(`splitserve.models.layers.rotary`): the product with the cosine to the model's type, then the fused
sum. Pools are a layer's views of shape (pages, block_tokens, kv_heads, head_dim), contiguous within
a page. A row's place in a pool is `page * block_tokens + slot`, int64; a row with a negative place
is padding and is not stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.early_launch import launches_early, wait_for_the_kernel_before
from splitserve_kernels.head_codes import choose_scale, to_head_codes

_TILE = 1024


def rotate_and_store(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys_pool: Tensor,
    values_pool: Tensor,
    places: Tensor,
    *,
    interleaved: bool = False,
    keep_keys: bool = False,
) -> None:
    """Turn `queries` in place; put turned `keys`, and `values`, into the pool.

    queries: (rows, heads, head_dim); keys, values: (rows, kv_heads, head_dim); each row's heads
        contiguous
    cos, sin: (rows, 1, dims), contiguous, as `rotation` makes them; dimensions past `dims` are
        kept; None turns nothing
    keys_pool, values_pool: see above; the type of the keys
    places: (rows,) int64, see above
    keep_keys: put the turned keys back into `keys` too

    Raises `ValueError` for shapes and types that do not go together.
    """
    _check(queries, keys, values, cos, places, (keys_pool, values_pool))
    if not queries.dtype == keys_pool.dtype == values_pool.dtype:
        raise ValueError(f"a pool of {keys_pool.dtype} takes no {queries.dtype}")
    _launch(
        queries, keys, values, cos, sin, keys_pool, values_pool, None, None, places,
        interleaved, keep_keys,
    )  # fmt: skip


def rotate_and_store_codes(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    key_codes: Tensor,
    value_codes: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    places: Tensor,
    *,
    interleaved: bool = False,
    keep_keys: bool = False,
) -> None:
    """The same into a pool of 8-bit codes, int8 or e4m3, with (pages, block_tokens, kv_heads, 1)
    bfloat16 scales. An int8 scale fits the head's largest magnitude; of e4m3, the best of several
    is taken.
    """
    _check(queries, keys, values, cos, places, (key_codes, value_codes))
    scales = (key_scales, value_scales)
    shape = (*key_codes.shape[:3], 1)
    if any(s.shape != shape or s.stride()[1:3] != (shape[2], 1) for s in scales):
        raise ValueError(f"scales must be {shape}, contiguous within a page")
    if key_scales.stride(0) != value_scales.stride(0) or key_scales.dtype != torch.bfloat16:
        raise ValueError("scales must be bfloat16 views of one pool")
    if key_codes.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"codes of {key_codes.dtype} are not supported")
    _launch(
        queries, keys, values, cos, sin, key_codes, value_codes, key_scales, value_scales, places,
        interleaved, keep_keys,
    )  # fmt: skip


def rotation(
    positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for `rotate_and_store`, each (rows, 1, dims) in `dtype`.

    positions: (rows,) int32 or int64
    inverse: (dims / 2,) fp32, radians that a position turns each pair by
    factor: what cosines and sines are multiplied by
    """
    rows, half = positions.shape[0], inverse.shape[0]
    cos = torch.empty((rows, 1, 2 * half), dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    count = rows * half
    _rotation[(triton.cdiv(count, _TILE),)](
        positions,
        inverse,
        cos,
        sin,
        factor,
        count,
        HALF=half,
        INTERLEAVED=interleaved,
        TILE=_TILE,
        num_warps=4,
    )
    return cos, sin


def rotation_reference(
    positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype, *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """`rotation` in plain torch."""
    angles = positions[:, None].float() * inverse
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), -1).flatten(-2)
    else:
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return (cos * factor)[:, None].to(dtype), (sin * factor)[:, None].to(dtype)


def turn_reference(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, *, interleaved: bool
) -> Tensor:
    """(rows, heads, head_dim) with its first dimensions turned, in plain torch."""
    if cos is None or sin is None:
        return x
    dims = cos.shape[-1]
    part, kept = x[..., :dims], x[..., dims:]
    if interleaved:
        swapped = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]
    else:
        swapped = part.roll(dims // 2, dims=-1)
    return torch.cat((torch.addcmul(part * cos, swapped, sin), kept), dim=-1)


def store_reference(source: Tensor, pool: Tensor, places: Tensor) -> None:
    """Put (rows, kv_heads, head_dim) where `places` say, in plain torch."""
    stored, block_tokens = places >= 0, pool.shape[1]
    where = (places[stored] // block_tokens, places[stored] % block_tokens)
    pool.index_put_(where, source[stored])


def _check(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    places: Tensor,
    pools: tuple[Tensor, Tensor],
) -> None:
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    if keys.shape != values.shape or keys.shape != (rows, kv_heads, head_dim) or heads % kv_heads:
        raise ValueError(
            f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)} do not go together"
        )
    if not queries.dtype == keys.dtype == values.dtype:
        raise ValueError(f"types {queries.dtype}, {keys.dtype}, {values.dtype} differ")
    if any(
        t.stride(2) != 1 or (t.shape[1] > 1 and t.stride(1) != head_dim)
        for t in (queries, keys, values)
    ):
        raise ValueError("each row's heads must be contiguous")
    dims = head_dim if cos is None else cos.shape[-1]
    if head_dim % 2 or dims % 2 or dims > head_dim or (cos is not None and len(cos) != rows):
        raise ValueError(f"{dims} dimensions of heads of {head_dim} cannot be turned")
    if places.shape != (rows,) or places.dtype != torch.int64:
        raise ValueError(f"places must be ({rows},) int64")
    inner = (kv_heads * head_dim, head_dim, 1)
    if any(p.shape[2:] != keys.shape[1:] or p.stride()[1:] != inner for p in pools):
        raise ValueError("pools must have the keys' heads, contiguous within a page")
    if pools[0].stride(0) != pools[1].stride(0):
        raise ValueError("keys and values must be views of one pool")


def _launch(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys_pool: Tensor,
    values_pool: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    places: Tensor,
    interleaved: bool,
    keep_keys: bool,
) -> None:
    rows, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    half = (head_dim if cos is None else cos.shape[-1]) // 2
    rest = head_dim - 2 * half
    tile_group, tile_half = triton.next_power_of_2(group), triton.next_power_of_2(half)
    early = launches_early(queries.device)
    _rotate_and_store[(rows, kv_heads)](
        queries,
        keys,
        values,
        cos,
        sin,
        keys_pool,
        values_pool,
        key_scales,
        value_scales,
        places,
        queries.stride(0),
        keys.stride(0),
        values.stride(0),
        keys_pool.stride(0),
        0 if key_scales is None else key_scales.stride(0),
        BLOCK_TOKENS=keys_pool.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        HALF=half,
        INTERLEAVED=interleaved,
        KEEP_KEYS=keep_keys,
        TILE_GROUP=tile_group,
        TILE_HALF=tile_half,
        TILE_REST=triton.next_power_of_2(rest) if rest else 1,
        num_warps=min(8, max(1, tile_group * tile_half // 256)),
        EARLY=early,
        launch_pdl=early,
    )


@triton.jit
def _turn(
    a: tl.tensor, b: tl.tensor, cos: tl.tensor, sin: tl.tensor, dtype: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A pair turned, in fp32 as rounded to `dtype`."""
    a, b, cos, sin = a.to(tl.float32), b.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    first = tl.fma(b, -sin, (a * cos).to(dtype).to(tl.float32))
    second = tl.fma(a, sin, (b * cos).to(dtype).to(tl.float32))
    return first.to(dtype), second.to(dtype)


@triton.jit
def _store_head(
    a: tl.tensor,
    b: tl.tensor,
    rest: tl.tensor,
    pool: tl.tensor,
    target: tl.tensor,
    scales: tl.tensor,
    scale_target: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    GAP: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
) -> None:
    """One head at `target` of its pool, its scale where `scales` is not None."""
    dtype: tl.constexpr = pool.dtype.element_ty
    if scales is not None:
        a, b, rest = a.to(tl.float32), b.to(tl.float32), rest.to(tl.float32)
        scale = choose_scale(a, b, rest, dtype)
        tl.store(scales + scale_target, scale.to(tl.bfloat16))
        a, b = to_head_codes(a, scale, dtype), to_head_codes(b, scale, dtype)
        rest = to_head_codes(rest, scale, dtype)
    pool += target
    pairs = tl.arange(0, TILE_HALF)
    tl.store(pool + pairs * FIRST_STEP, a, mask=pairs < HALF)
    tl.store(pool + pairs * FIRST_STEP + GAP, b, mask=pairs < HALF)
    if HEAD_DIM > 2 * HALF:
        dims = 2 * HALF + tl.arange(0, TILE_REST)
        tl.store(pool + dims, rest, mask=dims < HEAD_DIM)


@triton.jit
def _rotate_and_store(
    # pointers; cos, sin and scales may be None
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys_pool: tl.tensor,
    values_pool: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    places: tl.tensor,
    # strides, in elements
    query_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    page_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    # constants
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP_KEYS: tl.constexpr,
    TILE_GROUP: tl.constexpr,
    TILE_HALF: tl.constexpr,
    TILE_REST: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One KV head of one row, with its query heads.

    A thread holds both members of a pair, so that turning in place overwrites nothing unread.
    """
    if EARLY:
        wait_for_the_kernel_before()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dtype: tl.constexpr = queries.dtype.element_ty
    # Pair i is dimensions i * FIRST_STEP and i * FIRST_STEP + GAP.
    first_step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    pairs = tl.arange(0, TILE_HALF)
    inside = pairs < HALF
    first = pairs * first_step

    keys += row * key_stride + head * HEAD_DIM
    values += row * value_stride + head * HEAD_DIM
    a = tl.load(keys + first, mask=inside, other=0.0)
    b = tl.load(keys + first + gap, mask=inside, other=0.0)
    value_a = tl.load(values + first, mask=inside, other=0.0)
    value_b = tl.load(values + first + gap, mask=inside, other=0.0)
    if HEAD_DIM > 2 * HALF:
        dims = 2 * HALF + tl.arange(0, TILE_REST)
        rest = tl.load(keys + dims, mask=dims < HEAD_DIM, other=0.0)
        value_rest = tl.load(values + dims, mask=dims < HEAD_DIM, other=0.0)
    else:
        rest = tl.zeros([TILE_REST], dtype)
        value_rest = tl.zeros([TILE_REST], dtype)

    if cos is not None:
        turn_place = row * (2 * HALF) + first
        c = tl.load(cos + turn_place, mask=inside, other=0.0)
        # The second member's sine is the one that has not changed its sign.
        s = tl.load(sin + turn_place + gap, mask=inside, other=0.0)
        a, b = _turn(a, b, c, s, dtype)
        if KEEP_KEYS:
            tl.store(keys + first, a, mask=inside)
            tl.store(keys + first + gap, b, mask=inside)
        members = tl.arange(0, TILE_GROUP)[:, None]
        both = (members < GROUP) & inside[None, :]
        at = queries + row * query_stride + (head * GROUP + members) * HEAD_DIM + first[None, :]
        query_a = tl.load(at, mask=both, other=0.0)
        query_b = tl.load(at + gap, mask=both, other=0.0)
        query_a, query_b = _turn(query_a, query_b, c[None, :], s[None, :], dtype)
        tl.store(at, query_a, mask=both)
        tl.store(at + gap, query_b, mask=both)

    place = tl.load(places + row)
    if place >= 0:
        page, slot = place // BLOCK_TOKENS, place % BLOCK_TOKENS
        target = page * page_stride + (slot * KV_HEADS + head) * HEAD_DIM
        scale_target = page * scale_page_stride + slot * KV_HEADS + head
        _store_head(
            a, b, rest, keys_pool, target, key_scales, scale_target,
            HEAD_DIM, HALF, first_step, gap, TILE_HALF, TILE_REST,
        )  # fmt: skip
        _store_head(
            value_a, value_b, value_rest, values_pool, target, value_scales, scale_target,
            HEAD_DIM, HALF, first_step, gap, TILE_HALF, TILE_REST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _rotation(
    # pointers
    positions: tl.tensor,
    inverse: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    # numbers
    factor: tl.tensor,
    # sizes
    count: tl.tensor,
    # constants
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A tile of (row, pair)s. `tl.cos` is the exact one, for angles of any size."""
    pairs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = pairs < count
    row, pair = pairs // HALF, pairs % HALF
    position = tl.load(positions + row, mask=inside, other=0).to(tl.float32)
    angle = position * tl.load(inverse + pair, mask=inside, other=0.0)
    c, s = tl.cos(angle) * factor, tl.sin(angle) * factor
    dtype: tl.constexpr = cos.dtype.element_ty
    first_step: tl.constexpr = 2 if INTERLEAVED else 1
    gap: tl.constexpr = 1 if INTERLEAVED else HALF
    place = row * (2 * HALF) + pair * first_step
    tl.store(cos + place, c.to(dtype), mask=inside)
    tl.store(cos + place + gap, c.to(dtype), mask=inside)
    tl.store(sin + place, (-s).to(dtype), mask=inside)
    tl.store(sin + place + gap, s.to(dtype), mask=inside)
