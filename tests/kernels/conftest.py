"""Kernels run in Triton's interpreter, on the CPU. Set before anything imports triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
