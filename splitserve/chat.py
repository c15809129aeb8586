"""Renders a conversation with the model's own chat template, as transformers does.

Templates come with the checkpoint and are not trusted: they run in jinja2's immutable sandbox and
see plain strings only. The sandbox does not bound time or memory; `splitserve.chat_process` does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitserve.errors import CheckpointError, InvalidRequest
from splitserve.fields import Fields
from splitserve.weights.gguf_file import read_gguf

MAX_OUTPUT_CHARS: Final = 1 << 23


class ChatTemplate:
    """One template and the special tokens it may use.

    It is compiled by `compile` or the first `render`, not before: even compiling an untrusted
    template can take for ever, since jinja2 folds constants.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_output_chars: int = MAX_OUTPUT_CHARS,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """`special_tokens` maps names such as bos_token to text.

        `now` is the clock for templates that write the date.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self._max_output_chars = max_output_chars
        self._now = now
        self._compiled: jinja2.Template | None = None

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> ChatTemplate | None:
        """The template of a Hugging Face directory or .gguf file, None if it has none.

        Raises `CheckpointError` if the files that may hold it are broken.
        """
        path = Path(path)
        source, special_tokens = _from_directory(path) if path.is_dir() else _from_gguf(path)
        return None if source is None else cls(source, special_tokens)

    def compile(self) -> jinja2.Template:
        """The compiled template. Raises `CheckpointError` if it is not valid."""
        if self._compiled is None:
            try:
                self._compiled = _environment(self._now).from_string(self.source)
            # A nested expression may exhaust the compiler's stack, a folded one fail in any way.
            except Exception as exc:
                raise CheckpointError(f"chat template is not valid: {_one_line(exc)}") from exc
        return self._compiled

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt's text. `messages` have a role and a content.

        Raises `InvalidRequest` if the template refuses the conversation or fails on it, and
        `CheckpointError` if the template itself is not valid.
        """
        template = self.compile()
        pieces, size = [], 0
        try:
            for piece in template.generate(
                **self.special_tokens,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            ):
                size += len(piece)
                if size > self._max_output_chars:
                    raise InvalidRequest.single(
                        "chat", f"renders to more than {self._max_output_chars} characters"
                    )
                pieces.append(piece)
        except InvalidRequest:
            raise
        # A template may fail in any way that Python can; all of them are the request's end.
        except Exception as exc:
            raise InvalidRequest.single(
                "chat", f"the model's chat template refused it: {_one_line(exc)}"
            ) from exc
        return "".join(pieces)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it just passes it on."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter it leaves HTML characters alone."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _one_line(exc: Exception) -> str:
    return " ".join((str(exc) or type(exc).__name__).split())[:500]


def _from_gguf(path: Path) -> tuple[str | None, dict[str, str]]:
    fields = Fields(path, read_gguf(path).metadata)
    tokens = fields.texts("tokenizer.ggml.tokens")
    special_tokens = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"),
                      ("pad_token", "padding")):  # fmt: skip
        token_id = fields.optional_integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and 0 <= token_id < len(tokens):
            special_tokens[name] = tokens[token_id]
    return fields.optional_text("tokenizer.chat_template"), special_tokens


def _from_directory(directory: Path) -> tuple[str | None, dict[str, str]]:
    path = directory / "tokenizer_config.json"
    fields = Fields.from_json_file(path) if path.is_file() else Fields(path, {})
    special_tokens = {
        key: text
        for key in fields.names()
        if key.endswith("_token") and (text := _token_content(fields, key)) is not None
    }
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), special_tokens
        except (OSError, UnicodeDecodeError) as exc:
            raise CheckpointError(f"{file}: cannot be read: {exc}") from exc
    return _configured_template(fields), special_tokens


def _token_content(fields: Fields, key: str) -> str | None:
    """A token is a string or an object with its content; other settings end in _token too."""
    value = fields.raw(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _configured_template(fields: Fields) -> str | None:
    value = fields.raw("chat_template")
    if not isinstance(value, list):
        return fields.optional_text("chat_template")
    for entry in value:
        if isinstance(entry, dict) and entry.get("name") == "default":
            template = entry.get("template")
            if isinstance(template, str):
                return template
    raise fields.error("chat_template", "lists no template named 'default'")
