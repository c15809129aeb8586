import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splitserve_kernels.fp8_rows import quantize_rows_fp8, quantize_rows_fp8_reference
from splitserve_kernels.norm import (
    NormKind,
    add_norm,
    add_norm_fp8,
    add_norm_fp8_reference,
    heads_norm,
)
from torch import Tensor

from splitserve.models.layers.norm import LayerNorm, Norm, RmsNorm, WideLayerNorm, WideRmsNorm

EPS = 1e-5
# The interpreter cuts bfloat16 off where a GPU rounds; `benchmarks/kernels/fused.py` checks it.
DTYPES = [torch.float32, torch.float16]
# One unit in the last place where the order of a sum of fp32 tipped a rounding.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-9}
# Of fewer numbers one rounding that tipped is more than the share that `assert_close` allows.
ENOUGH = 512


def layer(kind: NormKind, wide: bool, weight: Tensor, bias: Tensor | None) -> Norm:
    if kind == "layer":
        return (WideLayerNorm if wide else LayerNorm)(weight, bias, EPS)
    return (WideRmsNorm if wide else RmsNorm)(weight, EPS)


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Within a rounding, and mostly without any."""
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=TOLERANCE[out.dtype], atol=1e-6)
    if out.dtype is not torch.float32:
        assert (out == expected).float().mean() > 0.99


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 7, 64, 129, 576, 1536]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["rms", "layer"]),
    wide=st.booleans(),
    added=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_sum_and_norm_equal_the_layers(
    rows: int,
    width: int,
    dtype: torch.dtype,
    kind: NormKind,
    wide: bool,
    added: bool,
    biased: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows = max(rows, -(-ENOUGH // width))
    x = torch.randn(rows, 2 * width).to(dtype)[:, width:]
    delta = torch.randn(rows, width).to(dtype) if added else None
    weight_type = torch.float32 if wide else dtype
    weight = (1 + torch.randn(width)).to(weight_type)
    bias = torch.randn(width).to(weight_type) if biased and kind == "layer" else None
    out = torch.full((rows, width + 3), torch.nan, dtype=dtype)
    total, normed = add_norm(
        x, delta, weight, bias, EPS, kind=kind, wide_weight=wide, out=out[:, :width]
    )
    assert total is x if delta is None else torch.equal(total, x + delta)
    assert out[:, width:].isnan().all()
    # Norms of one or few numbers are differences of nearly equal ones.
    if width > 7 or kind == "rms":
        assert_close(normed, layer(kind, wide, weight, bias)(total))


def test_a_layer_norm_may_go_without_a_weight() -> None:
    x = torch.randn(3, 100)
    _, normed = add_norm(x, None, None, None, EPS, kind="layer", wide_weight=False)
    assert_close(normed, LayerNorm(None, None, EPS)(x))


def test_a_row_of_nan_stays_with_itself() -> None:
    x = torch.randn(3, 40)
    x[1, 5] = torch.nan
    _, normed = add_norm(x, None, torch.ones(40), None, EPS, kind="rms", wide_weight=False)
    assert normed[1].isnan().all()
    assert normed[[0, 2]].isfinite().all()


def exact_codes(*shape: int) -> Tensor:
    """Normal e4m3 numbers with 448 in each row: the interpreter does not round as a GPU does."""
    codes = torch.randint(0x08, 0x7F, shape, dtype=torch.uint8)
    codes += torch.randint(0, 2, shape, dtype=torch.uint8) * 0x80
    codes[:, shape[1] // 2] = 0x7E
    return codes.view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("step", [None, 2.0**-7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 128, 20000])
def test_rows_as_codes(dtype: torch.dtype, width: int, step: float | None) -> None:
    codes = exact_codes(5, width)
    x = (codes * 2.0**-7).to(dtype)
    x[1] = 0
    x[4, width // 3] = torch.nan
    out, steps = quantize_rows_fp8(x, step=step)
    expected, expected_steps = quantize_rows_fp8_reference(x, step=step)
    torch.testing.assert_close(steps, expected_steps, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[:4].float(), expected[:4].float())
    assert torch.equal(out[[0, 2, 3]].float(), codes[[0, 2, 3]])


def test_codes_beyond_a_fixed_step_saturate() -> None:
    codes, _ = quantize_rows_fp8(torch.tensor([[1000.0, -1000.0, 448.0]]), step=1.0)
    assert codes.float().tolist() == [[448, -448, 448]]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_as_codes(dtype: torch.dtype, kind: NormKind) -> None:
    x, delta = torch.randn(2, 4, 200).to(dtype)
    delta[2] = -x[2]
    arguments = (x, delta, torch.randn(200).to(dtype), None, EPS)
    total, codes, steps = add_norm_fp8(*arguments, kind=kind, wide_weight=False)
    expected = add_norm_fp8_reference(*arguments, kind=kind, wide_weight=False)
    assert torch.equal(total, expected[0])
    torch.testing.assert_close(steps, expected[2], rtol=TOLERANCE[dtype], atol=0)
    assert steps[2] == 1
    # As often as the interpreter rounds codes rightly.
    near = torch.isclose(codes.float(), expected[1].float(), rtol=2**-3, atol=1)
    assert near.float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (40, 128), (1, 80)])
def test_heads_in_place(
    dtype: torch.dtype, by_head: bool, kind: NormKind, heads: int, head_dim: int
) -> None:
    qkv = torch.randn(7, heads + 2, head_dim).to(dtype)
    before, part = qkv.clone(), qkv[:, 1 : heads + 1]
    wide = by_head or kind == "layer"
    weight = torch.randn((heads, head_dim) if by_head else (head_dim,))
    weight = weight.to(torch.float32 if wide else dtype)
    expected = layer(kind, wide, weight, None)(part)
    assert heads_norm(part, weight, None, EPS, kind=kind, wide_weight=wide) is part
    assert_close(part, expected)
    assert torch.equal(qkv[:, [0, -1]], before[:, [0, -1]])


@pytest.mark.parametrize(
    ("x", "weight", "kind", "named"),
    [
        (torch.zeros(2, 20000), torch.zeros(20000), "rms", "width 20000"),
        (torch.zeros(2, 8), torch.zeros(9), "rms", "shape"),
        (torch.zeros(2, 8), None, "rms", "RMS norm"),
        (torch.zeros(2, 8).double(), torch.zeros(8), "layer", "float64"),
    ],
)
def test_what_cannot_be_computed_is_refused(
    x: Tensor, weight: Tensor | None, kind: NormKind, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        add_norm(x, None, weight, None, EPS, kind=kind, wide_weight=False)
