"""Text of LLVM functions, built line by line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

LANES = 16
FloatKind = Literal["float", "bfloat", "half"]
FLOAT_BYTES: dict[FloatKind, int] = {"float": 4, "bfloat": 2, "half": 2}


class Emitter:
    """Lines of one function, with fresh names for values and labels."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._variables: list[str] = []
        self._names = 0

    def body(self) -> str:
        """The function's lines, its variables first: only there do they become registers."""
        return "\n".join([*self._variables, *self.lines])

    def name(self) -> str:
        """A name not used before."""
        self._names += 1
        return f"v{self._names}"

    def do(self, text: str) -> None:
        """An instruction without a result."""
        self.lines.append("  " + text)

    def let(self, text: str) -> str:
        """An instruction's result."""
        name = "%" + self.name()
        self.do(f"{name} = {text}")
        return name

    def at(self, base: str, offset: str, unit: int) -> str:
        """The address `offset` units of `unit` bytes after `base`."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {self.times(offset, unit)}")

    def times(self, value: str, factor: int | str) -> str:
        """An i64 product."""
        return value if factor == 1 else self.let(f"mul i64 {value}, {factor}")

    def plus(self, value: str, other: int | str) -> str:
        """An i64 sum."""
        return self.let(f"add i64 {value}, {other}")

    def splat(self, kind: str, value: str) -> str:
        """Sixteen times a scalar."""
        one = self.let(f"insertelement <16 x {kind}> poison, {kind} {value}, i32 0")
        return self.let(
            f"shufflevector <16 x {kind}> {one}, <16 x {kind}> poison, <16 x i32> zeroinitializer"
        )

    def variable(self, kind: str, value: str) -> str:
        """Memory for a value that loops change; the optimiser makes it a register."""
        place = "%" + self.name()
        self._variables.append(f"  {place} = alloca {kind}")
        self.do(f"store {kind} {value}, ptr {place}")
        return place

    @contextmanager
    def loop(self, start: str, end: str, step: int) -> Iterator[str]:
        """A counter from `start`, as long as a whole step fits before `end`."""
        with self.count(self.variable("i64", start), end, step) as now:
            yield now

    @contextmanager
    def count(self, counter: str, end: str, step: int) -> Iterator[str]:
        """Like `loop`, from what a variable holds; it holds what is left over afterwards."""
        test, body, done = self.name(), self.name(), self.name()
        self.do(f"br label %{test}")
        self.lines.append(f"{test}:")
        now = self.let(f"load i64, ptr {counter}")
        fits = self.let(f"icmp sle i64 {self.plus(now, step)}, {end}")
        self.do(f"br i1 {fits}, label %{body}, label %{done}")
        self.lines.append(f"{body}:")
        yield now
        self.do(f"store i64 {self.plus(now, step)}, ptr {counter}")
        self.do(f"br label %{test}")
        self.lines.append(f"{done}:")

    def load_wide(self, kind: FloatKind, base: str, at: str) -> str:
        """Sixteen numbers from element `at` of `base`, as floats."""
        size = FLOAT_BYTES[kind]
        value = self.let(f"load <16 x {kind}>, ptr {self.at(base, at, size)}, align {size}")
        if kind == "float":
            return value
        return self.let(f"fpext <16 x {kind}> {value} to <16 x float>")

    def fma(self, a: str, b: str, c: str) -> str:
        """a * b + c of sixteen floats, rounded once."""
        return self.let(
            "call <16 x float> @llvm.fma.v16f32("
            f"<16 x float> {a}, <16 x float> {b}, <16 x float> {c})"
        )


def constant(kind: str, value: str, lanes: int = LANES) -> str:
    """A literal in every lane."""
    return "<" + ", ".join([f"{kind} {value}"] * lanes) + ">"
