"""`splitserve models`: what a checkpoint is, and what a suite serves."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from splitserve.cli.checkpoint_report import CheckpointReport, find_checkpoints, inspect
from splitserve.cli.options import add_client_flags, open_client
from splitserve.errors import CheckpointError

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
    parser.add_argument("--target", metavar="HOST:PORT", help="router of a running suite")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints a block a model."""
    if options.target:
        return _of_suite(options)
    checkpoints = find_checkpoints(options.path)
    if not checkpoints:
        raise CheckpointError(
            f"{options.path}: no checkpoint there; name one, or a directory of them"
        )
    reports = [inspect(checkpoint) for checkpoint in checkpoints]
    for report in reports:
        print(json.dumps(dataclasses.asdict(report)) if options.json else _text(report))
    return 0 if all(report.loads for report in reports) else EXIT_UNLOADABLE


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


def _text(report: CheckpointReport) -> str:
    rows = [("will load", "yes" if report.loads else f"no: {report.problem}")]
    if report.architecture:
        rows += [
            ("architecture", report.architecture),
            ("parameters", f"{report.parameters / 1e6:,.1f} million"),
            (
                "shape",
                f"{report.num_layers} layers, hidden {report.hidden_size}, "
                f"{report.num_heads} heads, {report.num_kv_heads} KV heads of "
                f"{report.head_dim}, vocabulary {report.vocab_size}",
            ),
            ("context", f"{report.max_context_tokens} tokens"),
            ("stored as", f"{', '.join(report.stored_dtypes)}, {_mib(report.file_bytes)}"),
            ("weights", f"{_mib(report.weight_bytes)} of memory in 16 bits"),
            ("KV", f"{_mib(report.kv_bytes_per_1k_tokens)} of memory per 1024 tokens in 16 bits"),
            ("tokenizer", report.tokenizer),
            ("chat template", report.chat_template),
        ]
    return "\n".join([report.path, *(f"  {name + ':':<15}{value}" for name, value in rows)])


def _mib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
