"""How fast a worker computes prompts, as far as its last steps tell."""

from __future__ import annotations

_MEMORY = 0.9


class PrefillRate:
    """Prompt tokens a second over the last ten or so steps, each weighing as much as it took.

    Steps count that were at least half full. One with a few tokens of a prompt beside those that
    decode takes as long without: it says nothing of how many could have been computed.
    """

    def __init__(self, max_step_tokens: int) -> None:
        self._max_step_tokens = max_step_tokens
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, prompt_tokens: int, all_tokens: int, seconds: float) -> None:
        """Count a step that computed so many tokens of prompts, and so many in all."""
        if prompt_tokens and 2 * all_tokens >= self._max_step_tokens and seconds > 0:
            self._tokens = _MEMORY * self._tokens + prompt_tokens
            self._seconds = _MEMORY * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """Tokens a second; 0 where no step has told."""
        return self._tokens / self._seconds if self._seconds else 0.0
