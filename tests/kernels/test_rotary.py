import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.head_codes import encode_reference
from splitserve_kernels.rotary import (
    rotate_and_store,
    rotate_and_store_codes,
    rotation,
    rotation_reference,
    store_reference,
    turn_reference,
)
from torch import Tensor

from splitserve.engine.page_memory import PlainPageMemory, QuantizedPageMemory
from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.layers.rotary import Rotary
from splitserve.models.rope import LinearRope, RopeConfig, YarnRope

CPU = torch.device("cpu")
BLOCK_TOKENS, LAYERS, PAGES = 4, 3, 7
KV_DTYPES: dict[torch.dtype, KvDtype] = {torch.float32: "float32", torch.float16: "float16"}
# A fused product and sum in fp32 is not what two operations give.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 0.0}


def draw_places(rows: int) -> tuple[Tensor, Tensor]:
    """Distinct pages and slots, int64."""
    places = torch.randperm(PAGES * BLOCK_TOKENS)[:rows]
    return places // BLOCK_TOKENS, places % BLOCK_TOKENS


def draw_heads(rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, heads + 2 * kv_heads, head_dim).to(dtype)


def poisoned(memory: PlainPageMemory | QuantizedPageMemory) -> Tensor:
    """The memory's bytes, all of them 0xFF: NaN in any type."""
    return memory._bytes.all.fill_(0xFF)


