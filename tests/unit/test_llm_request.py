"""An `LLM`'s requests on the fake engine, stepped by hand."""

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.fake import FakeEngine, expected_tokens
from splitserve.llm_request import Request, dispatch
from splitserve.sampling import SamplingParams

COUNT = 20


def submitted(core: EngineCore, names: range, choices: int) -> list[Request]:
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, n=choices, seed=0)
    requests = [Request(f"r{i}", [i + 1, 5], params, core, tokenizer=None) for i in names]
    for request in requests:
        request.submit()
    return requests


def run(core: EngineCore) -> int:
    steps = 0
    while core.step():
        steps += 1
    return steps


def test_choices_of_all_requests_share_one_batch() -> None:
    """Nobody reads the outputs meanwhile; other choices must not wait for that."""
    core = EngineCore(FakeEngine(), CoreConfig(max_batch=16), dispatch)
    requests = submitted(core, range(4), choices=4)
    assert run(core) == COUNT + 1, "the others begin one step after the first"
    for index, request in enumerate(requests):
        tokens: dict[int, list[int]] = {}
        for delta in request.deltas():
            for choice in delta.choices:
                tokens.setdefault(choice.index, []).extend(choice.token_ids)
        assert tokens == dict.fromkeys(range(4), expected_tokens([index + 1, 5], COUNT))


def test_abort_ends_choices_that_were_not_submitted_yet() -> None:
    core = EngineCore(FakeEngine(), CoreConfig(), dispatch)
    [request] = submitted(core, range(1), choices=4)
    request.abort()
    run(core)
    stats = core.stats()
    assert stats.free_pages == stats.total_pages
    assert (stats.running, stats.waiting) == (0, 0)
