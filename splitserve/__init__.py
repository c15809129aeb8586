"""Disaggregated LLM serving: prefill and decode on separate tiers, over gRPC.

`LLM` runs a model in this process, `Client` talks to a running suite. Both are imported on first
use, so that a service that needs no torch never loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from splitserve.sampling import SamplingParams

if TYPE_CHECKING:
    from splitserve.client import Client
    from splitserve.llm import LLM

__all__ = ["LLM", "Client", "SamplingParams"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from splitserve.llm import LLM

        return LLM
    if name == "Client":
        from splitserve.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
