"""Random inputs over a scattered pool in which everything that must not be read is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")
CODE_NAN = {torch.float8_e4m3fn: NAN, torch.int8: -128}


@dataclass(frozen=True)
class PagedCase:
    """Queries, and the pool as the engine lays it out: one layer of several, keys and values."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    lengths: Tensor
    scales: dict[str, Tensor]
    """`key_scales` and `value_scales`, or nothing."""

    @property
    def fixed(self) -> tuple[Tensor, ...]:
        return (self.queries, self.keys, self.values, self.page_table, self.lengths)

    @property
    def poisoned_out(self) -> Tensor:
        return torch.full_like(self.queries, NAN)


def make_case(
    lengths: list[int],
    *,
    rows: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
    codes: torch.dtype | None = None,
    unread: list[int] | None = None,
    block_tokens: int = 16,
    table_dtype: torch.dtype = torch.int64,
    device: str = "cpu",
) -> PagedCase:
    """`codes` is the type of a pool of 8 bits. Of each sequence the first `unread` tokens are as
    if they had never been written, and pages of nothing else are not in the table.
    """
    generator = torch.Generator().manual_seed(seed)
    unread = unread or [0] * len(lengths)
    gone = [skipped // block_tokens for skipped in unread]
    needed = [-(-length // block_tokens) for length in lengths]
    num_pages = sum(needed) - sum(gone) + 3
    size = (num_pages, 3, 2, block_tokens, kv_heads)
    pool = torch.full((*size, head_dim), CODE_NAN[codes] if codes else NAN).to(codes or dtype)
    scales = torch.full((*size, 1), NAN, dtype=torch.bfloat16)
    free = torch.randperm(num_pages, generator=generator).tolist()
    # Padding names a page of nothing but NaN.
    table = torch.full((len(lengths), max(needed) + 1), free.pop(), dtype=table_dtype)
    for row, (length, skipped) in enumerate(zip(lengths, unread, strict=True)):
        for index in range(gone[row], needed[row]):
            page = table[row, index] = free.pop()
            live = slice(
                max(0, skipped - index * block_tokens),
                min(block_tokens, length - index * block_tokens),
            )
            content = torch.randn((2, block_tokens, kv_heads, head_dim), generator=generator)
            if codes:
                most = 127 if codes == torch.int8 else 448
                scale = (content.abs().amax(-1, keepdim=True) / most).bfloat16()
                content = (content / scale.float()).clamp(-most, most)
                content = content.round() if codes == torch.int8 else content
                # Values' scales far apart, as those of real heads are.
                scale[1] *= 2.0 ** torch.randint(-3, 4, scale[1].shape, generator=generator)
                scales[page, 1, :, live] = scale[:, live]
            pool[page, 1, :, live] = content[:, live].to(codes or dtype)
    # Queries are a part of a wider tensor, as they are in the model.
    wide = torch.randn((rows, kv_heads * (group + 1), head_dim), generator=generator).to(dtype)
    pool, scales, wide = pool.to(device), scales.to(device), wide.to(device)
    named = {"key_scales": scales[:, 1, 0], "value_scales": scales[:, 1, 1]}
    return PagedCase(
        queries=wide[:, : kv_heads * group],
        keys=pool[:, 1, 0],
        values=pool[:, 1, 1],
        page_table=table.to(device),
        lengths=torch.tensor(lengths, device=device),
        scales=named if codes else {},
    )


def learned(heads: int, seed: int, device: str = "cpu") -> Tensor:
    """Random sinks or slopes, of both signs and of every size that models have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, generator=generator).to(device)


def worst_error(out: Tensor, exact: Tensor) -> float:
    """The largest error of a head's result, relative in the Euclidean norm. NaN stays NaN."""
    error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
    return float(error.max())
