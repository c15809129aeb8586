"""`splitserve quantize`: a quantised copy of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from splitserve.cli.options import QUANTIZATIONS, positive

EPILOG = """
The copy is in compressed-tensors' format and is loaded without --quantization, by other servers,
too. fp8, int8 and int4 round weights alone. int8-smooth and int4-awq run the model on English
text first; what they divide the inputs of products by is folded into norms and other products.
Where that cannot be done, the copy keeps a tensor `input_smoothing` that only splitserve reads,
and this command says so.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "quantize",
        help="write a quantised copy of a checkpoint",
        description="Write a quantised copy of a Hugging Face checkpoint, layer by layer.",
        epilog=EPILOG,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="directory to read")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to make")
    choices = [each for each in QUANTIZATIONS if each != "none"]
    parser.add_argument("--quantization", choices=choices, required=True)
    parser.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="in which weights are read and the model is run: auto (bfloat16), float32, bfloat16 "
        "or float16; the one it will be served in",
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=positive,
        default=4 << 30,
        metavar="N",
        help="of a file (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the copy and says what was written."""
    # Only where weights are computed with is torch installed.
    from splitserve.engine.export import ExportConfig, export

    config = ExportConfig(
        model=options.model,
        output=options.output,
        quantization=options.quantization,
        device=options.device,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
    )
    report = export(config, show_progress=sys.stderr.isatty())
    print(f"{options.output}: {report.num_quantized} matrices in {options.quantization}")
    if report.private_modules:
        print(
            f"{len(report.private_modules)} of them have an input_smoothing that only splitserve "
            f"reads, such as {report.private_modules[0]}"
        )
    return 0
