"""What earlier tokens do to a row's logits, in place: penalties and forbidden tokens.

Rows' lists of tokens are one tensor: those of row i are at [starts[i], starts[i + 1]). A list names
no token twice. All tensors may be larger than what is used, so that a CUDA graph can keep them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from splitserve_kernels.argmax import check_logits

_TILE = 1024
_MOST_LOGIT = tl.constexpr(torch.finfo(torch.float32).max)


def penalise(
    logits: Tensor,
    starts: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    newest: Tensor | None = None,
) -> None:
    """Apply the penalties of `splitserve.engine.sampler` to (rows, vocab) logits in place.

    logits: a 16-bit type or fp32, contiguous in the last dimension
    starts: (rows + 1,) int32, see above
    tokens: int32, each token of a row's prompt or output once
    counts: int32, how often each is in the output; 0 for a token of the prompt alone
    repetition, presence, frequency: (rows,) fp32; 1, 0 and 0 change nothing
    newest: (rows,) int64, one more token of the output, in no list's counts yet; -1 is none

    Raises `ValueError` for a shape or type that is not supported.
    """
    _check(logits, starts, tokens)
    rows, vocab = logits.shape
    if any(t.shape != (rows,) for t in (repetition, presence, frequency)):
        raise ValueError(f"penalties must be ({rows},)")
    _penalise[(rows,)](
        logits,
        starts,
        tokens,
        counts,
        repetition,
        presence,
        frequency,
        newest,
        logits.stride(0),
        VOCAB=vocab,
        TILE=_TILE,
        num_warps=4,
    )


def forbid(logits: Tensor, starts: Tensor, tokens: Tensor) -> None:
    """Set the tokens of each row's list to -inf in place: starts (rows + 1,) int32, tokens int32.

    Raises `ValueError` for a shape or type that is not supported.
    """
    _check(logits, starts, tokens)
    rows, vocab = logits.shape
    _forbid[(rows,)](logits, starts, tokens, logits.stride(0), VOCAB=vocab, TILE=128, num_warps=1)


def penalise_reference(
    logits: Tensor,
    starts: Tensor,
    tokens: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    newest: Tensor | None = None,
) -> None:
    """`penalise` in plain torch, a row at a time."""
    most = torch.finfo(torch.float32).max
    for i in range(len(logits)):
        part = slice(int(starts[i]), int(starts[i + 1]))
        listed, times = tokens[part].long(), counts[part].clone()
        if newest is not None and newest[i] >= 0:
            if bool((listed == newest[i]).any()):
                times += listed == newest[i]
            else:
                listed, times = (
                    torch.cat((listed, newest[i, None])),
                    torch.cat((times, times.new_ones(1))),
                )
        x = logits[i, listed].float()
        if repetition[i] != 1:
            x = torch.where(x > 0, x / repetition[i], x * repetition[i]).clamp(-most, most)
        x = torch.where(times > 0, x - (presence[i] + frequency[i] * times), x)
        logits[i, listed] = x.to(logits.dtype)


def forbid_reference(logits: Tensor, starts: Tensor, tokens: Tensor) -> None:
    """`forbid` in plain torch."""
    for i in range(len(logits)):
        logits[i, tokens[int(starts[i]) : int(starts[i + 1])].long()] = -torch.inf


def _check(logits: Tensor, starts: Tensor, tokens: Tensor) -> None:
    check_logits(logits)
    if starts.shape != (len(logits) + 1,):
        raise ValueError(f"starts must be ({len(logits) + 1},), got {tuple(starts.shape)}")
    if starts.dtype != torch.int32 or tokens.dtype != torch.int32:
        raise ValueError("starts and tokens must be int32")


@triton.jit
def _penalised(
    x: tl.tensor,
    count: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
) -> tl.tensor:
    """An fp32 logit whose token is in the prompt or, `count` times, in the output."""
    # What a penalty makes infinite is cut off: two tokens then have a difference.
    repeated = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition)
    repeated = tl.clamp(repeated, -_MOST_LOGIT, _MOST_LOGIT)
    x = tl.where(repetition == 1.0, x, repeated)
    return tl.where(count > 0, x - (presence + frequency * count.to(tl.float32)), x)


@triton.jit
def _penalise(
    # pointers; newest may be None
    logits: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    counts: tl.tensor,
    repetition: tl.tensor,
    presence: tl.tensor,
    frequency: tl.tensor,
    newest: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(repetition + row)
    p = tl.load(presence + row)
    f = tl.load(frequency + row)
    if (r == 1.0) & (p == 0.0) & (f == 0.0):
        return
    logits += row * stride
    dtype: tl.constexpr = logits.dtype.element_ty
    extra = tl.full((), -1, tl.int32)
    if newest is not None:
        extra = tl.load(newest + row).to(tl.int32)
    listed = tl.full((), 0, tl.int32)
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, TILE):
        places = start + tl.arange(0, TILE)
        token = tl.load(tokens + places, mask=places < end, other=-1)
        live = (token >= 0) & (token < VOCAB)
        count = tl.load(counts + places, mask=places < end, other=0)
        is_extra = (live & (token == extra)).to(tl.int32)
        listed += tl.sum(is_extra, 0)
        x = tl.load(logits + token, mask=live, other=0.0).to(tl.float32)
        x = _penalised(x, count + is_extra, r, p, f)
        tl.store(logits + token, x.to(dtype), mask=live)
    if (extra >= 0) & (extra < VOCAB) & (listed == 0):
        x = tl.load(logits + extra).to(tl.float32)
        x = _penalised(x, tl.full((), 1, tl.int32), r, p, f)
        tl.store(logits + extra, x.to(dtype))


@triton.jit
def _forbid(
    # pointers
    logits: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    # strides, in elements
    stride: tl.tensor,
    # constants
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    end = tl.load(starts + row + 1)
    for start in range(tl.load(starts + row), end, TILE):
        places = start + tl.arange(0, TILE)
        token = tl.load(tokens + places, mask=places < end, other=-1)
        nothing = tl.full([TILE], float("-inf"), logits.dtype.element_ty)
        tl.store(logits + token, nothing, mask=(token >= 0) & (token < VOCAB))
