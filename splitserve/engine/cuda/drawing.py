"""Draws a step's tokens on the device and brings them to the host behind it.

The meaning is `splitserve.engine.sampler`'s, and so are the uniforms: a draw is the same function
of seed, choice and index wherever it is made. Penalties count the tokens that the host knows, and
one more that it does not: the token that the step was computed from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from splitserve_kernels.argmax import argmax_rows
from splitserve_kernels.penalties import forbid, penalise
from splitserve_kernels.sampling import logprobs, sample
from torch import Tensor

from splitserve.engine.cuda.history import Histories
from splitserve.engine.cuda.layout import Numbers
from splitserve.engine.cuda.read_back import ReadBack, ReadBacks
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.cuda.staging import Staging
from splitserve.engine.protocol import Draw, DrawnToken, Logprob, Slice
from splitserve.engine.sampler import forbidden, is_plain_greedy, uniform
from splitserve.sampling import SamplingParams

_NUMBERS = 8
"""Of each draw: what `_numbers` gives."""


@dataclass(frozen=True)
class _Logprobs:
    """Of the draws that asked for them: the drawn token's, and the likeliest tokens'."""

    draws: list[int]
    chosen: Tensor
    top: Tensor
    top_ids: Tensor

    def to_host(self) -> _Logprobs:
        return _Logprobs(self.draws, *(_to_host(t) for t in (self.chosen, self.top, self.top_ids)))


class Drawn:
    """Implements `Launched`: tokens on their way to the host."""

    def __init__(
        self,
        slices: Sequence[Slice],
        numbers: ReadBack,
        places: Sequence[int],
        logprobs: _Logprobs | None = None,
    ) -> None:
        """`places` are where among the numbers each draw's token is, slice by slice."""
        self._counts = [len(part.draws) for part in slices]
        self._asked = [draw.params.logprobs for part in slices for draw in part.draws]
        self._numbers = numbers
        self._places = places
        self._logprobs = logprobs

    def done(self) -> bool:
        """See `Launched`."""
        return self._numbers.done()

    def tokens(self) -> list[list[DrawnToken]]:
        """See `Launched`."""
        numbers = self._numbers.numbers()
        each = [DrawnToken(numbers[place]) for place in self._places]
        if self._logprobs:
            self._add_logprobs(each, self._logprobs)
        drawn = iter(each)
        return [[next(drawn) for _ in range(count)] for count in self._counts]

    def _add_logprobs(self, each: list[DrawnToken], logprobs: _Logprobs) -> None:
        rows = (logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top.tolist())
        for index, chosen, ids, values in zip(logprobs.draws, *rows, strict=True):
            count = self._asked[index]
            top = tuple(Logprob(i, v) for i, v in zip(ids[:count], values[:count], strict=True))
            each[index] = DrawnToken(each[index].token_id, chosen, top)


