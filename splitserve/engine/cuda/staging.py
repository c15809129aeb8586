"""Pinned host memory through which a step's numbers go to the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from splitserve.engine.cuda.layout import Numbers

_LEAST = 1 << 12
_DEPTH = 16
"""Copies that may be under way; one more waits for the oldest. They follow the steps on their
stream, and a step makes up to 8: with fewer than two steps' the host would wait for the device.
"""


class Staging:
    """A ring of buffers. A copy does not keep the host, and a buffer is written again only when its
    copy has been made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [_pinned(_LEAST) for _ in range(_DEPTH)]
        self._copied = [torch.cuda.Event() for _ in range(_DEPTH)]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, size: int, fill: Callable[[Numbers], None], out: Tensor | None = None) -> Tensor:
        """What `fill` writes into `size` numbers, on the device: at the start of `out` if given."""
        turn = self._next
        self._next = (turn + 1) % _DEPTH
        self._copied[turn].synchronize()
        if self._buffers[turn].numel() < size:
            self._buffers[turn] = _pinned(max(size, 2 * self._buffers[turn].numel()))
        source = self._buffers[turn][:size]
        fill(source.numpy())
        if out is None:
            out = torch.empty(size, dtype=torch.int64, device=self._device)
        elif out.numel() > size:
            out = out[:size]
        out.copy_(source, non_blocking=True)
        self._copied[turn].record()
        return out

    def send_lists(self, *lists: list[int]) -> tuple[Tensor, ...]:
        """Each list as int64 on the device, in one copy."""
        sizes = [len(each) for each in lists]

        def fill(numbers: Numbers) -> None:
            for part, values in zip(np.split(numbers, np.cumsum(sizes)[:-1]), lists, strict=True):
                part[:] = values

        return torch.split(self.send(sum(sizes), fill), sizes)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.int64, pin_memory=True)
