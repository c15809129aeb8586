"""The GPU engine on a tiny random model, against plain torch on the CPU."""

from __future__ import annotations

import random
import threading
from collections import abc

import pytest
import torch

from splitserve.engine.core import CoreConfig, EngineCore
from splitserve.engine.page_memory import open_page_memory
from splitserve.engine.protocol import Draw, DrawnToken, EngineSpec, Slice
from splitserve.engine.sampler import Sampler
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.linear import choose_products
from splitserve.models.load import Loader
from splitserve.parallel.group import SingleGroup
from splitserve.sampling import SamplingParams

from ..tiny_model import CONFIG, RandomWeights, make_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MAX_BATCH = 8


def open_tiny(kv_dtype: KvDtype = "float32", num_pages: int = 64) -> abc.Iterator[object]:
    from splitserve.engine.cuda.opening import open_cuda_engine
    from splitserve.models.triton_backend import TritonBackend

    device = torch.device("cuda")
    shape = PageShape(3, 4, 2, 8, kv_dtype)
    spec = EngineSpec(
        fingerprint=b"tiny",
        vocab_size=120,
        max_context_tokens=512,
        eos_token_ids=frozenset({7}),
        num_layers=3,
        layer_group=2,
        block_tokens=4,
        block_bytes=shape.page_bytes,
        num_pages=num_pages,
    )
    products = choose_products(torch.float32, device, deterministic=False)
    loader = Loader(
        CONFIG, RandomWeights(), products, SingleGroup(), torch.float32, device, TritonBackend()
    )
    memory = open_page_memory(shape, num_pages, torch.float32, device)
    model = loader.load(512)
    return open_cuda_engine(
        spec, model, memory, SingleGroup(), max_batch=MAX_BATCH, max_step_tokens=512
    )


@pytest.fixture
def engine() -> abc.Iterator[object]:
    engine = open_tiny()
    yield engine
    engine.close()


def run(core: EngineCore, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        core.submit(sequence)
    while core.step():
        pass


def serve(engine: object, sequences: list[Sequence], **sizes: int) -> dict[str, list[DrawnToken]]:
    heard: dict[str, list[DrawnToken]] = {}

    def hear(step: int, outputs: abc.Sequence[SequenceOutput]) -> None:
        for output in outputs:
            assert output.error is None
            heard.setdefault(output.sequence.id, []).extend(output.tokens)

    sizes = {"max_batch": MAX_BATCH, "max_step_tokens": 48, **sizes}
    run(EngineCore(engine, CoreConfig(**sizes), hear), sequences)
    return heard


PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, logprobs=5),
    SamplingParams(temperature=0.8, max_tokens=12, top_k=20, top_p=0.9),
    SamplingParams(temperature=1.2, max_tokens=12, min_p=0.1, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(
        temperature=0.7, max_tokens=12, presence_penalty=0.5, frequency_penalty=0.4, min_tokens=9
    ),
]


def sequences_of(seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    return [
        Sequence(
            str(i),
            [rng.randrange(120) for _ in range(rng.randrange(1, 60))],
            PARAMS[i % len(PARAMS)],
            seed=rng.getrandbits(64),
        )
        for i in range(13)
    ]


@pytest.mark.parametrize("num_pages", [400, 60])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_loop_gives_what_plain_torch_gives(num_pages: int, seed: int) -> None:
    """Every kind of draw, in-flight, ahead of what the host has read, and with preemptions.

    The seeds are fixed: where a uniform falls on a boundary, the devices' roundings may differ.
    """
    engine = open_tiny(num_pages=num_pages)
    found = serve(engine, sequences_of(seed))
    engine.close()
    plain = make_engine(num_pages=num_pages)
    plain.spec = engine.spec
    plain._sampler = Sampler(engine.spec.eos_token_ids)
    expected = serve(plain, sequences_of(seed))
    for name, tokens in expected.items():
        assert [t.token_id for t in found[name]] == [t.token_id for t in tokens], name
        for one, other in zip(found[name], tokens, strict=True):
            if other.logprob is not None:
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [t.token_id for t in one.top] == [t.token_id for t in other.top]


def test_news_that_have_no_room_in_a_graphs_numbers_go_first(
    engine: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = serve(engine, sequences_of(3))
    monkeypatch.setattr("splitserve.engine.cuda.engine.NEWS_ROOM", 3)
    found = serve(engine, sequences_of(3))
    assert {name: [t.token_id for t in tokens] for name, tokens in found.items()} == {
        name: [t.token_id for t in tokens] for name, tokens in expected.items()
    }


@pytest.mark.parametrize(("kv_dtype", "most"), [("float32", 1e-4), ("fp8", 0.4), ("int8", 0.1)])
def test_pages_travel(kv_dtype: KvDtype, most: float) -> None:
    """A prompt's pages from one engine, the next token on another."""
    prompt = [(3 * i) % 120 for i in range(9)]
    source, target = open_tiny(kv_dtype), open_tiny(kv_dtype)
    source.step([Slice(prompt[:8], 0, [5, 6], ())])
    for from_page, to_page in ((5, 40), (6, 2)):
        content = bytearray(source.spec.block_bytes)
        source.export_page(from_page, 0, 3, memoryview(content))
        target.insert_page(to_page, memoryview(content))
    last = Slice(prompt[8:], 8, [40, 2, 11], ())
    found = target.score(last).cpu()
    target.close()
    whole = make_engine().score(Slice(prompt, 0, [0, 1, 2], ()))[-1:]
    source.close()
    torch.testing.assert_close(found, whole, rtol=0, atol=most)


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("replays", [True, False])
def test_layers_are_reported_when_they_are_there(
    engine: object, decodes: bool, replays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a graph in parts or kernel by kernel; also of a prompt's last token, when it is alone."""
    if not replays:
        monkeypatch.setattr(engine._graphs, "fitting", lambda shape: None)
    told: list[tuple[int, int]] = []
    done = threading.Event()
    pages = [bytearray(engine.spec.block_bytes) for _ in range(2)]

    def layers_done(first: int, end: int) -> None:
        for page, content in enumerate(pages):
            size = engine.spec.layer_bytes
            part = memoryview(content)[first * size : end * size]
            engine.export_page(page, first, end, part)
        told.append((first, end))
        if end == 3:
            done.set()

    engine.step([Slice([1, 2, 3, 4, 5, 6, 7], 0, [0, 1], (), 0)])
    greedy = Draw(SamplingParams(temperature=0), 0, 0, (), ())
    part = Slice([8], 7, [0, 1], [greedy], 0) if decodes else Slice([7, 8], 6, [0, 1], (), 0)
    launched = engine.launch([part], layers_done)
    assert done.wait(10)
    launched.tokens()
    assert told == [(0, 2), (2, 3)]
    for page, content in enumerate(pages):
        whole = bytearray(engine.spec.block_bytes)
        engine.export_page(page, 0, 3, memoryview(whole))
        assert whole == content


def test_a_graph_is_what_it_was_recorded_from(
    engine: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same decode step, replayed and launched kernel by kernel."""
    prompt = [5, 9, 2, 44, 17]
    params = SamplingParams(temperature=0, logprobs=120)
    rows = []
    for replays in (True, False):
        if not replays:
            monkeypatch.setattr(engine._graphs, "fitting", lambda shape: None)
        engine.step([Slice(prompt, 0, [3, 9], (), 0)])
        draws = [Draw(params, 0, 0, (), ())]
        [[token]] = engine.step([Slice([8], 5, [3, 9], draws, 0)])
        rows.append({entry.token_id: entry.logprob for entry in token.top})
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
