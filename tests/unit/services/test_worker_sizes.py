"""How long a step may be where nobody says so."""

from __future__ import annotations

import pytest

from services.decode.config import DecodeConfig
from services.prefill.config import PrefillConfig
from splitserve.worker.config import WorkerConfig


@pytest.mark.parametrize(
    ("tier", "given", "sizes"),
    [
        (DecodeConfig, {}, (64, 512)),
        (PrefillConfig, {}, (64, 512)),
        (DecodeConfig, {"device": "cuda:1"}, (256, 512)),
        (PrefillConfig, {"device": "cuda"}, (256, 2048)),
        (DecodeConfig, {"device": "cuda", "max_batch": "1000"}, (1000, 1032)),
        (DecodeConfig, {"device": "cuda", "block_tokens": 512}, (256, 1280)),
        (DecodeConfig, {"max_batch": 600}, (600, 632)),
        (DecodeConfig, {"device": "cuda", "max_step_tokens": 300}, (256, 300)),
    ],
)
def test_steps_are_as_long_as_suits_the_tier(
    tier: type[WorkerConfig], given: dict[str, object], sizes: tuple[int, int]
) -> None:
    config = tier(engine="fake", **given)
    assert (config.max_batch, config.core_config.max_step_tokens) == sizes