class Drawing:
    """Draws for one model's slots."""

    def __init__(self, eos_token_ids: frozenset[int], slots: SlotTable, staging: Staging) -> None:
        self._eos = eos_token_ids
        self._slots = slots
        self._staging = staging
        self._histories = Histories()
        self._read_backs = ReadBacks()

    def warm_up(self, logits: Tensor) -> None:
        """Compile every kind of draw on one row of logits."""
        everything = SamplingParams(
            top_k=2,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            min_tokens=1,
            stop_token_ids=(0,),
            logprobs=1,
        )
        draw = Draw(everything, 0, 0, (0,), ())
        self._sample([draw], [0], logits, torch.full((1,), -1, device=logits.device))

    def move(self, moves: Iterable[tuple[int, int]]) -> None:
        """See `Histories.move`."""
        self._histories.move(moves)

    def draw(self, slices: Sequence[Slice], rows: Mapping[int, int], logits: Tensor) -> Drawn:
        """Tokens of all slices, whose slots' rows of the logits are given. The slots have their
        rows' likeliest tokens already, and have the drawn ones afterwards.
        """
        draws = [draw for part in slices for draw in part.draws]
        slots = [part.slot for part in slices for _ in part.draws]
        if all(map(is_plain_greedy, draws)):
            # All of them: to pick these costs a launch more.
            return Drawn(slices, self._read_backs.begin(self._slots.tokens), slots)
        of_slots, of_rows = self._staging.send_lists(slots, [rows[slot] for slot in slots])
        newest = self._slots.fed[of_slots]
        tokens, asked = self._sample(draws, slots, logits[of_rows], newest)
        self._slots.tokens.index_copy_(0, of_slots, tokens)
        return self._drawn(slices, tokens, asked)

    def draw_rows(self, slices: Sequence[Slice], logits: Tensor) -> Drawn:
        """The same of a row of logits for each draw, with every earlier token known."""
        draws = [draw for part in slices for draw in part.draws]
        slots = [part.slot for part in slices for _ in part.draws]
        if all(map(is_plain_greedy, draws)):
            return self._drawn(slices, argmax_rows(logits))
        newest = torch.full((len(draws),), -1, device=logits.device)
        return self._drawn(slices, *self._sample(draws, slots, logits, newest))

    def _drawn(
        self, slices: Sequence[Slice], tokens: Tensor, logprobs: _Logprobs | None = None
    ) -> Drawn:
        """`tokens` are one for each draw, (draws,) int64, slice by slice."""
        asked = logprobs.to_host() if logprobs else None
        return Drawn(slices, self._read_backs.begin(tokens), range(len(tokens)), asked)

    def _sample(
        self, draws: Sequence[Draw], slots: Sequence[int], logits: Tensor, newest: Tensor
    ) -> tuple[Tensor, _Logprobs | None]:
        """`newest` is each draw's token that the host may not know."""
        raw, logits = logits, logits.float()
        numbers = self._send_numbers(draws)
        temperature, top_k, top_p, min_p, uniforms, repetition, presence, frequency = numbers
        if any(draw.params.has_penalties for draw in draws):
            logits = logits.clone() if logits is raw else logits
            pending = [draw.num_pending for draw in draws]
            (is_pending,) = self._staging.send_lists(pending)
            starts, tokens, counts = self._send_histories(draws, slots)
            penalise(
                logits,
                starts,
                tokens,
                counts,
                repetition.float(),
                presence.float(),
                frequency.float(),
                torch.where(is_pending > 0, newest, -1),
            )
        lists = [forbidden(draw, self._eos) for draw in draws]
        if any(lists):
            logits = logits.clone() if logits is raw else logits
            starts, tokens = self._staging.send_lists(_starts(lists), list(chain(*lists)))
            forbid(logits, starts.int(), tokens.int())
        drawn = sample(
            logits,
            temperature.float(),
            top_k.int(),
            top_p,
            min_p.float(),
            uniforms,
            any_top_k_or_p=any(map(_has_top_k_or_p, draws)),
            any_min_p=any(map(_has_min_p, draws)),
        )
        return drawn, _logprobs_of(draws, raw, drawn)

    def _send_numbers(self, draws: Sequence[Draw]) -> tuple[Tensor, ...]:
        """Each of `_numbers` as (draws,) fp64."""

        def fill(out: Numbers) -> None:
            out.view(np.float64).reshape(_NUMBERS, -1).T[:] = [_numbers(draw) for draw in draws]

        sent = self._staging.send(_NUMBERS * len(draws), fill)
        return sent.view(torch.float64).view(_NUMBERS, -1).unbind()

    def _send_histories(self, draws: Sequence[Draw], slots: Sequence[int]) -> list[Tensor]:
        """Where each draw's part is, the tokens that it has seen, and how often in its output."""
        histories = [
            self._histories.of(slot, draw) if draw.params.has_penalties else None
            for slot, draw in zip(slots, draws, strict=True)
        ]
        starts = [0, *accumulate(len(history) if history else 0 for history in histories)]
        sizes = [len(starts), starts[-1], starts[-1]]

        def fill(out: Numbers) -> None:
            of_starts, tokens, counts = np.split(out, np.cumsum(sizes)[:-1])
            of_starts[:] = starts
            for history, (start, end) in zip(histories, pairwise(starts), strict=True):
                if history:
                    tokens[start:end] = history.tokens
                    counts[start:end] = history.counts

        sent = torch.split(self._staging.send(sum(sizes), fill), sizes)
        return [each.int() for each in sent]


def _numbers(draw: Draw) -> tuple[float, ...]:
    params = draw.params
    return (
        0.0 if params.greedy else params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        uniform(draw.seed, draw.choice, draw.output_index),
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )


def _has_top_k_or_p(draw: Draw) -> bool:
    params = draw.params
    return not params.greedy and (params.top_k > 0 or params.top_p < 1.0)


def _has_min_p(draw: Draw) -> bool:
    return not draw.params.greedy and draw.params.min_p > 0.0


def _starts(parts: Sequence[Sequence[int]]) -> list[int]:
    return [0, *accumulate(len(part) for part in parts)]


def _logprobs_of(draws: Sequence[Draw], logits: Tensor, drawn: Tensor) -> _Logprobs | None:
    """Raw log-probabilities, before penalties and temperature."""
    asked = [i for i, draw in enumerate(draws) if draw.params.logprobs is not None]
    if not asked:
        return None
    most = max(draws[i].params.logprobs or 0 for i in asked)
    of_rows = torch.tensor(asked, pin_memory=True).to(logits.device, non_blocking=True)
    return _Logprobs(asked, *logprobs(logits[of_rows], drawn[of_rows], most))


def _to_host(values: Tensor) -> Tensor:
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
