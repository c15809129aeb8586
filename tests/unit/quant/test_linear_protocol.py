import torch

from splitserve.quant.linear_protocol import CodedRows, rows_of


def test_rows_are_taken_of_codes_and_of_numbers() -> None:
    x, numbers = torch.arange(12.0).view(4, 3), torch.tensor([3, 0, 3])
    assert torch.equal(rows_of(x, numbers), x[[3, 0, 3]])
    coded = rows_of(CodedRows(x.to(torch.float8_e4m3fn), x[:, :1]), numbers)
    assert isinstance(coded, CodedRows)
    assert torch.equal(coded.codes.float(), x[[3, 0, 3]])
    assert torch.equal(coded.steps, x[[3, 0, 3], :1])
