"""`splitserve models`: what a checkpoint is, and what a suite serves."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from splitserve.cli.checkpoint_report import CheckpointReport, find_checkpoints, inspect
from splitserve.cli.options import add_client_flags, open_client
from splitserve.errors import CheckpointError
from splitserve.models.families import FAMILIES
from splitserve.models.footprint import WEIGHT_BYTES, Workload

DEFAULT_DIRECTORY = ".models"
EXIT_UNLOADABLE = 2


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "models",
        help="say what a checkpoint is, or what a suite serves",
        description="Say of each checkpoint what it is, whether it will load, and the memory it "
        "needs; or list the models of a running suite. Exit status 2 if one will not load.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=Path(DEFAULT_DIRECTORY),
        help="checkpoint, or a directory of checkpoints (default: %(default)s)",
    )
    _add_workload_flags(parser)
    parser.add_argument(
        "--families", action="store_true", help="list the families that can be served"
    )
    parser.add_argument("--target", metavar="HOST:PORT", help="router of a running suite")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def _add_workload_flags(parser: argparse.ArgumentParser) -> None:
    memory = parser.add_argument_group("memory", "what the memory of each tier is computed for")
    memory.add_argument(
        "--context", type=int, default=0, metavar="TOKENS", help="default: the model's own"
    )
    memory.add_argument("--batch", type=int, default=16, help="sequences (default: %(default)s)")
    memory.add_argument("--quantization", choices=sorted(WEIGHT_BYTES), default="none")
    memory.add_argument("--kv-dtype", choices=("bfloat16", "fp8", "int8"), default="bfloat16")
    memory.add_argument("--tensor-parallel-size", type=int, default=1, metavar="RANKS")


def run(options: argparse.Namespace) -> int:
    """Prints a block a model."""
    if options.families:
        return _families(options)
    if options.target:
        return _of_suite(options)
    checkpoints = find_checkpoints(options.path)
    if not checkpoints:
        raise CheckpointError(
            f"{options.path}: no checkpoint there; name one, or a directory of them"
        )
    workload = Workload(
        context=options.context,
        batch=options.batch,
        weights=options.quantization,
        kv_dtype=options.kv_dtype,
        ranks=options.tensor_parallel_size,
    )
    reports = [inspect(checkpoint, workload) for checkpoint in checkpoints]
    for report in reports:
        print(json.dumps(dataclasses.asdict(report)) if options.json else _text(report, workload))
    return 0 if all(report.loads for report in reports) else EXIT_UNLOADABLE


def _families(options: argparse.Namespace) -> int:
    for family in FAMILIES:
        if options.json:
            print(json.dumps({"family": family.name, "architectures": family.architectures}))
        else:
            print(f"{family.name:<28}{', '.join(family.architectures)}")
    return 0


def _of_suite(options: argparse.Namespace) -> int:
    with open_client(options) as client:
        for card in client.models():
            if options.json:
                print(json.dumps(dataclasses.asdict(card)))
                continue
            takes = "text and token ids" if card.has_tokenizer else "token ids only"
            print(
                f"{card.name}: {'ready' if card.ready else 'not ready'}, "
                f"context {card.max_context_tokens} tokens, vocabulary {card.vocab_size}, {takes}"
                f"{', chat' if card.has_chat_template else ''}"
            )
    return 0


def _text(report: CheckpointReport, workload: Workload) -> str:
    rows = [("will load", "yes" if report.loads else f"no: {report.problem}")]
    if report.architecture:
        rows += [
            ("family", f"{report.family} ({report.architecture})"),
            ("parameters", f"{report.parameters / 1e6:,.1f} million"),
            (
                "shape",
                f"{report.num_layers} layers, hidden {report.hidden_size}, "
                f"{report.num_heads} heads, {report.num_kv_heads} KV heads of "
                f"{report.head_dim}, vocabulary {report.vocab_size}",
            ),
            ("context", f"{report.max_context_tokens} tokens"),
            ("stored as", f"{', '.join(report.stored_dtypes)}, {_mib(report.file_bytes)}"),
            *_memory(report, workload),
            ("tokenizer", report.tokenizer),
            ("chat template", report.chat_template),
        ]
    return "\n".join([report.path, *(f"  {name + ':':<15}{value}" for name, value in rows)])


def _memory(report: CheckpointReport, workload: Workload) -> list[tuple[str, str]]:
    context = workload.context or report.max_context_tokens
    weights = "in 16 bits" if workload.weights == "none" else f"in {workload.weights}"
    each = f" a rank of {workload.ranks}" if workload.ranks > 1 else ""
    return [
        ("weights", f"{_mib(report.weight_bytes)}{each} {weights}"),
        ("KV", f"{report.kv_bytes_per_token:,} bytes a token{each} in {workload.kv_dtype}"),
        ("prefill tier", f"{_mib(report.prefill_bytes)}{each}: weights and {context} tokens"),
        (
            "decode tier",
            f"{_mib(report.decode_bytes)}{each}: weights and {workload.batch} x {context} tokens",
        ),
        ("KV store", f"{_mib(report.kvstore_bytes)}: {context} tokens on their way"),
    ]


def _mib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
