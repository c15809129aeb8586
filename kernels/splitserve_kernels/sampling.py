"""Draws tokens from rows of logits, without sorting them, by several programs a row.

The meaning is that of `splitserve.engine.sampler`: temperature, then top-k, top-p of what that
left, min-p, and the inverse of the cumulative distribution in the order of token ids. A row is cut
into chunks, and a pass is one launch with a program for each chunk of each row. A program leaves
what it found in the row's notes (`sampling_keys`); the last of a row to do so goes on alone and
decides what is next. After the first pass the row is read from the L2 cache.

1. `survey` finds each chunk's greatest logit and the sum of its weights. Greedy rows end here, and
   so do rows that keep all tokens: the uniform falls into one chunk, which is gone over once more.
2. Top-k and top-p each leave the logits above a threshold, and of those equal to it the first few.
   `narrow` counts or weighs what is above eight keys at once and keeps two neighbours of them. A
   few thousand logits are left between these; if not, it is done once more.
3. `enlist` lists these logits in the order of tokens, and `settle`, one program a row, halves their
   keys. Where the list has all that is kept, as with any usual top-k or a peaked distribution, the
   token is drawn from it.
4. `draw` sums what the chunks of the other rows keep, and goes over one of them again.

Launches never depend on what a tensor holds: rows that are done leave a pass at once. A caller that
knows the parameters may say that no row needs a pass, and then it is not launched: six are with a
top-k or a top-p, two with min-p alone, one with neither. A CUDA graph keeps to what was said at its
capture. Where narrowing does not help, as among many equal logits, one program searches alone
(`sampling_alone`), which takes longer and finds the same.

A weight is exp((logit - greatest) / temperature) in fp32, so a uniform within about 1e-6 of a
boundary may fall on its other side. Sums are added in the order of chunks, never in that of
arrival: the same row gives the same token, whatever is beside it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from splitserve_kernels.argmax import check_logits
from splitserve_kernels.early_launch import launches_early
from splitserve_kernels.sampling_keys import notes_of_row
from splitserve_kernels.sampling_narrow import narrow
from splitserve_kernels.sampling_settle import draw, enlist, settle
from splitserve_kernels.sampling_survey import survey
from splitserve_kernels.small_tiles import MAX_TILES, counters

MAX_VOCAB = 1 << 19

_CHUNK = 4096
_LISTED = 8192
"""The most logits that one program searches."""
_REGISTERS = 128
"""Of a thread, so that a processor has room for four programs of four warps."""


def sample(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    any_top_k_or_p: bool = True,
    any_min_p: bool = True,
) -> Tensor:
    """(rows,) int64 tokens.

    logits: (rows, vocab), a 16-bit type or fp32, contiguous in the last dimension
    temperatures: (rows,) fp32; 0 takes the greatest logit, the lowest token of equal ones
    top_k: (rows,) int32; 0 keeps all
    top_p: (rows,) fp32 or fp64, in (0, 1]
    min_p: (rows,) fp32, in [0, 1]
    uniforms: (rows,) fp64 or fp32, in [0, 1)
    any_top_k_or_p: False if no row has a top_k above 0 or a top_p below 1, greedy ones aside
    any_min_p: False if no row has a min_p above 0, greedy ones aside

    These two leave out launches that no row needs, and change no token; that of a row for which
    one is not true may be anything.

    What is not a number is as good as -inf, and a row of nothing else gives 0; +inf is as good as
    the greatest number. The first call on a stream must come before a graph is captured there.

    Raises `ValueError` for a shape or type that is not supported.
    """
    check_logits(logits)
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise ValueError(f"a vocabulary of {vocab} is above {MAX_VOCAB}")
    if rows > MAX_TILES:
        raise ValueError(f"{rows} rows are above {MAX_TILES}")
    for parameters in (temperatures, top_k, top_p, min_p, uniforms):
        if parameters.shape != (rows,) or not parameters.is_contiguous():
            raise ValueError(f"parameters must be ({rows},), got {tuple(parameters.shape)}")
    chunk = min(_CHUNK, max(16, triton.next_power_of_2(vocab)))
    chunks = triton.cdiv(vocab, chunk)
    listed = min(_LISTED, max(16, triton.next_power_of_2(vocab)))
    num_ints, num_reals = notes_of_row(chunks, listed)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    ints = torch.empty(rows * num_ints, dtype=torch.int32, device=logits.device)
    reals = torch.empty(rows * num_reals, dtype=torch.float64, device=logits.device)
    early = launches_early(logits.device)
    arrived = counters(logits.device)
    by_chunk, by_row = (chunks, rows), (1, rows)
    passes = [(survey, by_chunk, 4)]
    if any_top_k_or_p:
        passes += [(narrow, by_chunk, 4)] * 2 + [(enlist, by_chunk, 4), (settle, by_row, 16)]
    if any_top_k_or_p or any_min_p:
        passes += [(draw, by_chunk, 4)]
    for run, grid, warps in passes:
        run[grid](
            logits,
            temperatures,
            top_k,
            top_p,
            min_p,
            uniforms,
            ints,
            reals,
            arrived,
            out,
            logits.stride(0),
            VOCAB=vocab,
            CHUNK=chunk,
            NUM=chunks,
            CHUNKS=max(2, triton.next_power_of_2(chunks)),
            LISTED=listed,
            EARLY=early,
            num_warps=warps,
            maxnreg=_REGISTERS,
            launch_pdl=early,
        )
    return out


def sample_reference(
    logits: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> Tensor:
    """The same in plain torch, a row at a time."""
    out = logits.argmax(dim=-1)
    for i, row in enumerate(logits):
        if temperatures[i] > 0:
            settings = (float(x[i]) for x in (temperatures, top_k, top_p, min_p))
            cumulative = truncated_reference(row, *settings).cumsum(dim=-1)
            target = float(uniforms[i]) * cumulative[-1]
            token = torch.searchsorted(cumulative, target, right=True)
            out[i] = token.clamp_(max=len(row) - 1)
    return out


def truncated_reference(
    row: Tensor, temperature: float, top_k: float, top_p: float, min_p: float
) -> Tensor:
    """One row's probabilities before truncation, fp64, zero for tokens that it takes away."""
    wide = row.double()
    probs = torch.softmax((wide - wide.max()) / temperature, dim=-1)
    kept = min(int(top_k), len(probs)) or len(probs)
    ranked, order = torch.sort(probs, descending=True, stable=True)
    ranked, order = ranked[:kept], order[:kept]
    before = ranked.cumsum(dim=-1) - ranked
    if top_p < 1:
        ranked = torch.where(before < top_p * ranked.sum(), ranked, 0.0)
    probs = torch.zeros_like(probs).scatter_(0, order, ranked)
    return torch.where(probs >= min_p * probs.max(), probs, 0.0)


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Natural logarithms of probabilities under the raw distribution: each row's token's, (rows,)
    fp32, then the k greatest, (rows, k) fp32, and their tokens, (rows, k) int64.
    """
    values = torch.log_softmax(logits.float(), dim=-1)
    top, top_tokens = values.topk(min(k, logits.shape[1]), dim=-1)
    return values.gather(1, tokens[:, None])[:, 0], top, top_tokens
