"""The product of a few input rows and 32 output rows."""

from __future__ import annotations

from splitserve.quant.vnni.emitter import LANES, Emitter, constant
from splitserve.quant.vnni.variant import BLOCKS, Variant

FP8_HALF = "256.0"


def tile_function(variant: Variant, rows: int) -> str:
    """`tile<rows>`: some input rows times `BLOCKS` blocks."""
    e = Emitter()
    group_size = _group_size(variant, rows)
    columns = e.times("%groups", group_size)
    totals = [
        [e.variable("<16 x float>", "zeroinitializer") for _ in range(BLOCKS)] for _ in range(rows)
    ]
    block_bytes = e.times(columns, LANES * variant.bits // 8)
    codes = [e.at("%codes", e.times(block_bytes, block), 1) for block in range(BLOCKS)]
    with e.loop("0", "%groups", 1) as group:
        first = e.times(group, group_size)
        if variant.codes == "fp8":
            floats = _fp8_sums(e, variant, rows, columns, codes, first)
            _add_fp8_group(e, variant, group, floats, totals)
        else:
            sums = _group_sums(e, variant, rows, columns, codes, first)
            _add_group(e, variant, rows, group, sums, totals)
    for row in range(rows):
        _store_row(e, variant, row, totals[row])
    return f"""define internal void @tile{rows}(ptr %codes, ptr %scales, ptr %zeros, ptr %bias,
  ptr %inputs, ptr %sums, ptr %steps, ptr %out, i64 %width, i64 %groups, i64 %group) {{
{e.body()}
  ret void
}}
"""


def _group_size(variant: Variant, rows: int) -> str:
    """A constant for one row; unrolled for several, the loop would need too many registers."""
    return str(variant.group) if variant.group and rows == 1 else "%group"


def _group_sums(
    e: Emitter, variant: Variant, rows: int, columns: str, codes: list[str], first: str
) -> list[list[list[str]]]:
    """[row][block][plane] of one group: integer sums of codes times input planes."""
    sums = [
        [
            [e.variable("<16 x i32>", "zeroinitializer") for _ in range(variant.planes)]
            for _ in range(BLOCKS)
        ]
        for _ in range(rows)
    ]
    planes = [
        [
            e.at("%inputs", e.times(columns, variant.planes * row + plane), 1)
            for plane in range(variant.planes)
        ]
        for row in range(rows)
    ]
    advance = 32 // variant.bits
    with e.loop("0", _group_size(variant, rows), advance) as inner:
        k = e.plus(inner, first)
        offset = e.times(k, LANES * variant.bits // 8)
        for half in range(advance // 4):
            words = [_codes_word(e, variant, base, offset, half) for base in codes]
            at = e.plus(k, 4 * half)
            for row in range(rows):
                for plane in range(variant.planes):
                    four = e.let(f"load i32, ptr {e.at(planes[row][plane], at, 1)}, align 1")
                    wide = e.splat("i32", four)
                    for block in range(BLOCKS):
                        place = sums[row][block][plane]
                        before = e.let(f"load <16 x i32>, ptr {place}")
                        after = e.let(
                            "call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> "
                            f"{before}, <16 x i32> {words[block]}, <16 x i32> {wide})"
                        )
                        e.do(f"store <16 x i32> {after}, ptr {place}")
    return [[[e.let(f"load <16 x i32>, ptr {p}") for p in pair] for pair in row] for row in sums]


def _codes_word(e: Emitter, variant: Variant, base: str, offset: str, half: int) -> str:
    word = e.let(f"load <16 x i32>, ptr {e.at(base, offset, 1)}, align 64")
    if variant.bits == 8:
        return word
    if half:
        word = e.let(f"lshr <16 x i32> {word}, {constant('i32', '4')}")
    return e.let(f"and <16 x i32> {word}, {constant('i32', str(0x0F0F0F0F))}")


def _add_group(
    e: Emitter,
    variant: Variant,
    rows: int,
    group: str,
    sums: list[list[list[str]]],
    totals: list[list[str]],
) -> None:
    """totals += scale * (256 * high + low - zero * sum of inputs)."""
    middle = constant("float", f"{-(1 << (variant.bits - 1))}.0")
    input_sums = []
    for row in range(rows):
        at = e.plus(e.times("%groups", row), group)
        input_sums.append(e.splat("float", e.let(f"load float, ptr {e.at('%sums', at, 4)}")))
    for block in range(BLOCKS):
        at = e.times(e.plus(e.times("%groups", block), group), LANES)
        scale = e.load_wide(variant.scales, "%scales", at)
        zero = middle
        if variant.zeros is not None:
            zero = e.let(f"fneg <16 x float> {e.load_wide(variant.zeros, '%zeros', at)}")
        for row in range(rows):
            *high, value = (
                e.let(f"sitofp <16 x i32> {part} to <16 x float>") for part in sums[row][block]
            )
            for part in high:
                value = e.fma(part, constant("float", "256.0"), value)
            value = e.fma(zero, input_sums[row], value)
            before = e.let(f"load <16 x float>, ptr {totals[row][block]}")
            after = e.fma(value, scale, before)
            e.do(f"store <16 x float> {after}, ptr {totals[row][block]}")


def _store_row(e: Emitter, variant: Variant, row: int, totals: list[str]) -> None:
    step = constant("float", FP8_HALF)
    if variant.codes != "fp8":
        step = e.splat("float", e.let(f"load float, ptr {e.at('%steps', str(row), 4)}"))
    line = e.at("%out", e.times("%width", row), 2)
    for block in range(BLOCKS):
        bias = e.load_wide("float", "%bias", str(block * LANES))
        total = e.let(f"load <16 x float>, ptr {totals[block]}")
        result = e.let(f"fptrunc <16 x float> {e.fma(total, step, bias)} to <16 x bfloat>")
        e.do(f"store <16 x bfloat> {result}, ptr {e.at(line, str(block * LANES), 2)}, align 2")


def _fp8_sums(
    e: Emitter, variant: Variant, rows: int, columns: str, codes: list[str], first: str
) -> list[list[str]]:
    """[row][block] of one group: sums of codes / 256 times bf16 inputs."""
    sums = [
        [e.variable("<16 x float>", "zeroinitializer") for _ in range(BLOCKS)] for _ in range(rows)
    ]
    inputs = [e.at("%inputs", e.times(columns, row), 2) for row in range(rows)]
    with e.loop("0", _group_size(variant, rows), 2) as inner:
        k = e.plus(inner, first)
        words = [_fp8_word(e, base, e.times(k, LANES)) for base in codes]
        for row in range(rows):
            pair = e.splat("i32", e.let(f"load i32, ptr {e.at(inputs[row], k, 2)}, align 2"))
            pair = e.let(f"bitcast <16 x i32> {pair} to <32 x bfloat>")
            for block in range(BLOCKS):
                before = e.let(f"load <16 x float>, ptr {sums[row][block]}")
                after = e.let(
                    "call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> "
                    f"{before}, <32 x bfloat> {words[block]}, <32 x bfloat> {pair})"
                )
                e.do(f"store <16 x float> {after}, ptr {sums[row][block]}")
    return [[e.let(f"load <16 x float>, ptr {place}") for place in row] for row in sums]


def _fp8_word(e: Emitter, base: str, offset: str) -> str:
    """Two columns of 16 rows as bf16: e4m3's bits are those of an fp16 number 256 times smaller."""
    codes = e.let(f"load <32 x i8>, ptr {e.at(base, offset, 1)}, align 32")
    bits = e.let(f"sext <32 x i8> {codes} to <32 x i16>")
    bits = e.let(f"shl <32 x i16> {bits}, {constant('i16', '7', 2 * LANES)}")
    bits = e.let(f"and <32 x i16> {bits}, {constant('i16', str(~0x4000), 2 * LANES)}")
    halves = e.let(f"bitcast <32 x i16> {bits} to <32 x half>")
    wide = e.let(f"fpext <32 x half> {halves} to <32 x float>")
    return e.let(f"fptrunc <32 x float> {wide} to <32 x bfloat>")


def _add_fp8_group(
    e: Emitter, variant: Variant, group: str, sums: list[list[str]], totals: list[list[str]]
) -> None:
    for block in range(BLOCKS):
        at = e.times(e.plus(e.times("%groups", block), group), LANES)
        scale = e.load_wide(variant.scales, "%scales", at)
        for row, parts in enumerate(sums):
            before = e.let(f"load <16 x float>, ptr {totals[row][block]}")
            e.do(
                f"store <16 x float> {e.fma(parts[block], scale, before)}, ptr {totals[row][block]}"
            )
