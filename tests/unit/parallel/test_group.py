"""Two ranks over Gloo: this process and one that it starts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitserve.engine.protocol import Draw, Slice
from splitserve.parallel.engine import GroupEngine
from splitserve.parallel.leader import Leader
from splitserve.parallel.rendezvous import ParallelConfig
from splitserve.sampling import SamplingParams

DRAW = Draw(SamplingParams(), 0, 0, (), ())
TWO = ParallelConfig(2, local_size=2, starts_ranks=True)


@dataclass
class Pair:
    engine: GroupEngine
    leader: Leader
    recorded: Any


@pytest.fixture(scope="module")
def pair(toy: Any, recorded: Any) -> Iterator[Pair]:
    leader = Leader(TWO, recorded.ending, command=toy.COMMAND, start_timeout_s=30)
    engine = toy.open_group(leader, 2, recorded.ending, {})
    yield Pair(engine, leader, recorded)
    engine.close()
    assert recorded.codes == []
    assert not Path(leader.store_folder).exists()


def test_a_step_sums_over_the_ranks(pair: Pair) -> None:
    slices = [Slice([5, 6], 0, [0], [DRAW, DRAW]), Slice([7], 3, [1, 2], [])]
    drawn = pair.engine.step(slices)
    # Three layers of 1 + 2, and the token ids.
    assert [[each.token_id for each in part] for part in drawn] == [[20, 20], []]


def test_pages_go_to_all_ranks_and_come_back(pair: Pair) -> None:
    spec = pair.engine.spec
    contents = [bytes(np.random.default_rng(i).bytes(spec.block_bytes)) for i in range(4)]
    for page, content in enumerate(contents):
        pair.engine.insert_page(page, memoryview(content))
    for page, content in enumerate(contents):
        whole = bytearray(spec.block_bytes)
        pair.engine.export_page(page, 0, spec.num_layers, memoryview(whole))
        assert bytes(whole) == content
        middle = bytearray(spec.layer_bytes)
        pair.engine.export_page(page, 1, 2, memoryview(middle))
        assert bytes(middle) == content[spec.layer_bytes : 2 * spec.layer_bytes]


def test_a_wrong_page_leaves_the_ranks_in_step(pair: Pair) -> None:
    content = memoryview(bytes(range(256)) * 3)[: pair.engine.spec.block_bytes]
    pair.engine.insert_page(0, content)
    with pytest.raises(ValueError, match="are not the same layers"):
        pair.engine.insert_page(0, content[:-1])
    with pytest.raises(IndexError):
        pair.engine.insert_page(99, content)
    whole = bytearray(len(content))
    pair.engine.export_page(0, 0, pair.engine.spec.num_layers, memoryview(whole))
    assert whole == content


def test_pages_and_steps_run_beside_each_other(pair: Pair) -> None:
    content = memoryview(bytes(pair.engine.spec.block_bytes))
    faults: list[BaseException] = []

    def copy() -> None:
        try:
            for page in range(50):
                pair.engine.insert_page(page % 4, content)
        except BaseException as error:
            faults.append(error)

    copying = threading.Thread(target=copy)
    copying.start()
    for token in range(50):
        [[drawn]] = pair.engine.step([Slice([token], 0, [0], [DRAW])])
        assert drawn.token_id == 9 + token
    copying.join(10)
    assert not copying.is_alive()
    assert faults == []


def test_what_fails_on_rank_0_alone_costs_one_step(pair: Pair, toy: Any) -> None:
    unlucky = Draw(SamplingParams(), toy.UNLUCKY_SEED, 0, (), ())
    for _ in range(2):
        with pytest.raises(ArithmeticError, match="nothing to draw"):
            pair.engine.step([Slice([1], 0, [0], [unlucky])])
        reported: list[int] = []

        def layers_done(first: int, end: int, reported: list[int] = reported) -> None:
            reported.append(first)
            raise LookupError("nobody to tell")

        with pytest.raises(LookupError, match="nobody to tell"):
            pair.engine.step([Slice([1], 0, [0], [DRAW])], layers_done)
        assert reported == [0]
        [[drawn]] = pair.engine.step([Slice([1], 0, [0], [DRAW])])
        assert drawn.token_id == 10
