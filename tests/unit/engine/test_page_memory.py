"""Pages of keys and values: what is written comes back, as near as its type allows."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from splitserve.engine.page_memory import PageMemory, open_page_memory
from splitserve.engine.protocol import Draw, Slice
from splitserve.engine.torch_engine import TorchEngine
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.sampling import SamplingParams

from ...tiny_model import make_engine

CPU = torch.device("cpu")
NUM_PAGES = 12
QUANTIZED: tuple[KvDtype, ...] = ("fp8", "int8")
KV_DTYPES: tuple[KvDtype, ...] = ("float32", "bfloat16", "float16", *QUANTIZED)
# What the model computes in: with plain pages it is what they hold.
COMPUTE = {"bfloat16": torch.bfloat16, "float16": torch.float16}
LOGPROBS = 120


@dataclass(frozen=True)
class Written:
    """A memory, the pages that it was given tokens in, and these: (layers, tokens, heads, size)."""

    shape: PageShape
    memory: PageMemory
    pages: Tensor
    keys: Tensor
    values: Tensor


def vectors(count: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Heads of a token differ in size by a factor of up to a million; some are all zeros."""
    values = torch.randn(count, generator=generator)
    sizes = 10 ** (torch.rand(count[:-1], generator=generator) * 6 - 3)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.1] = 0
    return values * sizes[..., None]


