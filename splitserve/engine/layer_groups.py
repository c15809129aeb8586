"""When a step's layers are told of: a group at a time, once every rank has stored it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from splitserve.engine.protocol import EngineSpec, LayersDone


def ends_group(spec: EngineSpec, layer: int) -> bool:
    """Whether it is the last one of those that are told of together."""
    return (layer + 1) % spec.layer_group == 0 or layer + 1 == spec.num_layers


@contextlib.contextmanager
def reporting(
    spec: EngineSpec, layers_done: LayersDone | None, *, shared: bool
) -> Iterator[Callable[[int], None] | None]:
    """What a model calls within a step as it stores each layer; None if nobody waits.

    `shared`: other ranks compute with this one. This rank having stored a layer says nothing of
    them. Once it has stored the one after it, it has their sums of that layer, which they gave
    after they had stored it.
    """
    if layers_done is None:
        yield None
        return
    group, total = spec.layer_group, spec.num_layers

    def report(layer: int) -> None:
        if layer >= 0 and ends_group(spec, layer):
            layers_done(layer // group * group, layer + 1)

    if not shared:
        yield report
        return
    yield lambda layer: report(layer - 1)
    report(total - 1)
