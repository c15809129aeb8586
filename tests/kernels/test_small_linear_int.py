import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.small_linear_int import (
    PackedCodes,
    choose_int,
    pack_int4,
    pack_int8,
    small_linear_int,
    small_linear_int_reference,
    unpack,
)
from splitserve_kernels.small_tiles import TOLERANCE, TilePlan

from .linear_inputs import draw, poisoned, worst_error


def random_int4(
    n: int, k: int, group: int, seed: int, *, signed: bool = False
) -> tuple[PackedCodes, torch.Tensor]:
    """A packed weight and what it should be, with steps that bf16 could not hold."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.int8)
    scales = (torch.rand(n, k // group, generator=generator) + 0.5).half().float()
    zeros = None
    if signed:
        codes -= 8
    else:
        zeros = torch.randint(0, 16, scales.shape, generator=generator).float()
    wide = codes.float().view(n, -1, group) - (0 if zeros is None else zeros[:, :, None])
    return pack_int4(codes, scales, zeros), (wide * scales[:, :, None]).view(n, k)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_is_exact(group: int, signed: bool) -> None:
    packed, weight = random_int4(7, 4 * group, group, seed=group, signed=signed)
    assert torch.equal(unpack(packed), weight)
    assert packed.codes.numel() * 2 == weight.numel()
    assert (packed.shape, packed.group) == (weight.shape, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("splits", [1, 3])
def test_int4(dtype: torch.dtype, group: int, splits: int) -> None:
    m, n, k = 5, 100, 6 * group
    packed, weight = random_int4(n, k, group, seed=group)
    x, bias = draw(m, k, dtype=dtype, seed=1), draw(n, dtype=dtype, seed=2)
    out = poisoned(m, n, dtype)
    plan = TilePlan(16, 64, 64, splits)
    assert small_linear_int(x, packed, bias=bias, out=out, plan=plan) is out
    exact = x.float() @ weight.t() + bias.float()
    assert worst_error(out, exact) <= TOLERANCE[dtype]
    reference = small_linear_int_reference(x, packed, bias=bias)
    assert worst_error(reference, exact) <= 2**-20


@settings(max_examples=10, deadline=None)
@given(
    m=st.integers(1, 64),
    n=st.integers(16, 150),
    groups=st.integers(1, 3),
    group=st.sampled_from([64, 128, 192]),
    splits=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_int8(m: int, n: int, groups: int, group: int, splits: int, seed: int) -> None:
    k = groups * group
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = torch.rand(n, groups, generator=generator).bfloat16().float() + 0.5
    weight = (codes.float().view(n, groups, group) * scales[:, :, None]).view(n, k)
    packed = pack_int8(codes, scales)
    assert (unpack(packed) - weight).abs().max() <= weight.abs().max() * 2**-15
    x, out = draw(m, k, dtype=torch.float32, seed=seed), poisoned(m, n, torch.float32)
    small_linear_int(x, packed, out=out, plan=TilePlan(64, 64, 64, splits))
    assert worst_error(out, x @ unpack(packed).t()) <= TOLERANCE[torch.float32]


def test_views_and_the_chosen_plan() -> None:
    packed, weight = random_int4(96, 256, 32, seed=9)
    x = draw(3, 300, dtype=torch.float16, seed=4)[:, 20:276]
    out = small_linear_int(x, packed)
    assert worst_error(out, x.float() @ weight.t()) <= TOLERANCE[torch.float16]
    plan = choose_int(1, 4096, 4096, bits=4, group=128, num_processors=132)
    assert plan.splits * 4096 // plan.block_n >= 132


def test_what_cannot_be_packed_or_computed_is_refused() -> None:
    codes, scales = torch.zeros(4, 128, dtype=torch.int8), torch.ones(4, 2)
    with pytest.raises(ValueError, match="not nibbles"):
        pack_int4(codes + 16, scales)
    with pytest.raises(ValueError, match="cannot be packed"):
        pack_int4(codes, torch.ones(4, 1))
    with pytest.raises(ValueError, match="whole numbers"):
        pack_int4(codes, scales, scales / 2)
    with pytest.raises(ValueError, match="do not go together"):
        pack_int8(codes, torch.ones(3, 1))
    packed = pack_int4(codes, scales)
    with pytest.raises(ValueError, match="do not go together"):
        small_linear_int(torch.zeros(1, 64), packed)
    with pytest.raises(ValueError, match="has 65 rows"):
        small_linear_int(torch.zeros(65, 128), packed)
    with pytest.raises(ValueError, match="float64"):
        small_linear_int(torch.zeros(1, 128, dtype=torch.float64), packed)
