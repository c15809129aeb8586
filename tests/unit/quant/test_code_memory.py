"""Products in a process that may not run code that it makes."""

from __future__ import annotations

import subprocess
import sys

import pytest

_UNDER_MDWE = """
import ctypes, sys
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
    sys.exit(77)
from dataclasses import replace
import torch
from splitserve.models.linear import choose_products
from splitserve.quant.linear import make_quantized_linear
from splitserve.quant.quantizers import quantize_fp8, quantize_int4, quantize_int8
from splitserve.quant.vnni.linear import VnniLinear

weight = torch.linspace(-1, 1, 40 * 64).view(40, 64)
rounded = replace(quantize_int8(weight), quantizes_input=True)
x = torch.linspace(-1, 2, 40 * 64).view(40, 64).bfloat16()
for matrix in (quantize_int8(weight), quantize_int4(weight, 32), quantize_fp8(weight), rounded):
    assert not VnniLinear.takes(matrix, torch.bfloat16)
    product = make_quantized_linear(matrix, None, torch.bfloat16, torch.device("cpu"))
    wanted = x.float() @ matrix.dequantize(torch.float32).T
    for rows in (1, 40):
        error = (product(x[:rows]).float() - wanted[:rows]).abs().max()
        assert error <= 2e-2 * wanted.abs().max(), (matrix.kind, rows, error)
dense = weight.bfloat16()
products = choose_products(torch.bfloat16, torch.device("cpu"), deterministic=False)
wanted = x.float() @ dense.float().T
error = (products.projection(dense, None)(x).float() - wanted).abs().max()
assert error <= 2e-2 * wanted.abs().max(), error
"""


def test_where_written_memory_may_not_be_executed_the_library_is_taken() -> None:
    child = subprocess.run(
        [sys.executable, "-c", _UNDER_MDWE], capture_output=True, text=True, timeout=60
    )
    if child.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert child.returncode == 0, child.stderr
    assert child.stderr.count("written memory may not be executed") == 1
