"""How torch's compute threads on a CPU wait for each other.

GNU OpenMP's threads spin at a barrier for a while before they sleep, and a step of a small model
has hundreds of barriers. Alone on its cores an engine is fastest when they spin for long. As soon
as anything else wants a core, a thread that spins takes the time of the one that it waits for,
and steps take seconds. A serving tier shares its machine, so spinning is kept short.
"""

from __future__ import annotations

import os

SPIN_COUNT = "1000"
"""Some ten microseconds; the default is 300 times that."""


def yield_cores_when_waiting() -> None:
    """Shorten the spinning. Call before torch is imported.

    A user's own `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def share_of_cores() -> int:
    """Compute threads for a tier that shares this machine with another: half of the cores."""
    return max(1, len(os.sched_getaffinity(0)) // 2)
