"""A rank with an engine whose arithmetic can be checked by hand, as a program.

Its "model" sums rank + 1 over all ranks once for each layer; its pages are bytes. As rank 0
(`lead`) it prints a line when all are ready and then computes steps for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from splitserve.engine.protocol import DrawnToken, EngineSpec, LayersDone, Slice
from splitserve.errors import CheckpointError
from splitserve.kv.page_shape import PageShape
from splitserve.obs.logging import setup_logging
from splitserve.parallel.ending import Ending
from splitserve.parallel.engine import GroupEngine
from splitserve.parallel.follow import Membership
from splitserve.parallel.follower import run_child
from splitserve.parallel.gloo_group import GlooGroup
from splitserve.parallel.group import Group
from splitserve.parallel.leader import Leader
from splitserve.parallel.page_slices import PageSlices
from splitserve.parallel.rendezvous import LOOPBACK, ParallelConfig

COMMAND = (sys.executable, __file__)
NUM_LAYERS, NUM_PAGES, BLOCK_TOKENS, NUM_KV_HEADS = 3, 4, 2, 6
UNLUCKY_SEED = 13


def page_slices(size: int) -> PageSlices:
    return PageSlices(PageShape(NUM_LAYERS, BLOCK_TOKENS, NUM_KV_HEADS, 4, "bfloat16"), size)


def group_spec() -> EngineSpec:
    return EngineSpec(
        fingerprint=bytes(32),
        vocab_size=100,
        max_context_tokens=64,
        eos_token_ids=frozenset(),
        num_layers=NUM_LAYERS,
        layer_group=1,
        block_tokens=BLOCK_TOKENS,
        block_bytes=page_slices(1).page.page_bytes,
        num_pages=NUM_PAGES,
    )


class ToyEngine:
    def __init__(self, group: Group, plan: dict[str, Any] | None = None) -> None:
        self.spec = group_spec()
        self.group = group
        self._fails = bool(plan and plan.get("fails_in_step"))
        shape = (NUM_PAGES, NUM_LAYERS, page_slices(group.size).rank_layer_bytes)
        self._pool = np.zeros(shape, np.uint8)

    def compute(
        self, slices: Sequence[Slice], layers_done: LayersDone | None = None
    ) -> torch.Tensor:
        """Of each slice the sum of ranks + 1 over all layers plus its token ids."""
        if self._fails:
            raise ArithmeticError("no more numbers")
        rows = torch.tensor([sum(part.token_ids) for part in slices], dtype=torch.float32)
        total = torch.zeros_like(rows)
        for layer in range(NUM_LAYERS):
            total += self.group.all_reduce(torch.full_like(rows, self.group.rank + 1.0))
            if layers_done:
                layers_done(layer, layer + 1)
        return total + rows

    def draw(self, logits: torch.Tensor, slices: Sequence[Slice]) -> list[list[DrawnToken]]:
        if any(draw.seed == UNLUCKY_SEED for part in slices for draw in part.draws):
            raise ArithmeticError("nothing to draw")
        return [
            [DrawnToken(token)] * len(part.draws)
            for token, part in zip(logits.int().tolist(), slices, strict=True)
        ]

    def export_page(self, page: int, first_layer: int, end_layer: int, out: memoryview) -> None:
        out[:] = self._pool[page, first_layer:end_layer].tobytes()

    def insert_page(self, page: int, content: memoryview) -> None:
        self._pool[page] = np.frombuffer(content, np.uint8).reshape(self._pool[page].shape)

    def close(self) -> None:
        self.group.close()


def open_rank(membership: Membership) -> ToyEngine:
    if membership.plan.get("refuses"):
        raise CheckpointError("layer 0 is not there")
    config = membership.config
    group = GlooGroup(membership.store, config.rank, config.size, membership.ending, host=LOOPBACK)
    return ToyEngine(group, membership.plan)


def open_group(leader: Leader, size: int, ending: Ending, plan: dict[str, Any]) -> GroupEngine:
    leader.assemble(plan)
    group = GlooGroup(leader.store, 0, size, ending, host=LOOPBACK)
    leader.await_ready()
    own = ToyEngine(group)
    return GroupEngine(own, leader, page_slices(size), ending)


def lead(size: int) -> None:
    setup_logging("toy", "info", "text")
    ending = Ending()
    config = ParallelConfig(size, local_size=size, starts_ranks=True)
    leader = Leader(config, ending, command=COMMAND, start_timeout_s=30)
    engine = open_group(leader, size, ending, {})
    print(*leader.pids.values(), flush=True)
    while True:
        engine.step([Slice([1], 0, [0], [])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "lead":
        lead(int(sys.argv[2]))
    else:
        run_child(open_rank)
