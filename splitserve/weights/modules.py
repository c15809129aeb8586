"""Which modules of a model a quantisation config means. Never imports torch."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import Final

from splitserve.fields import Fields

_MOST_PATTERNS: Final = 1 << 14
_MOST_PATTERN_CHARS: Final = 512
# A config is untrusted and a regular expression can run for hours. Without repeated groups and
# with few repetitions it cannot, for names as short as those of modules.
_MOST_REPETITIONS: Final = 6
_LINEAR: Final = "Linear"


@dataclass(frozen=True)
class Modules:
    """A set of module names: those listed, those that a pattern matches, or all."""

    names: frozenset[str] = frozenset()
    patterns: tuple[re.Pattern[str], ...] = ()
    paths: tuple[re.Pattern[str], ...] = ()
    """Match `.name.`, so that a part of a name is found as a whole one."""
    all: bool = False

    def __contains__(self, module: str) -> bool:
        if self.all or module in self.names:
            return True
        if any(pattern.match(module) for pattern in self.patterns):
            return True
        return any(path.match(f".{module}.") for path in self.paths)


EVERY_MODULE: Final = Modules(all=True)


def read_targets(fields: Fields, key: str) -> Modules:
    """compressed-tensors' lists: whole names, `re:` patterns, and the class name `Linear`."""
    entries = _entries(fields, key)
    patterns = [each.removeprefix("re:") for each in entries if each.startswith("re:")]
    return Modules(
        names=frozenset(each for each in entries if not each.startswith("re:")),
        patterns=tuple(_safe_pattern(fields, key, each) for each in patterns),
        all=_LINEAR in entries,
    )


def read_paths(fields: Fields, key: str) -> Modules:
    """The others' lists: parts of dotted names, `*` for anything, with all that is below them."""
    entries = _entries(fields, key)
    # fnmatch's translation never tries one `*` again for the sake of another: it is fast.
    paths = tuple(re.compile(fnmatch.translate(f"*.{each}.*")) for each in entries)
    return Modules(paths=paths)


def _entries(fields: Fields, key: str) -> list[str]:
    entries = fields.texts(key)
    if len(entries) > _MOST_PATTERNS:
        raise fields.error(key, f"has {len(entries)} entries, at most {_MOST_PATTERNS}")
    for each in entries:
        if len(each) > _MOST_PATTERN_CHARS:
            raise fields.error(key, f"has an entry of {len(each)} characters")
    return entries


def _safe_pattern(fields: Fields, key: str, pattern: str) -> re.Pattern[str]:
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+?{]", pattern)) > _MOST_REPETITIONS:
        raise fields.error(key, f"has the pattern {pattern!r}, which may take too long to match")
    try:
        return re.compile(pattern)
    except re.error as exc:
        raise fields.error(key, f"has {pattern!r}, which is no regular expression: {exc}") from exc
