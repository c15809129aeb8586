"""Dataclasses and their proto twins."""

import dataclasses

import pytest

from splitserve.kv.layout import (
    BlockSpec,
    KvLayout,
    Lease,
    ReadableBlock,
    Reservation,
    ReservationState,
)

LAYOUT = KvLayout(b"m" * 32, 16, 737_280)


@pytest.mark.parametrize(
    "value",
    [
        LAYOUT,
        Lease("id", 2**63 + 5, "127.0.0.1:50054"),
        BlockSpec(b"k" * 32, 2**40, 16),
        ReadableBlock(b"k" * 32, 2**41, 2**40, b"d" * 17, 7),
    ],
)
def test_there_and_back(value):
    message = value.to_proto()
    assert type(value).from_proto(type(message).FromString(message.SerializeToString())) == value


@pytest.mark.parametrize("change", [{"model_fingerprint": b"n" * 32}, {"block_tokens": 17}])
def test_fingerprint_covers_every_field(change):
    assert dataclasses.replace(LAYOUT, **change).fingerprint != LAYOUT.fingerprint
    assert dataclasses.replace(LAYOUT, block_bytes=1).fingerprint != LAYOUT.fingerprint
    assert KvLayout(b"m" * 32, 16, 737_280).fingerprint == LAYOUT.fingerprint
    assert len(LAYOUT.fingerprint) == 32


def test_only_write_is_to_be_written():
    states = {state: Reservation(state, 0, 1).must_write for state in ReservationState}
    assert [state for state, write in states.items() if write] == [ReservationState.WRITE]
