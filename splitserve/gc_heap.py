"""Keeps what a process is made of out of the garbage collector's way."""

from __future__ import annotations

import gc


def freeze_gc_heap() -> None:
    """Have collections pass over everything that is there now. Call it once, when the process has
    been set up and begins to serve.

    Torch and what comes with it are a million objects. To look for cycles among them takes a tenth
    of a second, in which no step is planned.
    """
    gc.collect()
    gc.freeze()
