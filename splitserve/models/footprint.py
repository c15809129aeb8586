"""How much memory a model needs on each tier. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final

from splitserve.kv.page_shape import KvDtype, PageShape
from splitserve.models.config import ModelConfig
from splitserve.models.planner import ModelPlanner
from splitserve.parallel.shard import Shard
from splitserve.weights.checkpoint import Checkpoint
from splitserve.weights.source import MatrixSource

# Bytes of a weight of a projection: int4 with a 16-bit scale and zero for every 32 of them.
WEIGHT_BYTES: Final[Mapping[str, float]] = {
    "none": 2,
    "fp8": 1,
    "int8": 1,
    "int8-smooth": 1,
    "int4": 0.625,
    "int4-awq": 0.625,
}
_PLAIN_BYTES: Final = 2
_BLOCK_TOKENS: Final = 16


@dataclass(frozen=True)
class Workload:
    """What is to be served: so many sequences at once, each of so many tokens, computed in
    `weights` (a quantisation of what is stored plain) with KV in `kv_dtype` over `ranks` ranks.
    """

    context: int
    batch: int
    weights: str = "none"
    kv_dtype: KvDtype = "bfloat16"
    ranks: int = 1


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, activations left out: they are a few rows a token of a step.

    `decode` holds all sequences. `prefill` holds one prompt of the whole context while it is
    computed; `kvstore`, a process of its own in host memory, holds one on its way.
    """

    weights: int
    kv_of_token: int
    prefill: int
    decode: int
    kvstore: int


def footprint(checkpoint: Checkpoint, workload: Workload) -> Footprint:
    """Raises `ConfigError` if the model does not divide by the ranks, `CheckpointError` for a
    matrix that is not stored as it should be.
    """
    config = checkpoint.config
    planner = ModelPlanner(config, Shard(0, workload.ranks))
    attention = config.attention
    page = PageShape(
        config.num_layers,
        _BLOCK_TOKENS,
        attention.num_kv_heads,
        attention.head_dim,
        workload.kv_dtype,
    )
    own = replace(page, num_kv_heads=planner.num_kv_heads)
    weights = _weight_bytes(checkpoint, planner, WEIGHT_BYTES[workload.weights])
    return Footprint(
        weights=weights,
        kv_of_token=own.token_bytes,
        prefill=weights + workload.context * own.token_bytes,
        decode=weights + workload.batch * workload.context * own.token_bytes,
        kvstore=workload.context * page.token_bytes,
    )


def num_parameters(config: ModelConfig) -> int:
    """All weights of a model, a tied embedding counted once."""
    planner = ModelPlanner(config, Shard())
    seen = {source.name: prod(source.stored_shape) for source in planner.sources()}
    return sum(seen.values())


def _weight_bytes(checkpoint: Checkpoint, planner: ModelPlanner, plain_bytes: float) -> int:
    """Matrices as they are multiplied, which is as they are stored where that is quantised;
    vectors and tables in 16 bits.
    """
    total = 0.0
    for source in planner.sources():
        each: float = _PLAIN_BYTES
        if isinstance(source, MatrixSource):
            stored = checkpoint.weight_bytes(source)
            each = plain_bytes if stored is None else stored
        total += prod(source.read_shape) * each
    return round(total)
