"""Typed access to untrusted key-value data, with errors that name the file and the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from splitserve.errors import CheckpointError

_MAX_JSON_BYTES: Final = 1 << 28


class Fields:
    """The keys of one JSON object or GGUF header. A null counts as a missing key."""

    def __init__(self, source: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.source = source
        self._values = values
        self._prefix = prefix

    @classmethod
    def from_json_file(cls, path: Path) -> Fields:
        """The object in a JSON file. Raises `CheckpointError` if it is not one."""
        return cls(path, read_json_object(path))

    def error(self, key: str, what: str) -> CheckpointError:
        """An error about one key."""
        return CheckpointError(f"{self.source}: {self._prefix}{key} {what}")

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it is, None if missing."""
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Without a default the key is required."""
        value = self._required(key, default)
        if type(value) is not int:
            raise self.error(key, f"is {_short(value)}, must be a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, whole or not. Without a default the key is required."""
        value = self._required(key, default)
        if type(value) not in (int, float):
            raise self.error(key, f"is {_short(value)}, must be a number")
        try:
            return float(value)
        except OverflowError as exc:
            raise self.error(key, "is too large a number") from exc

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._required(key, default)
        if type(value) is not bool:
            raise self.error(key, f"is {_short(value)}, must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Without a default the key is required."""
        value = self._required(key, default)
        if type(value) is not str:
            raise self.error(key, f"is {_short(value)}, must be a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, or None if the key is missing."""
        return self.text(key) if key in self else None

    def optional_integer(self, key: str) -> int | None:
        """A whole number, or None if the key is missing."""
        return self.integer(key) if key in self else None

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; one number alone is a list of one, a missing key is empty."""
        return self._list(key, int, "whole numbers")

    def numbers(self, key: str) -> list[float]:
        """A list of numbers, whole or not; a missing key is empty."""
        values = self._values.get(key)
        if values is None:
            return []
        if not isinstance(values, list) or any(type(v) not in (int, float) for v in values):
            raise self.error(key, "must be a list of numbers")
        try:
            return [float(value) for value in values]
        except OverflowError as exc:
            raise self.error(key, "has too large a number") from exc

    def texts(self, key: str) -> list[str]:
        """A list of strings; one string alone is a list of one, a missing key is empty."""
        return self._list(key, str, "strings")

    def nested(self, key: str) -> Fields:
        """An object within; a missing key is an empty object."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, f"is {_short(value)}, must be an object")
        return Fields(self.source, value, f"{self._prefix}{key}.")

    def defaulting(self, **defaults: Any) -> Fields:
        """The same with these values for keys that are missing."""
        given = {key: value for key, value in self._values.items() if value is not None}
        return Fields(self.source, {**self._values, **defaults, **given}, self._prefix)

    def expect(self, key: str, *supported: object) -> None:
        """Raises unless the key is missing or has one of these values."""
        if key in self and self._values[key] not in supported:
            known = ", ".join(map(repr, supported))
            raise self.error(key, f"is {_short(self._values[key])}, supported: {known}")

    def names(self) -> list[str]:
        """Every key, those of nulls too."""
        return list(self._values)

    def _required(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _list(self, key: str, kind: type, kinds: str) -> list[Any]:
        value = self._values.get(key)
        if value is None:
            return []
        values = value if isinstance(value, list) else [value]
        if any(type(each) is not kind for each in values):
            raise self.error(key, f"must be a list of {kinds}")
        return values


def read_json_object(path: Path) -> dict[str, Any]:
    """A whole JSON file that holds one object, at most 256 MiB."""
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes is too large for JSON metadata")
        return parse_json_object(path, path.read_bytes())
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc


def parse_json_object(source: Path, data: bytes) -> dict[str, Any]:
    """One JSON object from bytes; `source` is the file that errors name."""
    try:
        value = json.loads(data)
    # RecursionError: deep nesting. ValueError: bad JSON, bad UTF-8 or a number of too many digits.
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{source}: not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must hold one JSON object")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
