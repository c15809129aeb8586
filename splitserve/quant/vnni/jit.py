"""Machine code for this processor, made by LLVM."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from splitserve.quant.vnni.module import module_text
from splitserve.quant.vnni.variant import OmpCalls, Variant

_NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512bf16")


class Product(Protocol):
    """`product` of `module`: addresses of plan, x, scratch and out, then rows and threads."""

    def __call__(
        self, plan: int, x: int, scratch: int, out: int, rows: int, threads: int, /
    ) -> None:
        """Releases the interpreter lock while it runs."""
        ...


@cache
def omp_calls() -> OmpCalls | None:
    """None where there is no llvmlite, no such processor, or torch has another OpenMP."""
    try:
        from llvmlite import binding

        features = binding.get_host_cpu_features()
    except (ImportError, RuntimeError):
        return None
    if sys.platform != "linux" or not all(features.get(name) for name in _NEEDED):
        return None
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:  # not the one that torch has loaded
            continue
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in names]
        return OmpCalls(*(function.value or 0 for function in functions))
    return None


@cache
def compiled(variant: Variant) -> Product:
    """A variant's code, which lives as long as the process. Takes about 0.2 s."""
    from llvmlite import binding

    omp = omp_calls()
    if omp is None:
        raise RuntimeError("this processor or its libraries cannot run such code")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(module_text(variant, omp))
    module.verify()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    builder = binding.create_pass_builder(
        machine, binding.create_pipeline_tuning_options(speed_level=2)
    )
    builder.getModulePassManager().run(module, builder)
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32)
    function: Any = kind(engine.get_function_address("product"))
    function.engine = engine  # the code goes when the engine goes
    product: Product = function
    return product
