"""`splitserve generate`: one prompt, streamed."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

from splitserve.chat import ChatTemplate
from splitserve.cli.options import (
    add_client_flags,
    add_precision_flags,
    add_sampling_flags,
    open_client,
    precision,
    sampling_params,
)
from splitserve.errors import CheckpointError, ConfigError
from splitserve.inference_wire import Prompt
from splitserve.outputs import OutputBuilder, OutputDelta
from splitserve.tokenizer import Tokenizer

Show = Callable[[Iterator[OutputDelta]], None]

_WITH_MODEL = (
    *("dtype", "device", "deterministic", "skip_tokenizer_init"),
    *("quantization", "kv_dtype", "tensor_parallel_size"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "generate",
        help="complete one prompt",
        description="Complete one prompt on a running suite, or in this process with --model.",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--target", metavar="HOST:PORT", help="router of a running suite")
    where.add_argument("--model", metavar="PATH", help="load this checkpoint and run it here")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="text to go on from; - reads stdin")
    what.add_argument("--token-ids", metavar="ID,ID", type=_token_ids, help="tokens to go on from")
    parser.add_argument(
        "--chat", action="store_true", help="send the prompt as a user's message to a chat model"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--model-name", default="", help="which of the suite's models (default: the only one)"
    )
    parser.add_argument("--dtype", help="with --model: data type of the weights")
    parser.add_argument("--device", help="with --model: cpu or cuda")
    parser.add_argument(
        "--deterministic", action="store_true", help="with --model: the same bits in any batch"
    )
    parser.add_argument(
        "--skip-tokenizer-init", action="store_true", help="with --model: token ids in and out only"
    )
    add_precision_flags(parser.add_argument_group("precision", "with --model"))
    add_sampling_flags(parser)
    add_client_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the answer as it comes."""
    prompt = _prompt(options)
    show = _show_json if options.json else _show_text
    if (options.n or 1) > 1 and not options.json:
        show = _show_choices
    if options.target:
        _on_suite(options, prompt, show)
    else:
        _in_process(options, prompt, show)
    return 0


def _prompt(options: argparse.Namespace) -> Prompt:
    if options.token_ids is not None:
        if options.chat:
            raise ConfigError("--chat takes text; use --prompt")
        ids: list[int] = options.token_ids
        return ids
    text: str = sys.stdin.read() if options.prompt == "-" else options.prompt
    return [{"role": "user", "content": text}] if options.chat else text


def _on_suite(options: argparse.Namespace, prompt: Prompt, show: Show) -> None:
    for name in _WITH_MODEL:
        if getattr(options, name) not in (None, False):
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} goes with --model; a suite has its own settings")
    with open_client(options) as client:
        deltas = client.stream(
            prompt, sampling_params(options), model=options.model_name, timeout=options.timeout
        )
        with contextlib.closing(deltas):
            show(deltas)


def _in_process(options: argparse.Namespace, prompt: Prompt, show: Show) -> None:
    # Here and not above: the other subcommands need no engine.
    from splitserve.llm import LLM

    with LLM(
        options.model,
        device=options.device or "cpu",
        dtype=options.dtype or "auto",
        deterministic=options.deterministic,
        skip_tokenizer_init=options.skip_tokenizer_init,
        show_progress=sys.stderr.isatty(),
        **precision(options),
    ) as llm:
        if options.chat:
            prompt = _rendered(options.model, llm.tokenizer, cast(list[dict[str, str]], prompt))
        deltas = cast(
            Generator[OutputDelta, None, None],
            llm.stream(cast(str | list[int], prompt), sampling_params(options)),
        )
        with contextlib.closing(deltas):
            show(deltas)


def _rendered(model: str, tokenizer: Tokenizer | None, turns: list[dict[str, str]]) -> list[int]:
    template = ChatTemplate.from_checkpoint(model)
    if template is None or tokenizer is None:
        raise CheckpointError(f"{model}: has no chat template; leave --chat out")
    return tokenizer.encode(template.render(turns), add_special_tokens=False)


def _show_text(deltas: Iterator[OutputDelta]) -> None:
    token_ids: list[int] = []
    any_text = False
    for choice in (choice for delta in deltas for choice in delta.choices):
        token_ids += choice.token_ids
        any_text = any_text or bool(choice.text)
        print(choice.text, end="", flush=True)
    # Where there is no tokenizer the tokens are all that there is to show.
    print("" if any_text else ",".join(map(str, token_ids)))


def _show_choices(deltas: Iterator[OutputDelta]) -> None:
    # Several streams of text in one terminal could not be told apart, so they wait for the end.
    for output in OutputBuilder(None, None).extend(deltas).outputs:
        print(f"[{output.index}] {output.text}")


def _show_json(deltas: Iterator[OutputDelta]) -> None:
    for delta in deltas:
        print(json.dumps(_without_none(dataclasses.asdict(delta)), ensure_ascii=False), flush=True)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_without_none(each) for each in value]
    return value


def _token_ids(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each.strip()]
