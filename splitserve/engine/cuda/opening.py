"""Puts a `CudaEngine` together and records its graphs."""

from __future__ import annotations

import torch
from tqdm import tqdm

from splitserve.engine.cuda.engine import CudaEngine
from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.page_memory import PageMemory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.triton_attention import TritonAttention
from splitserve.models.decoder import Decoder
from splitserve.parallel.group import Group

_MIXED_SLOTS = (8, 32, 64, 128, 192, 256)
_MIXED_ROWS = (64, 128, 256, 384, 512, 768, 1024)
_MIXED_CHUNKS = 16


def open_cuda_engine(
    spec: EngineSpec,
    model: Decoder,
    memory: PageMemory,
    group: Group,
    *,
    max_batch: int,
    show_progress: bool = False,
) -> CudaEngine:
    """An engine for steps of up to `max_batch` sequences."""
    processors = torch.cuda.get_device_properties(model.device).multi_processor_count
    attention = TritonAttention(memory.layers(), model.rules, processors)
    engine = CudaEngine(spec, model, memory, attention, group, max_batch=max_batch)
    shapes = graph_shapes(max_batch) if group.size == 1 else []
    shapes = [shape for shape in shapes if model.keeps_to_device(shape.total_rows)]
    with tqdm(
        total=len(shapes), desc="recording steps", unit="graph", disable=not show_progress
    ) as bar:
        engine.record(shapes, bar.update)
    engine.warm_up()
    return engine


def graph_shapes(max_batch: int) -> list[StepShape]:
    """Steps that decode, padded by an eighth at most, and steps that compute short chunks of
    prompts beside.

    Without a graph a step costs the host some milliseconds. Chunks of more rows than those here
    keep the device busy for longer than that.
    """
    shapes = [StepShape(size) for size in _sizes(max_batch)]
    beside = {size for size in (*_MIXED_SLOTS, max_batch) if size <= max_batch}
    return shapes + [
        StepShape(slots, rows, _MIXED_CHUNKS) for slots in sorted(beside) for rows in _MIXED_ROWS
    ]


def _sizes(max_batch: int) -> list[int]:
    sizes = {1, 2, 3, 4, 6, max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += max(4, size // 8 // 4 * 4)
    return sorted(size for size in sizes if size <= max_batch)
