"""Machine code for this processor, made by LLVM."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch

from splitserve.quant.code_memory import may_run_made_code
from splitserve.quant.vnni.module import module_text
from splitserve.quant.vnni.variant import OmpCalls, Variant

_log = logging.getLogger(__name__)

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
    """None where made code cannot run, so that products take the library's kernels.

    That is without llvmlite, without such a processor, where torch has another OpenMP, or where
    memory that was written may not be executed.
    """
    try:
        from llvmlite import binding

        features = binding.get_host_cpu_features()
    except (ImportError, OSError, RuntimeError):
        return None
    if sys.platform != "linux" or not all(features.get(name) for name in _NEEDED):
        return None
    if not may_run_made_code():
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
def _warn_once(reason: str) -> None:
    _log.warning("quantised products take the library's slower kernels: %s", reason)


@cache
def compiled(variant: Variant) -> Product | None:
    """A variant's code, which lives as long as the process. Takes about 0.2 s.

    None where `omp_calls` is None or LLVM fails, which is logged.
    """
    omp = omp_calls()
    if omp is None:
        return None
    try:
        return _compile(variant, omp)
    except (AttributeError, OSError, RuntimeError) as error:  # the first: another llvmlite
        _warn_once(f"LLVM cannot make code: {error}")
        return None


def _compile(variant: Variant, omp: OmpCalls) -> Product:
    from llvmlite import binding

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
    address = engine.get_function_address("product")
    if not address:
        raise RuntimeError("there is no product in it")
    function: Any = kind(address)
    function.engine = engine  # the code goes when the engine goes
    product: Product = function
    return product