def sections(memory: QuantizedPageMemory, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of keys and values, then scales."""
    views = memory.layers()[layer]
    assert views.key_scales is not None
    assert views.value_scales is not None
    return views.keys, views.values, views.key_scales, views.value_scales


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 4]),
    sizes=st.sampled_from([(64, 64), (128, 128), (80, 20), (48, 32), (6, 6)]),
    interleaved=st.booleans(),
    keep_keys=st.booleans(),
    turned=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_the_layer_and_the_memory(
    rows: int,
    kv_heads: int,
    group: int,
    sizes: tuple[int, int],
    interleaved: bool,
    keep_keys: bool,
    turned: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    head_dim, dims = sizes
    heads = group * kv_heads
    qkv = draw_heads(rows, heads, kv_heads, head_dim, dtype)
    before = qkv.clone()
    queries, keys, values = qkv.split([heads, kv_heads, kv_heads], dim=1)
    rotary = Rotary(RopeConfig(10000.0, dims, None, interleaved), 512, dtype, CPU)
    turning = rotary.rotation(torch.randint(0, 500, (rows,)))
    shape = PageShape(LAYERS, BLOCK_TOKENS, kv_heads, head_dim, KV_DTYPES[dtype])
    memory, expected = (PlainPageMemory(shape, PAGES, CPU) for _ in range(2))
    out, wanted = poisoned(memory), poisoned(expected)
    pages, slots = draw_places(rows)

    right = before.clone()
    if turned:
        right[:, : heads + kv_heads] = rotary.turn(before[:, : heads + kv_heads], turning)
    places = pages * BLOCK_TOKENS + slots
    stored = torch.rand(rows) < 0.8
    rows_of = expected.token_rows(pages, slots)[stored]
    right_keys = right[:, heads : heads + kv_heads].clone()
    expected.write(1, rows_of, right_keys[stored], right[stored, heads + kv_heads :])
    if not keep_keys:
        right[:, heads : heads + kv_heads] = before[:, heads : heads + kv_heads]

    layer = memory.layers()[1]
    rotate_and_store(
        queries,
        keys,
        values,
        turning.cos if turned else None,
        turning.sin if turned else None,
        layer.keys,
        layer.values,
        torch.where(stored, places, -1),
        interleaved=interleaved,
        keep_keys=keep_keys,
    )
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(qkv, right, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        out.view(dtype), wanted.view(dtype), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def exact_heads(dtype: KvDtype, rows: int, kv_heads: int, head_dim: int) -> Tensor:
    """Numbers that are codes times a power of two, with the largest code in each head, so that
    nothing is rounded: the interpreter rounds to fp8 and bfloat16 in its own way.
    """
    scale = torch.randint(-6, 3, (rows, kv_heads, 1)).float().exp2()
    if dtype == "int8":
        codes = torch.randint(-127, 128, (rows, kv_heads, head_dim)).float()
        codes[..., 1] = 127
        return codes * scale
    numbers = torch.randint(0x28, 0x7F, (rows, kv_heads, head_dim), dtype=torch.uint8)
    numbers[..., 1] = 0xFE
    return numbers.view(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize(("head_dim", "dims"), [(64, 64), (48, 32), (80, None)])
def test_codes_equal_the_memory(dtype: KvDtype, head_dim: int, dims: int | None) -> None:
    rows, kv_heads, group = 5, 2, 3
    queries = torch.randn(rows, kv_heads * group, head_dim)
    keys, values = (exact_heads(dtype, rows, kv_heads, head_dim) for _ in range(2))
    values[2, 1] = 0
    shape = PageShape(LAYERS, BLOCK_TOKENS, kv_heads, head_dim, dtype)
    memory, expected = (QuantizedPageMemory(shape, PAGES, torch.float32, CPU) for _ in range(2))
    out, wanted = poisoned(memory), poisoned(expected)
    pages, slots = draw_places(rows)
    cos = sin = None
    if dims is not None:
        # Turned by nothing and by a quarter of a turn, which is exact too.
        quarter = torch.arange(dims // 2) % 2
        cos, sin = (1.0 - quarter).repeat(rows, 1, 2), quarter.float().repeat(rows, 1, 2)
        sin[..., : dims // 2] *= -1
    right = turn_reference(keys, cos, sin, interleaved=False)
    expected.write(2, expected.token_rows(pages, slots)[:4], right[:4], values[:4])
    places = pages * BLOCK_TOKENS + slots
    places[4] = -1
    rotate_and_store_codes(
        queries, keys, values, cos, sin, *sections(memory, 2), places, interleaved=False
    )
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_the_reference_encodes_as_the_memory(dtype: torch.dtype) -> None:
    names: dict[torch.dtype, KvDtype] = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
    source = torch.randn(6, 2, 32) * torch.randn(6, 2, 1).exp()
    memory = QuantizedPageMemory(
        PageShape(1, BLOCK_TOKENS, 2, 32, names[dtype]), PAGES, torch.float32, CPU
    )
    pages, slots = draw_places(6)
    memory.write(0, memory.token_rows(pages, slots), source, source)
    codes, scales = encode_reference(source, dtype)
    stored, _, stored_scales, _ = sections(memory, 0)
    assert torch.equal(stored.view(torch.uint8)[pages, slots], codes.view(torch.uint8))
    assert torch.equal(stored_scales[pages, slots], scales)


def test_a_nan_takes_its_whole_head() -> None:
    source = torch.randn(1, 2, 16)
    source[0, 1, 3] = torch.nan
    memory = QuantizedPageMemory(PageShape(1, 4, 2, 16, "int8"), 2, torch.float32, CPU)
    places = torch.tensor([5])
    rotate_and_store_codes(source.clone(), source, source, None, None, *sections(memory, 0), places)
    scales = sections(memory, 0)[2][1, 1]
    assert scales.isnan().flatten().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "scaling", [None, LinearRope(4.0), YarnRope(8.0, 1024, attention_factor=1.25)]
)
@pytest.mark.parametrize("dims", [20, 128])
def test_rotation(
    dtype: torch.dtype, interleaved: bool, scaling: LinearRope | YarnRope | None, dims: int
) -> None:
    config = RopeConfig(500000.0, dims, scaling, interleaved)
    positions = torch.tensor([0, 1, 77, 4096, 131071, 3, 1000003])
    rotary = Rotary(config, 8192, dtype, CPU).rotation(positions)
    inverse = torch.from_numpy(config.inverse_frequencies(8192))
    arguments = (positions, inverse, config.attention_factor, dtype)
    for made in (rotation, rotation_reference):
        cos, sin = made(*arguments, interleaved=interleaved)
        assert cos.shape == sin.shape == (7, 1, dims)
        tolerance = 2e-7 if dtype is torch.float32 else 2**-10
        torch.testing.assert_close(cos, rotary.cos, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(sin, rotary.sin, rtol=tolerance, atol=tolerance)


def test_rows_without_a_place_are_not_stored() -> None:
    pool = torch.full((2, 2, 1, 4), torch.nan)
    store_reference(torch.ones(3, 1, 4), pool, torch.tensor([-1, 3, -1]))
    assert pool.isfinite().flatten().nonzero().flatten().tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize(
    ("dims", "heads", "pool_heads", "named"),
    [(6, 4, 2, "6 dimensions"), (4, 3, 2, "go together"), (4, 4, 1, "pools")],
)
def test_what_does_not_fit_is_refused(dims: int, heads: int, pool_heads: int, named: str) -> None:
    cos = torch.ones(2, 1, dims)
    keys, pool = torch.zeros(2, 2, 4), torch.zeros(3, 4, pool_heads, 4)
    places = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=named):
        rotate_and_store(torch.zeros(2, heads, 4), keys, keys, cos, cos, pool, pool, places)
