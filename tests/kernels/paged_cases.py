"""Random inputs over a scattered pool in which everything that must not be read is NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True)
class PagedCase:
    """Queries, and the pool as `PageMemory` lays it out: one layer of several, keys and values."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    lengths: Tensor

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
    block_tokens: int = 16,
    table_dtype: torch.dtype = torch.int64,
    device: str = "cpu",
) -> PagedCase:
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_tokens) for length in lengths]
    num_pages = sum(needed) + 3
    pool = torch.full((num_pages, 3, 2, block_tokens, kv_heads, head_dim), NAN, dtype=dtype)
    free = torch.randperm(num_pages, generator=generator).tolist()
    # Padding names a page of nothing but NaN.
    table = torch.full((len(lengths), max(needed) + 1), free.pop(), dtype=table_dtype)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        pages = [free.pop() for _ in range(count)]
        table[row, :count] = torch.tensor(pages, dtype=table_dtype)
        for index, page in enumerate(pages):
            live = min(block_tokens, length - index * block_tokens)
            content = torch.randn((2, live, kv_heads, head_dim), generator=generator)
            pool[page, 1, :, :live] = content.to(dtype)
    # Queries are a part of a wider tensor, as they are in the model.
    wide = torch.randn((rows, kv_heads * (group + 1), head_dim), generator=generator).to(dtype)
    pool, wide = pool.to(device), wide.to(device)
    return PagedCase(
        queries=wide[:, : kv_heads * group],
        keys=pool[:, 1, 0],
        values=pool[:, 1, 1],
        page_table=table.to(device),
        lengths=torch.tensor(lengths, device=device),
    )


def worst_error(out: Tensor, exact: Tensor) -> float:
    """The largest error of a head's result, relative in the Euclidean norm. NaN stays NaN."""
    error = (out.float() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
    return float(error.max())
