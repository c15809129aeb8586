"""Draws tokens from logits.

The order is that of vLLM: raw log-probabilities are reported, then penalties, minimum length,
temperature, top-k, top-p and min-p are applied. A draw uses one uniform number that is a function
of (seed, choice, token index) alone, so that an interrupted sequence goes on with the same
tokens on any worker. Rows are drawn one by one: a row's result never depends on its neighbours.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from splitserve.engine.protocol import Draw, DrawnToken, Logprob

_MOST_LOGIT = torch.finfo(torch.float32).max


class Sampler:
    """Draws for one model. Holds no state between calls."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> list[DrawnToken]:
        """One token for each row of (draws, vocab_size) fp32 logits."""
        if all(is_plain_greedy(draw) for draw in draws):
            return [DrawnToken(token) for token in logits.argmax(dim=-1).tolist()]
        return [self._draw_row(row, draw) for row, draw in zip(logits, draws, strict=True)]

    def _draw_row(self, row: Tensor, draw: Draw) -> DrawnToken:
        adjusted = self._adjust(row, draw)
        token = int(adjusted.argmax()) if draw.params.greedy else _pick(adjusted, draw)
        if draw.params.logprobs is None:
            return DrawnToken(token)
        return _with_logprobs(row, token, draw.params.logprobs)

    def _adjust(self, row: Tensor, draw: Draw) -> Tensor:
        """Penalties and minimum length, on a copy if anything changes."""
        params = draw.params
        never = forbidden(draw, self._eos)
        if not params.has_penalties and not never:
            return row
        row = row.clone()
        if params.has_penalties:
            _penalise(row, draw)
        if never:
            row[never] = -torch.inf
        return row


def uniform(seed: int, choice: int, index: int) -> float:
    """A number in [0, 1) that is a function of its arguments only: the first 53 bits of a
    BLAKE2b of them.
    """
    counter = struct.pack("<QIQ", seed, choice, index)
    bits = int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


def is_plain_greedy(draw: Draw) -> bool:
    """Whether a draw is the likeliest token, and nothing else is asked."""
    params = draw.params
    return (
        params.greedy
        and params.logprobs is None
        and not params.has_penalties
        and draw.output_index >= params.min_tokens
    )


def forbidden(draw: Draw, eos_token_ids: frozenset[int]) -> list[int]:
    """What would end an output that is too short, each token once."""
    params = draw.params
    if draw.output_index >= params.min_tokens:
        return []
    return sorted({*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)})


def _penalise(row: Tensor, draw: Draw) -> None:
    params = draw.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*draw.prompt, *draw.output}), device=row.device)
        logits = row[seen]
        penalty = params.repetition_penalty
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        # The least penalties make infinite what two tokens then have the difference of.
        row[seen] = penalised.clamp(-_MOST_LOGIT, _MOST_LOGIT)
    if draw.output and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(draw.output)
        tokens = torch.tensor(list(counts), device=row.device)
        times = torch.tensor(list(counts.values()), device=row.device, dtype=row.dtype)
        row[tokens] -= params.presence_penalty + params.frequency_penalty * times


def _pick(row: Tensor, draw: Draw) -> int:
    """Draw by inverting the cumulative distribution of what truncation leaves."""
    params = draw.params
    # The greatest is taken off first: divided by the least temperatures it would be infinite.
    row = row.double()
    probs = torch.softmax((row - row.max()) / params.temperature, dim=-1)
    if params.top_k or params.top_p < 1.0:
        probs = _truncate(probs, params.top_k, params.top_p)
    if params.min_p:
        probs = torch.where(probs >= params.min_p * probs.max(), probs, 0.0)
    cumulative = probs.cumsum(dim=-1)
    target = uniform(draw.seed, draw.choice, draw.output_index) * float(cumulative[-1])
    # The first token whose cumulative probability exceeds the target has a probability above 0.
    return int(torch.searchsorted(cumulative, target, right=True).clamp_(max=len(row) - 1))


def _truncate(probs: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero all but the top_k most likely tokens, and of these all but the smallest set that
    reaches top_p of their sum. Equal probabilities rank by token id.
    """
    kept = min(top_k, len(probs)) or len(probs)
    ranked, order = torch.sort(probs, descending=True, stable=True)
    ranked, order = ranked[:kept], order[:kept]
    before = ranked.cumsum(dim=-1) - ranked
    ranked = torch.where(before < top_p * ranked.sum(), ranked, 0.0)
    return torch.zeros_like(probs).scatter_(0, order, ranked)


def _with_logprobs(row: Tensor, token: int, count: int) -> DrawnToken:
    logprobs = torch.log_softmax(row, dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    top = tuple(Logprob(i, v) for i, v in pairs)
    return DrawnToken(token, float(logprobs[token]), top)
