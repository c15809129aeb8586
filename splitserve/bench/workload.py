"""Workload files: one JSON object a line, with the lengths of a request and when it came.

    {"id": 0, "prompt_tokens": 374, "output_tokens": 44, "arrival_s": 0.0}

Lengths only, so prompts are random tokens from a fixed seed and outputs are forced to their length.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitserve.errors import ConfigError


@dataclass(frozen=True)
class WorkItem:
    """One request of a workload. `arrival_s` counts from the first one; None: not recorded."""

    id: str
    prompt_tokens: int
    output_tokens: int
    arrival_s: float | None = None


def load_workload(path: Path) -> list[WorkItem]:
    """Every request of the file. Raises ConfigError naming the line at fault."""
    items = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                items.append(_item(line, f"{path}:{number}"))
    if not items:
        raise ConfigError(f"{path}: holds no request")
    recorded = sum(item.arrival_s is not None for item in items)
    if recorded not in (0, len(items)):
        raise ConfigError(f"{path}: arrival_s must be on every line or on none")
    return items


def select(items: Sequence[WorkItem], count: int | None) -> list[WorkItem]:
    """The first `count` requests, None for all. Raises ConfigError if there are fewer."""
    if count is not None and count > len(items):
        raise ConfigError(f"--num-requests {count}: the workload has only {len(items)}")
    return list(items[:count])


def cap(
    items: Sequence[WorkItem], max_prompt_tokens: int | None, max_output_tokens: int | None
) -> list[WorkItem]:
    """Lengths cut to what a small model or machine can take; None cuts nothing."""
    return [
        dataclasses.replace(
            item,
            prompt_tokens=min(item.prompt_tokens, max_prompt_tokens or item.prompt_tokens),
            output_tokens=min(item.output_tokens, max_output_tokens or item.output_tokens),
        )
        for item in items
    ]


def check_context(items: Sequence[WorkItem], max_context_tokens: int) -> None:
    """Raises ConfigError if a request cannot fit the model's context."""
    longest = max(items, key=lambda item: item.prompt_tokens + item.output_tokens)
    needed = longest.prompt_tokens + longest.output_tokens
    if needed > max_context_tokens:
        raise ConfigError(
            f"request {longest.id} needs {needed} tokens and the context has "
            f"{max_context_tokens}: set --max-prompt-tokens and --max-output-tokens"
        )


def prompt_ids(index: int, count: int, vocab_size: int, seed: int) -> list[int]:
    """`count` random tokens, the same for the same arguments on every machine."""
    ids: list[int] = np.random.default_rng([seed, index]).integers(vocab_size, size=count).tolist()
    return ids


def _item(line: str, where: str) -> WorkItem:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: not a JSON object")
    arrival = fields.get("arrival_s")
    if arrival is not None and not (_is_number(arrival) and 0 <= arrival < math.inf):
        raise ConfigError(f"{where}: arrival_s must be a number of seconds, not {arrival!r}")
    return WorkItem(
        id=str(fields.get("id", where)),
        prompt_tokens=_count(fields, "prompt_tokens", where),
        output_tokens=_count(fields, "output_tokens", where),
        arrival_s=None if arrival is None else float(arrival),
    )


def _count(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {name} must be an integer of at least 1, not {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
