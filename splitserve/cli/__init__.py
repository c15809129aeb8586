"""The `splitserve` command: one file a subcommand.

Exit status: 0 for success, 1 where a bench request failed, 2 for bad usage and every other error
(one line on stderr), 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from splitserve.cli import bench, chat, generate, models, quantize, serve
from splitserve.errors import Overloaded, SplitserveError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_COMMANDS = (serve, generate, chat, bench, models, quantize)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the process's exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SplitserveError as error:
        return _fail(_advice(error))
    except BrokenPipeError:
        # Whoever read our output has gone; nothing may be flushed into the pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}")
    except Exception as error:
        if options.traceback:
            raise
        return _fail(f"unexpected {type(error).__name__}: {error}; --traceback shows where")


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line, without the whole list of flags."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(EXIT_ERROR, f"error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="splitserve", description="Serve large language models, prefill and decode apart."
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show where an unexpected error came from"
    )
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for command in _COMMANDS:
        command.add(commands)
    return parser


def _advice(error: SplitserveError) -> str:
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        return f"{error.message}; try again in {error.retry_after_s:.1f} s"
    return error.message


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_ERROR
