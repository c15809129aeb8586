from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from splitserve.weights.dense import DenseMatrix, find_dense_tensor, read_dense_tensor
from splitserve.weights.safetensors_file import read_safetensors
from splitserve.weights.source import MatrixSource, TensorSource
from splitserve.weights.stored import Headers


def spans(size: int):
    one = st.builds(
        lambda a, b, step: range(min(a, b), max(a, b) + 1, step),
        st.integers(0, size - 1), st.integers(0, size - 1), st.integers(1, 2),
    )  # fmt: skip
    return st.none() | st.lists(one, min_size=1, max_size=3).map(tuple)


def numbers(rows: tuple[range, ...] | None, size: int) -> list[int]:
    return [n for span in rows or [range(size)] for n in span]


def save(directory, tensor: torch.Tensor) -> Headers:
    path = directory / "model.safetensors"
    save_file({"w": tensor.contiguous()}, path)
    return Headers(path, read_safetensors(path))


DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
EACH = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EACH
@given(data=st.data())
def test_a_part_of_a_matrix(tmp_path, data):
    """Any rows and columns, stored either way round, alone or in a stack."""
    height, width, stack = (data.draw(st.integers(1, most)) for most in (9, 9, 3))
    stored = torch.randn(stack, height, width).to(data.draw(DTYPES))
    transposed, stacked = data.draw(st.booleans()), data.draw(st.booleans())
    index = data.draw(st.integers(0, stack - 1)) if stacked else 0
    tensor = stored.transpose(1, 2) if transposed else stored
    headers = save(tmp_path, tensor if stacked else tensor[0])
    columns = data.draw(spans(width))
    source = MatrixSource(
        name="w",
        shape=(height, width),
        rows=data.draw(spans(height)),
        columns=columns[0] if columns else None,
        transposed=transposed,
        index=index,
        stack=stack if stacked else 0,
    )
    dtype = data.draw(DTYPES)
    got = DenseMatrix.find(headers, source).read(dtype)
    expected = stored[index][numbers(source.rows, height)]
    expected = expected[:, list(source.columns or range(width))].to(dtype)
    assert got.is_contiguous()
    assert got.shape == source.read_shape
    assert torch.equal(got, expected)


@EACH
@given(data=st.data())
def test_rows_of_a_tensor(tmp_path, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    stack = data.draw(st.integers(0, 3))
    tensor = torch.randn((stack, *shape) if stack else shape).to(data.draw(DTYPES))
    index = data.draw(st.integers(0, stack - 1)) if stack else 0
    source = TensorSource("w", shape, data.draw(spans(shape[0])), index, stack)
    stored = find_dense_tensor(save(tmp_path, tensor), source)
    got = read_dense_tensor(stored, source, torch.float32)
    expected = (tensor[index] if stack else tensor)[numbers(source.rows, shape[0])].float()
    assert got.shape == source.read_shape
    assert torch.equal(got, expected)
