"""What rank 0 tells the other ranks to compute, as compact bytes. Never imports torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from splitserve.engine.protocol import Draw, Slice
from splitserve.sampling import SamplingParams

_FIELDS = 4

_UNDRAWN = Draw(SamplingParams(), seed=0, choice=0, prompt=(), output=())
"""Stands for each draw of a follower's slice: rank 0 samples, the others need the number alone."""


def encode_step(slices: Sequence[Slice], block_tokens: int) -> bytes:
    """A step as little-endian uint32: how many slices; of each its start, tokens, pages and draws;
    then all token ids; then all page numbers.
    """
    numbers = array("I", (len(slices),))
    tokens, pages = array("I"), array("I")
    for part in slices:
        count = len(part.token_ids)
        used = -(-(part.start + count) // block_tokens)
        numbers.extend((part.start, count, used, len(part.draws)))
        tokens.extend(part.token_ids)
        pages.extend(part.pages[:used])
    return numbers.tobytes() + tokens.tobytes() + pages.tobytes()


def decode_step(payload: bytes | bytearray) -> list[Slice]:
    """The slices, each with as many draws as it had, of no content. Raises `ValueError`."""
    numbers = np.frombuffer(payload, "<u4")
    if not len(numbers) or len(numbers) < 1 + _FIELDS * int(numbers[0]):
        raise ValueError("a step that ends in its head")
    head = 1 + _FIELDS * int(numbers[0])
    fields = numbers[1:head].reshape(-1, _FIELDS).tolist()
    token = head
    page = head + sum(count for _, count, _, _ in fields)
    if page + sum(used for _, _, used, _ in fields) != len(numbers):
        raise ValueError("a step of another length than its head says")
    slices = []
    for start, count, used, draws in fields:
        slices.append(
            Slice(
                numbers[token : token + count].tolist(),
                start,
                numbers[page : page + used].tolist(),
                [_UNDRAWN] * draws,
            )
        )
        token += count
        page += used
    return slices
