"""The whole of a product: inputs encoded, output rows shared out to threads."""

from __future__ import annotations

from splitserve.quant.vnni.emitter import FLOAT_BYTES, LANES, Emitter
from splitserve.quant.vnni.encode import encode_function
from splitserve.quant.vnni.tile import tile_function
from splitserve.quant.vnni.variant import BLOCKS, PLAN_FIELDS, TILES, OmpCalls, Variant

_JOB_FIELDS = ("plan", "x", "scratch", "out", "rows")
_KINDS = dict.fromkeys(("rows", "groups", "group", "tiles", "width"), "i64") | {"step": "float"}


def _fields(e: Emitter, base: str, names: tuple[str, ...]) -> dict[str, str]:
    return {
        name: e.let(f"load {_KINDS.get(name, 'ptr')}, ptr {e.at(base, str(place), 8)}")
        for place, name in enumerate(names)
    }


def _share(e: Emitter, omp: OmpCalls, total: str) -> tuple[str, str]:
    """The range of `total` that is this thread's."""
    number, count = (
        e.let(f"sext i32 {e.let(f'call i32 inttoptr (i64 {address} to ptr)()')} to i64")
        for address in (omp.thread_number, omp.thread_count)
    )
    start = e.let(f"udiv i64 {e.times(total, number)}, {count}")
    end = e.let(f"udiv i64 {e.times(total, e.plus(number, 1))}, {count}")
    return start, end


def _scratch_parts(
    e: Emitter, variant: Variant, job: dict[str, str], plan: dict[str, str]
) -> tuple[str, str, str]:
    """Columns, and where the sums and the steps of all rows start."""
    columns = e.times(plan["groups"], plan["group"])
    sums = e.at(job["scratch"], e.times(columns, job["rows"]), variant.planes)
    steps = e.at(sums, e.times(plan["groups"], job["rows"]), 4)
    return columns, sums, steps


def _encode_part(variant: Variant, omp: OmpCalls) -> str:
    e = Emitter()
    job = _fields(e, "%job", _JOB_FIELDS)
    plan = _fields(e, job["plan"], PLAN_FIELDS)
    columns, sums, steps = _scratch_parts(e, variant, job, plan)
    start, end = _share(e, omp, job["rows"])
    with e.loop(start, end, 1) as row:
        offset = e.times(columns, row)
        e.do(
            f"call void @encode(ptr {e.at(job['x'], offset, 2)}, "
            f"ptr {e.at(job['scratch'], offset, variant.planes)}, "
            f"ptr {e.at(sums, e.times(plan['groups'], row), 4)}, ptr {e.at(steps, row, 4)}, "
            f"i64 {plan['groups']}, i64 {plan['group']}, float {plan['step']})"
        )
    return f"define internal void @encode_part(ptr %job) {{\n{e.body()}\n  ret void\n}}\n"


def _product_part(variant: Variant, omp: OmpCalls) -> str:
    e = Emitter()
    job = _fields(e, "%job", _JOB_FIELDS)
    plan = _fields(e, job["plan"], PLAN_FIELDS)
    columns, sums, steps = _scratch_parts(e, variant, job, plan)
    start, end = _share(e, omp, plan["tiles"])
    code_bytes = e.times(columns, BLOCKS * LANES * variant.bits // 8)
    grid = e.times(plan["groups"], BLOCKS * LANES)
    with e.loop(start, end, 1) as tile:
        scales = e.at(plan["scales"], e.times(grid, tile), FLOAT_BYTES[variant.scales])
        zeros = e.at(plan["zeros"], e.times(grid, tile), FLOAT_BYTES[variant.zeros or "float"])
        weights = (
            f"ptr {e.at(plan['codes'], e.times(code_bytes, tile), 1)}, ptr {scales}, "
            f"ptr {zeros}, ptr {e.at(plan['bias'], tile, 4 * BLOCKS * LANES)}"
        )
        out = e.at(job["out"], tile, 2 * BLOCKS * LANES)
        inputs = job["x" if variant.inputs == "plain" else "scratch"]
        counter = e.variable("i64", "0")
        for rows in TILES:
            with e.count(counter, job["rows"], rows) as row:
                e.do(
                    f"call void @tile{rows}({weights}, "
                    f"ptr {e.at(inputs, e.times(columns, row), variant.planes)}, "
                    f"ptr {e.at(sums, e.times(plan['groups'], row), 4)}, "
                    f"ptr {e.at(steps, row, 4)}, ptr {e.at(out, e.times(plan['width'], row), 2)}, "
                    f"i64 {plan['width']}, i64 {plan['groups']}, i64 {plan['group']})"
                )
    return f"define internal void @product_part(ptr %job) {{\n{e.body()}\n  ret void\n}}\n"


def _product(variant: Variant, omp: OmpCalls) -> str:
    e = Emitter()
    job = e.variable(f"[{len(_JOB_FIELDS)} x i64]", "zeroinitializer")
    for place, name in enumerate(_JOB_FIELDS):
        kind = "i64" if name == "rows" else "ptr"
        e.do(f"store {kind} %{name}, ptr {e.at(job, str(place), 8)}")
    parallel = f"inttoptr (i64 {omp.parallel} to ptr)"
    if variant.inputs != "plain":
        _encode_all(e, parallel, job)
    e.do(f"call void {parallel}(ptr @product_part, ptr {job}, i32 %threads, i32 0)")
    return f"""define void @product(ptr %plan, ptr %x, ptr %scratch, ptr %out, i64 %rows,
  i32 %threads) {{
{e.body()}
  ret void
}}
"""


def _encode_all(e: Emitter, parallel: str, job: str) -> None:
    """A few rows are encoded before the threads start, since waking them costs more."""
    few = e.let("icmp slt i64 %rows, 4")
    alone, together, done = e.name(), e.name(), e.name()
    e.do(f"br i1 {few}, label %{alone}, label %{together}")
    e.lines.append(f"{alone}:")
    e.do(f"call void @encode_part(ptr {job})")
    e.do(f"br label %{done}")
    e.lines.append(f"{together}:")
    e.do(f"call void {parallel}(ptr @encode_part, ptr {job}, i32 %threads, i32 0)")
    e.do(f"br label %{done}")
    e.lines.append(f"{done}:")


_DECLARATIONS = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x i16> @llvm.umax.v16i16(<16 x i16>, <16 x i16>)
declare <16 x float> @llvm.minnum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
  <16 x float>, <32 x bfloat>, <32 x bfloat>)
declare i16 @llvm.vector.reduce.umax.v16i16(<16 x i16>)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""


def module_text(variant: Variant, omp: OmpCalls) -> str:
    """All functions. `product(plan, x, scratch, out, rows, threads)` is what is called.

    `plan` holds `PLAN_FIELDS`, `scratch` has `scratch_bytes`, `out` is (rows, width) bf16.
    """
    tiles = [tile_function(variant, rows) for rows in TILES]
    parts = [_encode_part(variant, omp), _product_part(variant, omp), _product(variant, omp)]
    return "\n".join([_DECLARATIONS, encode_function(variant), *tiles, *parts])