def write(shape: PageShape, num_tokens: int, seed: int, compute: torch.dtype) -> Written:
    """A sequence's tokens in pages of any order, in two runs a layer, the later tokens first."""
    generator = torch.Generator().manual_seed(seed)
    memory = open_page_memory(shape, NUM_PAGES, compute, CPU)
    count = -(-num_tokens // shape.block_tokens)
    pages = torch.randperm(NUM_PAGES, generator=generator)[:count]
    size = (shape.num_layers, num_tokens, shape.num_kv_heads, shape.head_dim)
    keys, values = (vectors(size, generator).to(compute) for _ in range(2))
    positions = torch.arange(num_tokens)
    rows = memory.token_rows(pages[positions // shape.block_tokens], positions % shape.block_tokens)
    middle = num_tokens // 2
    for part in (slice(middle, None), slice(0, middle)):
        for layer in range(shape.num_layers):
            memory.write(layer, rows[part], keys[layer, part], values[layer, part])
    return Written(shape, memory, pages, keys, values)


def gathered(memory: PageMemory, layer: int, pages: Tensor, num_tokens: int) -> list[Tensor]:
    """Keys and values of one sequence's tokens, (tokens, heads, size)."""
    return [part[0].transpose(0, 1)[:num_tokens] for part in memory.gather(layer, pages[None])]


def bound(exact: Tensor, dtype: KvDtype) -> Tensor:
    """The error that each number may have, by its own head of its own token.

    Half a step of the codes, or what the largest loses where its scale was rounded down.
    """
    wide = exact.double()
    peak = wide.abs().amax(-1, keepdim=True)
    most = 127.0 if dtype == "int8" else 448.0
    scale = (peak / most).to(torch.bfloat16).double()
    # Steps of e4m3 are an eighth of a power of two, below 2**-6 all of them 2**-9.
    step = scale if dtype == "int8" else torch.maximum(wide.abs() / 8, scale * 2**-9)
    cut_off = (wide.abs() - most * scale).clamp_min(0)
    return torch.maximum(step / 2 * (1 + 2**-7), cut_off) + peak * 1e-6


SHAPES = st.builds(
    PageShape,
    num_layers=st.integers(1, 3),
    block_tokens=st.integers(1, 6),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from(KV_DTYPES),
)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, tokens=st.integers(1, 12), seed=st.integers(0, 1 << 30))
def test_what_is_written_is_gathered(shape: PageShape, tokens: int, seed: int) -> None:
    compute = COMPUTE.get(shape.dtype, torch.float32)
    written = write(shape, tokens, seed, compute)
    for layer in range(shape.num_layers):
        found = gathered(written.memory, layer, written.pages, tokens)
        for got, exact in zip(found, (written.keys[layer], written.values[layer]), strict=True):
            assert got.dtype is compute
            if not shape.is_quantized:
                assert torch.equal(got, exact)
            else:
                assert ((got.double() - exact.double()).abs() <= bound(exact, shape.dtype)).all()


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, tokens=st.integers(1, 12), seed=st.integers(0, 1 << 30), data=st.data())
def test_pages_go_on_in_another_memory(
    shape: PageShape, tokens: int, seed: int, data: st.DataObject
) -> None:
    """Exported in runs of layers, inserted elsewhere: the same bits are gathered."""
    compute = COMPUTE.get(shape.dtype, torch.float32)
    written = write(shape, tokens, seed, compute)
    target = open_page_memory(shape, NUM_PAGES, compute, CPU)
    places = torch.tensor(
        data.draw(st.permutations(range(NUM_PAGES)))[: len(written.pages)], dtype=torch.int64
    )
    cut = data.draw(st.integers(0, shape.num_layers))
    for page, place in zip(written.pages.tolist(), places.tolist(), strict=True):
        content = bytearray(shape.page_bytes)
        first = cut * shape.layer_bytes
        written.memory.export(page, 0, cut, memoryview(content)[:first])
        written.memory.export(page, cut, shape.num_layers, memoryview(content)[first:])
        target.insert(place, memoryview(content))
    for layer in range(shape.num_layers):
        here = gathered(written.memory, layer, written.pages, tokens)
        there = gathered(target, layer, places, tokens)
        assert torch.equal(here[0], there[0])
        assert torch.equal(here[1], there[1])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_a_page_is_laid_out_as_its_shape_says(dtype: KvDtype) -> None:
    """Layers one after another; in each keys, values, and where there are any both's scales."""
    shape = PageShape(2, 2, 1, 4, dtype)
    memory = open_page_memory(shape, 3, torch.float32, CPU)
    rows = memory.token_rows(torch.tensor([1, 1]), torch.tensor([0, 1]))
    compute = COMPUTE.get(dtype, torch.float32)
    keys = torch.full((2, 1, 4), 2.0, dtype=compute)
    memory.write(1, rows, keys, -2 * keys)
    content = bytearray(shape.page_bytes)
    memory.export(1, 0, 2, memoryview(content))
    layer = content[shape.layer_bytes :]
    assert content[: shape.layer_bytes] == bytes(shape.layer_bytes)
    keys_end, values_end = 2 * shape.sections[0], 4 * shape.sections[0]
    assert len(layer) == values_end + (8 if shape.is_quantized else 0)
    if shape.is_quantized:
        code_dtype, most = (torch.int8, 127.0) if dtype == "int8" else (torch.float8_e4m3fn, 448.0)
        codes = torch.frombuffer(layer[:values_end], dtype=code_dtype).float()
        scales = torch.frombuffer(layer[values_end:], dtype=torch.bfloat16)
        assert codes.tolist() == [most] * 8 + [-most] * 8
        near = torch.tensor([2 / most, 2 / most, 4 / most, 4 / most]).bfloat16()
        assert torch.equal(scales, near)
    else:
        assert torch.equal(torch.frombuffer(layer[:keys_end], dtype=compute), keys.flatten())
        found = torch.frombuffer(layer[keys_end:], dtype=compute)
        assert torch.equal(found, -2 * keys.flatten())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_scale_is_that_of_one_head_of_one_token(dtype: KvDtype) -> None:
    """A neighbour a million times as large costs nothing."""
    shape = PageShape(1, 2, 2, 8, dtype)
    memory = open_page_memory(shape, 2, torch.float32, CPU)
    small = torch.linspace(-1e-3, 1e-3, 8)
    keys = torch.full((2, 2, 8), 1e3)
    keys[1, 0] = small
    rows = memory.token_rows(torch.tensor([1, 1]), torch.tensor([0, 1]))
    memory.write(0, rows, keys, keys)
    for part in gathered(memory, 0, torch.tensor([1]), 2):
        assert (part[1, 0] - small).abs().max() < 5e-5
        assert (part[0] - 1e3).abs().max() < 5


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_and_numbers_too_small_for_a_scale(dtype: KvDtype) -> None:
    memory = open_page_memory(PageShape(1, 1, 1, 4, dtype), 1, torch.float32, CPU)
    rows = memory.token_rows(torch.tensor([0]), torch.tensor([0]))
    for value in (0.0, 1e-42, -1e-39):
        keys = torch.full((1, 1, 4), value)
        memory.write(0, rows, keys, keys)
        for part in gathered(memory, 0, torch.tensor([0]), 1):
            assert (part - value).abs().max() <= 2 * abs(value)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_several_sequences_share_a_page(dtype: KvDtype) -> None:
    """(sequences, heads, tokens, size), pages in each table's own order."""
    shape = PageShape(2, 3, 2, 4, dtype)
    written = write(shape, 9, seed=5, compute=torch.float32)
    a, b, c = written.pages.tolist()
    keys, values = written.memory.gather(1, torch.tensor([[a, b], [c, a]]))
    assert keys.shape == values.shape == (2, 2, 6, 4)
    whole = gathered(written.memory, 1, written.pages, 9)
    for found, expected in zip((keys, values), whole, strict=True):
        assert torch.equal(found[0].transpose(0, 1), expected[:6])
        assert torch.equal(found[1, :, :3].transpose(0, 1), expected[6:])
        assert torch.equal(found[1, :, 3:].transpose(0, 1), expected[:3])


def score(engine: TorchEngine, tokens: list[int], pages: list[int], chunks: list[int]) -> Tensor:
    starts = [sum(chunks[:index]) for index in range(len(chunks))]
    parts = [
        engine.score(Slice(tokens[start : start + count], start, pages, ()))
        for start, count in zip(starts, chunks, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_chunks_read_what_the_whole_prompt_reads(kv_dtype: KvDtype, deterministic: bool) -> None:
    """Codes, in a chunk as before it: nothing depends on where a prompt was cut."""
    prompt = [(7 * i) % 120 for i in range(22)]
    whole, cut, plain = (
        make_engine(deterministic=deterministic, kv_dtype=dtype)
        for dtype in (kv_dtype, kv_dtype, None)
    )
    expected = score(whole, prompt, list(range(6)), [22])
    found = score(cut, prompt, [9, 3, 60, 1, 22, 8], [8, 12, 1, 1])
    if deterministic:
        assert torch.equal(found, expected)
    else:
        # A code on the edge of two may be rounded either way.
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
    unrounded = score(plain, prompt, list(range(6)), [22])
    lost = (expected - unrounded).square().mean().sqrt() / unrounded.std()
    assert 0 < lost < (0.01 if kv_dtype == "int8" else 0.05)


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_exported_pages_give_the_same_tokens_in_another_engine(kv_dtype: KvDtype) -> None:
    prompt = [(3 * i) % 120 for i in range(9)]
    source, target = (make_engine(deterministic=True, kv_dtype=kv_dtype) for _ in range(2))
    source.step([Slice(prompt[:8], 0, [5, 6], ())])
    for page, place in ((5, 40), (6, 2)):
        content = bytearray(source.spec.block_bytes)
        source.export_page(page, 0, 3, memoryview(content))
        target.insert_page(place, memoryview(content))
    assert greedy(source, prompt, [5, 6, 7, 8]) == greedy(target, prompt, [40, 2, 0, 9])


def greedy(engine: TorchEngine, prompt: list[int], pages: list[int]) -> list[object]:
    """Tokens and all log-probabilities of seven that follow, whose first chunk has been done."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=LOGPROBS, ignore_eos=True)
    drawn, tokens = [], list(prompt)
    while len(tokens) < 16:
        draws = [Draw(params, 0, 0, prompt, ())]
        [[token]] = engine.step([Slice(tokens[-1:], len(tokens) - 1, pages, draws)])
        tokens.append(token.token_id)
        drawn.append(token)
    return [*drawn]
