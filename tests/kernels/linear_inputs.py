"""Random inputs, poisoned outputs and errors of the tests of products."""

import torch


def worst_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error of a row; infinite if anything is not finite."""
    error = (out.float() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)
    return float(error.nan_to_num(torch.inf).max())


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """An output in which whatever is not written shows."""
    return torch.full((m, n), torch.nan, dtype=dtype)
