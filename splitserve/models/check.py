"""Whether a checkpoint has what a model needs, by its headers. Never imports torch."""

from __future__ import annotations

from splitserve.models.planner import ModelPlanner
from splitserve.parallel.shard import Shard
from splitserve.weights.checkpoint import Checkpoint
from splitserve.weights.source import MatrixSource


def check_weights(checkpoint: Checkpoint, ranks: int = 1) -> None:
    """Raises the `CheckpointError` or `ConfigError` that loading it over so many ranks would."""
    for rank in range(ranks):
        for source in ModelPlanner(checkpoint.config, Shard(rank, ranks)).sources():
            if isinstance(source, MatrixSource):
                checkpoint.check_matrix(source)
            else:
                checkpoint.check_tensor(source)
