"""`splitserve chat`: turns of a conversation at the terminal."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys

from splitserve.cli.options import (
    add_client_flags,
    add_sampling_flags,
    open_client,
    sampling_params,
)
from splitserve.client import Client
from splitserve.errors import InvalidRequest, SplitserveError
from splitserve.sampling import SamplingParams

Turn = dict[str, str]

EXIT_FAILED_TURN = 2
HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C ends an answer"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "chat", help="talk with a model", description=f"Talk with a model of a suite. {HELP}."
    )
    parser.add_argument("--target", required=True, metavar="HOST:PORT", help="router of the suite")
    parser.add_argument("--model-name", default="", help="which model (default: the only one)")
    parser.add_argument("--system", metavar="TEXT", help="how the model shall behave")
    add_sampling_flags(parser)
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Reads turns until the end of input. From a pipe, a turn that failed makes it 2."""
    params = sampling_params(options)
    if params.n != 1:
        raise InvalidRequest.single("n", "a conversation goes on from one answer")
    with open_client(options) as client:
        # Before the first prompt, so that a wrong target is not noticed after a long message.
        client.models()
        conversation = _Conversation(client, params, options)
        conversation.run()
    return EXIT_FAILED_TURN if conversation.failed and not sys.stdin.isatty() else 0


class _Conversation:
    def __init__(self, client: Client, params: SamplingParams, options: argparse.Namespace) -> None:
        self._client = client
        self._params = params
        self._options = options
        self._turns: list[Turn] = []
        self.failed = False
        """Whether a turn got no answer."""
        self._reset()

    def run(self) -> None:
        if sys.stdin.isatty():
            # Gives `input` line editing and history, where Python was built with it.
            with contextlib.suppress(ImportError):
                importlib.import_module("readline")
            print(HELP)
        while (line := self._read()) is not None:
            if line == "/exit":
                return
            if line == "/reset":
                self._reset()
            elif line:
                self._take_turn(line)

    def _reset(self) -> None:
        system = self._options.system
        self._turns = [{"role": "system", "content": system}] if system else []

    def _read(self) -> str | None:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return None

    def _take_turn(self, line: str) -> None:
        self._turns.append({"role": "user", "content": line})
        try:
            answer = self._stream_answer()
        except SplitserveError as error:
            print(f"error: {error.message}", file=sys.stderr)
            self.failed = True
            # Asked again, the question shall not stand there twice.
            self._turns.pop()
            return
        self._turns.append({"role": "assistant", "content": answer})

    def _stream_answer(self) -> str:
        texts = []
        deltas = self._client.stream(
            self._turns,
            self._params,
            model=self._options.model_name,
            timeout=self._options.timeout,
        )
        with contextlib.closing(deltas), contextlib.suppress(KeyboardInterrupt):
            for delta in deltas:
                text = "".join(choice.text for choice in delta.choices)
                texts.append(text)
                print(text, end="", flush=True)
        print(flush=True)
        return "".join(texts)
