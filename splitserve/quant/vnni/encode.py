"""Inputs from bf16 to fixed point."""

from __future__ import annotations

from splitserve.quant.vnni.emitter import LANES, Emitter, constant
from splitserve.quant.vnni.variant import Variant


def encode_function(variant: Variant) -> str:
    """`encode`: one row of `groups * group` columns as planes, sums and a step."""
    e = Emitter()
    columns = e.times("%groups", "%group")
    factor = e.splat("float", _factor(e, variant, columns))
    last_plane = e.at("%planes", e.times(columns, variant.planes - 1), 1)
    with e.loop("0", "%groups", 1) as group:
        first = e.times(group, "%group")
        total = e.variable("<16 x i32>", "zeroinitializer")
        with e.loop(first, e.plus(first, "%group"), LANES) as k:
            value = _fixed_point(e, variant, k, factor)
            before = e.let(f"load <16 x i32>, ptr {total}")
            e.do(f"store <16 x i32> {e.let(f'add <16 x i32> {before}, {value}')}, ptr {total}")
            _store_bytes(e, last_plane, k, value)
            if variant.planes == 2:
                rounded = e.let(f"add <16 x i32> {value}, {constant('i32', '128')}")
                high = e.let(f"lshr <16 x i32> {rounded}, {constant('i32', '8')}")
                _store_bytes(e, "%planes", k, high)
        parts = e.let(f"load <16 x i32>, ptr {total}")
        whole = e.let(f"call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> {parts})")
        whole = e.let(f"sitofp i32 {whole} to float")
        e.do(f"store float {whole}, ptr {e.at('%sums', group, 4)}")
    return f"""define internal void @encode(ptr %x, ptr %planes, ptr %sums, ptr %step,
  i64 %groups, i64 %group, float %fixed) {{
{e.body()}
  ret void
}}
"""


def _factor(e: Emitter, variant: Variant, columns: str) -> str:
    """What inputs are multiplied by; its inverse, the step, is stored. For zeros, both are 0."""
    most = _peak(e, columns)
    if variant.inputs == "fixed":
        # Codes cannot say NaN: the step says it for the whole row, as a row's own step does.
        lost = e.let(f"fcmp uno float {most}, 0.0")
        e.do(f"store float {e.let(f'select i1 {lost}, float {most}, float %fixed')}, ptr %step")
        return e.let("fdiv float 1.0, %fixed")
    e.do(f"store float {e.let(f'fdiv float {most}, {variant.input_most}')}, ptr %step")
    factor = e.let(f"fdiv float {variant.input_most}, {most}")
    empty = e.let(f"fcmp oeq float {most}, 0.0")
    return e.let(f"select i1 {empty}, float 0.0, float {factor}")


def _peak(e: Emitter, columns: str) -> str:
    """The row's largest magnitude: bf16 without a sign orders like an integer, NaN the highest."""
    peak = e.variable("<16 x i16>", "zeroinitializer")
    with e.loop("0", columns, LANES) as k:
        bits = e.let(f"load <16 x i16>, ptr {e.at('%x', k, 2)}, align 2")
        size = e.let(f"and <16 x i16> {bits}, {constant('i16', '32767')}")
        before = e.let(f"load <16 x i16>, ptr {peak}")
        most = e.let(f"call <16 x i16> @llvm.umax.v16i16(<16 x i16> {before}, <16 x i16> {size})")
        e.do(f"store <16 x i16> {most}, ptr {peak}")
    parts = e.let(f"load <16 x i16>, ptr {peak}")
    most = e.let(f"call i16 @llvm.vector.reduce.umax.v16i16(<16 x i16> {parts})")
    return e.let(f"fpext bfloat {e.let(f'bitcast i16 {most} to bfloat')} to float")


def _fixed_point(e: Emitter, variant: Variant, k: str, factor: str) -> str:
    """Sixteen inputs from column k, scaled and rounded to the nearest, ties to even.

    Adding 1.5 * 2^23 leaves the integer in a float's low bits.
    """
    scaled = e.let(f"fmul <16 x float> {e.load_wide('bfloat', '%x', k)}, {factor}")
    if variant.inputs == "fixed":
        for call, limit in (("minnum", "127.0"), ("maxnum", "-127.0")):
            scaled = e.let(
                f"call <16 x float> @llvm.{call}.v16f32(<16 x float> {scaled}, "
                f"<16 x float> {constant('float', limit)})"
            )
    shifted = e.let(f"fadd <16 x float> {scaled}, {constant('float', '12582912.0')}")
    bits = e.let(f"bitcast <16 x float> {shifted} to <16 x i32>")
    return e.let(f"sub <16 x i32> {bits}, {constant('i32', str(0x4B400000))}")


def _store_bytes(e: Emitter, plane: str, k: str, values: str) -> None:
    part = e.let(f"trunc <16 x i32> {values} to <16 x i8>")
    e.do(f"store <16 x i8> {part}, ptr {e.at(plane, k, 1)}, align 1")
