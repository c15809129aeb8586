"""How fast a worker computes prompts, as far as its last steps tell."""

from __future__ import annotations

_MEMORY = 0.9
_MANY_TOKENS = 128


class PrefillRate:
    """Prompt tokens a second over the last ten or so steps, each weighing as much as it took.

    A step counts if it was full or had many tokens of prompts. One with a few of them beside those
    that decode takes as long without: it says nothing of how many could have been computed.
    """

    def __init__(self, full_step: int) -> None:
        """`full_step` is how many tokens a step has where no more would have fitted."""
        self._full_step = full_step
        self._tokens = 0.0
        self._seconds = 0.0

    def add(self, prompt_tokens: int, all_tokens: int, seconds: float) -> None:
        """Count a step that computed so many tokens of prompts, and so many in all."""
        tells = prompt_tokens >= _MANY_TOKENS or all_tokens >= self._full_step
        if prompt_tokens and tells and seconds > 0:
            self._tokens = _MEMORY * self._tokens + prompt_tokens
            self._seconds = _MEMORY * self._seconds + seconds

    @property
    def per_s(self) -> float:
        """Tokens a second; 0 where no step has told."""
        return self._tokens / self._seconds if self._seconds else 0.0
