"""A core on the fake engine, stepped by hand."""

from collections import abc, defaultdict
from dataclasses import dataclass, field

import pytest

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.fake import FakeEngine
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.sampling import FinishReason, SamplingParams


@dataclass
class Bench:
    """An `EngineCore` and everything it has said."""

    core: EngineCore
    engine: FakeEngine
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    finish: dict[str, FinishReason] = field(default_factory=dict)
    outputs: list[SequenceOutput] = field(default_factory=list)

    def submit(self, name: str, prompt: list[int], count: int = 8, **changes: object) -> Sequence:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        sequence = Sequence(name, prompt, params, seed=0, **changes)  # type: ignore[arg-type]
        self.core.submit(sequence)
        return sequence

    def run(self) -> int:
        steps = 0
        while self.core.step():
            steps += 1
        return steps

    def hear(self, step: int, outputs: abc.Sequence[SequenceOutput]) -> None:
        for output in outputs:
            name = output.sequence.id
            self.outputs.append(output)
            if not output.prefill_done:
                after = output.first_token_index + len(output.tokens)
                assert after == len(output.sequence.output)
            self.tokens[name] += [t.token_id for t in output.tokens]
            if output.finish_reason:
                assert name not in self.finish
                self.finish[name] = output.finish_reason


MakeBench = abc.Callable[..., Bench]


@pytest.fixture
def make_bench() -> MakeBench:
    def make(*, num_pages: int = 256, engine: FakeEngine | None = None, **config: int) -> Bench:
        engine = engine or FakeEngine(num_pages=num_pages)
        heard: list[Bench] = []
        core = EngineCore(
            engine,
            CoreConfig(**{"max_batch": 16, "max_step_tokens": 64, **config}),
            lambda step, outputs: heard[0].hear(step, outputs),
        )
        bench = Bench(core, engine)
        heard.append(bench)
        return bench

    return make
