"""Numbers on their way from the device to the host, behind what computes them."""

from __future__ import annotations

import torch
from torch import Tensor


class ReadBack:
    """One copy that was launched."""

    def __init__(self, memory: _Pinned, size: int, idle: list[_Pinned]) -> None:
        self._memory: _Pinned | None = memory
        self._size = size
        self._idle = idle

    def done(self) -> bool:
        """Whether `numbers` need not wait; never raises."""
        try:
            return self._memory is None or bool(self._memory.copied.query())  # type: ignore[no-untyped-call]
        except RuntimeError:
            return True

    def numbers(self) -> list[int]:
        """Waits for the copy and for nothing else. Once only: its memory is then another's."""
        memory, self._memory = self._memory, None
        if memory is None:
            raise RuntimeError("the numbers have been read already")
        memory.copied.synchronize()
        numbers: list[int] = memory.host[: self._size].tolist()
        self._idle.append(memory)
        return numbers


class ReadBacks:
    """Begins copies on the current stream, through pinned memory that is used again."""

    def __init__(self) -> None:
        self._idle: list[_Pinned] = []

    def begin(self, numbers: Tensor) -> ReadBack:
        """Of (size,) int64 on the device."""
        size = len(numbers)
        memory = self._idle.pop() if self._idle else _Pinned(size)
        if len(memory.host) < size:
            memory = _Pinned(size)
        memory.host[:size].copy_(numbers, non_blocking=True)
        memory.copied.record()
        return ReadBack(memory, size, self._idle)


class _Pinned:
    def __init__(self, size: int) -> None:
        self.host = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
