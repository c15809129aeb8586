"""Programmatic dependent launch: a kernel is set up while the one before it is still running.

Every kernel that is launched so waits for the whole of the one before, which has waited in its
turn: what any earlier kernel wrote is there. Before the wait only what no kernel writes may be
touched.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


def launches_early(device: torch.device) -> bool:
    """Whether it works there: Hopper and later. What `launch_pdl` and a kernel's EARLY are."""
    return device.type == "cuda" and _capability(device) >= (9, 0)


@triton.jit
def wait_for_the_kernel_before() -> None:
    """Let the next kernel start, and wait for the one before: reads and writes come after this."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
