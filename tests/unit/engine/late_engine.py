"""An engine whose tokens are read one step late, for tests of the loop."""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.fake import FakeEngine
from splitserve.engine.protocol import DRAWN, DrawnToken, LayersDone, Slice
from splitserve.engine.sequence import SequenceOutput


@dataclass
class LateStep:
    """A step whose tokens are there, and were not read."""

    owner: LateEngine
    written: list[tuple[abc.Sequence[int], set[int]]]
    """Of each slice, its pages and those of them that the step writes."""
    drawn: list[list[DrawnToken]]
    fails: bool

    def done(self) -> bool:
        return self.owner.is_done()

    def tokens(self) -> list[list[DrawnToken]]:
        assert self.owner.in_flight.popleft() is self, "steps are read in their order"
        if self.fails:
            raise RuntimeError("device lost")
        return self.drawn


class LateEngine(FakeEngine):
    """An `AsyncEngine` that knows the tokens before the loop does, as a device would, and checks
    that no page of a step in flight is another sequence's.
    """

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)  # type: ignore[arg-type]
        self.in_flight: deque[LateStep] = deque()
        self.most_in_flight = 0
        self.tokens: dict[int, int] = {}
        self.slots: list[int] = []
        self.launches = 0
        self.fail_launch = 0
        self.fail_tokens = 0
        self.is_done: abc.Callable[[], bool] = lambda: True

    def launch(
        self, slices: abc.Sequence[Slice], layers_done: LayersDone | None = None
    ) -> LateStep:
        self.launches += 1
        if self.launches == self.fail_launch:
            raise RuntimeError("out of memory")
        self.slots = sorted(part.slot for part in slices)
        assert len(set(self.slots)) == len(slices)
        known = []
        for part in slices:
            assert part.slot >= 0
            if part.token_ids[-1] == DRAWN:
                before = part.slot if part.came_from < 0 else part.came_from
                part = part._replace(token_ids=[self.tokens[before]])
            known.append(part._replace(pages=list(part.pages)))
        written = [(part.pages, self._pages_of(part)) for part in slices]
        for flight in self.in_flight:
            for owner, pages in flight.written:
                for other, others in written:
                    assert owner is other or not pages & others
        drawn = self.step(known, layers_done)
        self.tokens.update(
            (part.slot, tokens[0].token_id)
            for part, tokens in zip(known, drawn, strict=True)
            if tokens
        )
        fails = self.launches == self.fail_tokens
        self.in_flight.append(LateStep(self, written, drawn, fails))
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return self.in_flight[-1]

    def _pages_of(self, part: Slice) -> set[int]:
        block = self.spec.block_tokens
        end = part.start + len(part.token_ids)
        return set(part.pages[part.start // block : -(-end // block)])


def make_core(engine: LateEngine, heard: list[SequenceOutput], **config: int | bool) -> EngineCore:
    sizes = {"max_batch": 16, "max_step_tokens": 64, **config}
    return EngineCore(
        engine,
        CoreConfig(**sizes),
        lambda step, outputs: heard.extend(outputs),  # type: ignore[arg-type]
    )


def tokens_of(heard: list[SequenceOutput], name: str) -> list[int]:
    return [t.token_id for o in heard if o.sequence.id == name for t in o.tokens]


def run(core: EngineCore) -> None:
    while core.step():
        pass
