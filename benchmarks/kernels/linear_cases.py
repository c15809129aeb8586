"""Products to check and to time: inputs, calls of the kernels, and the library's."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from splitserve_kernels import small_linear as wide
from splitserve_kernels import small_linear_fp8 as fp8
from splitserve_kernels import small_linear_int as ints
from splitserve_kernels.small_tiles import TOLERANCE, TilePlan
from torch import Tensor
from torch.nn import functional

GPU = torch.device("cuda")
KINDS = ("bf16", "fp8", "int8", "int4", "int4g32")
SHAPES = {
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
"""Llama-3.1-8B's, (n, k)."""

ROTATED_BYTES = 320 << 20
MOST_COPIES = 24


@dataclass
class Case:
    """One product over copies of its weight."""

    kind: str
    m: int
    n: int
    k: int
    gated: bool
    weights: list[Tensor] | list[ints.PackedCodes]
    scales: Tensor
    x: Tensor
    steps: Tensor
    wide: list[Tensor] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        """Codes and scales of one copy."""
        weight = self.weights[0]
        if isinstance(weight, ints.PackedCodes):
            return weight.codes.nbytes + weight.steps.nbytes
        return weight.nbytes + (self.scales.nbytes if self.kind == "fp8" else 0)

    @property
    def moved_bytes(self) -> int:
        """The least that a product reads and writes."""
        columns = self.n // 2 if self.gated else self.n
        return self.weight_bytes + self.x.nbytes + 2 * self.m * columns

    def chosen(self) -> TilePlan | None:
        """The plan to prefer to the library, if any."""
        if isinstance(self.weights[0], ints.PackedCodes):
            weight = self.weights[0]
            kind = {"bits": weight.bits, "group": weight.group}
            return ints.choose_int(self.m, self.n, self.k, **kind, num_processors=132)
        fixed = {"num_processors": 132, "gated": self.gated}
        if self.kind == "fp8":
            return fp8.choose_fp8(self.m, self.n, self.k, **fixed)
        return wide.choose(self.m, self.n, self.k, self.x.dtype, **fixed)

    def call(
        self, copy: int, plan: TilePlan | None, *, early: bool, out: Tensor | None = None
    ) -> Callable[[], Tensor]:
        """The kernel over one copy."""
        weight, rest = self.weights[copy], {"plan": plan, "early": early, "out": out}
        if isinstance(weight, ints.PackedCodes):
            return lambda: ints.small_linear_int(self.x, weight, **rest)
        if self.kind == "fp8":
            codes = (self.x, self.steps, weight, self.scales)
            if self.gated:
                return lambda: fp8.small_gated_linear_fp8(*codes, "silu", **rest)
            return lambda: fp8.small_linear_fp8(*codes, **rest)
        if self.gated:
            return lambda: wide.small_gated_linear(self.x, weight, "silu", **rest)
        return lambda: wide.small_linear(self.x, weight, **rest)

    def library(self, copy: int) -> Callable[[], Tensor]:
        """The library's product alone, without the gate, and of wide numbers for integers."""
        weight = self.weights[copy]
        if isinstance(weight, ints.PackedCodes):
            if not self.wide:
                first = ints.unpack(weight).to(self.x.dtype)
                self.wide = [first, *(first.clone() for _ in range(_copies(first.nbytes) - 1))]
            wide_copy = self.wide[copy % len(self.wide)]
            return lambda: functional.linear(self.x, wide_copy)
        if self.kind == "fp8":
            steps, scales = self.steps.view(-1, 1), self.scales.view(1, -1)
            return lambda: torch._scaled_mm(
                self.x, weight.t(), steps, scales, out_dtype=torch.bfloat16
            )
        return lambda: functional.linear(self.x, weight)

    def exact(self) -> Tensor:
        """The result in fp32."""
        weight = self.weights[0]
        if isinstance(weight, ints.PackedCodes):
            return ints.small_linear_int_reference(self.x, weight)
        if self.kind == "fp8":
            codes = (self.x, self.steps, weight, self.scales)
            if self.gated:
                return fp8.small_gated_linear_fp8_reference(*codes, "silu")
            return fp8.small_linear_fp8_reference(*codes)
        if self.gated:
            return wide.small_gated_linear_reference(self.x, weight, "silu")
        return wide.small_linear_reference(self.x, weight)


def make_case(
    kind: str,
    m: int,
    n: int,
    k: int,
    *,
    gated: bool = False,
    copies: int | None = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Random inputs. Without `copies`, as many as a timing rotates over."""
    x = torch.randn(m, k, device=GPU)
    steps = torch.rand(m, device=GPU) + 0.5
    scales = (torch.rand(n, device=GPU) + 0.5) / k**0.5
    if kind.startswith("int"):
        packed = _packed(kind, n, k)
        count = copies or _copies(packed.codes.nbytes)
        rest = (replace(packed, codes=packed.codes.clone()) for _ in range(count - 1))
        return Case(kind, m, n, k, False, [packed, *rest], scales, x.to(dtype), steps)
    weight = torch.randn(n, k, device=GPU)
    if kind == "fp8":
        x, weight = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    else:
        x, weight = x.to(dtype), (weight / k**0.5).to(dtype)
    count = copies or _copies(weight.nbytes)
    weights = [weight, *(weight.clone() for _ in range(count - 1))]
    return Case(kind, m, n, k, gated, weights, scales, x, steps)


def _packed(kind: str, n: int, k: int) -> ints.PackedCodes:
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), device=GPU, dtype=torch.int8)
        return ints.pack_int8(codes, torch.rand(n, 1, device=GPU) + 0.5)
    group = 32 if kind == "int4g32" else 128
    codes = torch.randint(0, 16, (n, k), device=GPU, dtype=torch.int8)
    scales = torch.rand(n, k // group, device=GPU) + 0.5
    return ints.pack_int4(codes, scales, torch.randint(0, 16, scales.shape, device=GPU))


def _copies(size: int) -> int:
    return min(MOST_COPIES, max(2, -(-ROTATED_BYTES // size)))


CHECKS = [
    (sides, gated, splits, tma)
    for sides in ((1, 640, 1024), (64, 384, 1008), (13, 200, 544))
    for gated, splits, tma in itertools.product((False, True), (1, 3), (False, True))
    # A descriptor's tile of the gate must not reach into the other half.
    if not (tma and gated and sides[1] // 2 % 64)
]
"""Plain and gated, whole and split, by pointers and by descriptors."""


def checks_of(kind: str) -> int:
    """How many checks there are."""
    return len(CHECKS) * len(_types(kind))


def check(kind: str, number: int) -> dict[str, object]:
    """Fresh inputs, an output of NaN, and the same bits twice."""
    (m, n, k), gated, splits, tma = CHECKS[number % len(CHECKS)]
    dtype = _types(kind)[number // len(CHECKS)]
    warps = 4
    if kind.startswith("int"):
        # No gate and no descriptors: other sides, and whole or half the warps.
        k, gated, warps, tma = 768, False, 2 if tma else 4, False
    side = 8 if m == 1 and kind == "bf16" else 16 if m <= 16 else 64
    block_k = 32 if dtype is torch.float32 else 128 if kind == "fp8" else 64
    precise = fp8.PRECISE_K if kind == "fp8" else 0
    plan = TilePlan(side, 64, block_k, splits, warps, 3, 4, tma, precise)
    case = make_case(kind, m, n, k, gated=gated, dtype=dtype)
    columns = case.n // 2 if case.gated else case.n
    entry: dict[str, object] = {
        "kind": case.kind,
        "dtype": str(dtype),
        "shape": (m, n, k),
        "gated": gated,
        "plan": str(plan),
    }
    try:
        out = torch.full((case.m, columns), torch.nan, dtype=dtype, device=GPU)
        case.call(0, plan, early=True, out=out)()
        exact = case.exact()
        errors = ((out.float() - exact).norm(dim=1) / exact.norm(dim=1)).nan_to_num(torch.inf)
        again = case.call(0, plan, early=True)()
        same = torch.equal(again, out) and _replays(case.call(0, plan, early=True, out=out), out)
        limit = TOLERANCE[dtype] * (2 if case.gated else 1)
        entry["error"] = float(errors.max())
        entry["ok"] = float(errors.max()) <= limit and same
    except Exception as error:
        entry["error"], entry["ok"] = repr(error)[:200], False
    return entry


def _replays(call: Callable[[], object], out: Tensor) -> bool:
    """Whether a graph of two calls gives the same bits as before, each of the times it is run."""
    before = out.clone()
    graph = torch.cuda.CUDAGraph()
    # A stream's counters are made by its first product, which cannot be recorded.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
        call()
    same = True
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        same = same and torch.equal(out, before)
    return same


def _types(kind: str) -> list[torch.dtype]:
    if kind == "bf16":
        return [torch.bfloat16, torch.float16, torch.float32]
    return [torch.bfloat16] if kind == "fp8" else [torch.bfloat16, torch.float16]
