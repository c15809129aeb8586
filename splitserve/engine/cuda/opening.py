"""Puts a `CudaEngine` together and records its graphs."""

from __future__ import annotations

import torch
from tqdm import tqdm

from splitserve.engine.cuda.engine import CudaEngine
from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.graphs import numbers_of_nobody
from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.cuda.shapes import graph_shapes
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.page_memory import PageMemory, open_page_memory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.triton_attention import TritonAttention
from splitserve.kv.page_shape import PageShape
from splitserve.models.decoder import Decoder
from splitserve.parallel.group import Group

_GRAPHS_SHARE = 1.25
_LOGITS_COPIES = 4
_LIBRARIES_BYTES = 768 << 20
"""The CUDA context, workspaces of libraries, compiled kernels."""


def open_cuda_engine(
    spec: EngineSpec,
    model: Decoder,
    memory: PageMemory,
    group: Group,
    *,
    max_batch: int,
    max_step_tokens: int,
    show_progress: bool = False,
) -> CudaEngine:
    """An engine for steps of up to `max_batch` sequences and `max_step_tokens` tokens."""
    attention = _attention(memory, model)
    engine = CudaEngine(spec, model, memory, attention, group, max_batch=max_batch)
    shapes = graph_shapes(max_batch, max_step_tokens) if group.size == 1 else []
    shapes = [shape for shape in shapes if model.keeps_to_device(shape.total_rows)]
    with tqdm(
        total=len(shapes), desc="recording steps", unit="graph", disable=not show_progress
    ) as bar:
        engine.record(shapes, bar.update)
    engine.warm_up(max_step_tokens)
    return engine


@torch.inference_mode()
def step_bytes(model: Decoder, page: PageShape, *, max_batch: int, max_step_tokens: int) -> int:
    """What steps need of the GPU beside weights and pool: the largest one is run on a pool of one
    page, and graphs, draws and libraries get a share.
    """
    device = model.device
    memory = open_page_memory(page, 1, model.dtype, device)
    slots = SlotTable(max_batch, 1, device)
    forward = Forward(model, memory, _attention(memory, model), slots)
    shape = StepShape(0, max_step_tokens, 1)
    numbers = numbers_of_nobody(shape, slots.nobody).to(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward(shape, numbers, padded=True)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    logits = max_batch * model.config.vocab_size * torch.float32.itemsize
    return int(_GRAPHS_SHARE * peak) + _LOGITS_COPIES * logits + _LIBRARIES_BYTES


def _attention(memory: PageMemory, model: Decoder) -> TritonAttention:
    processors = torch.cuda.get_device_properties(model.device).multi_processor_count
    return TritonAttention(memory.layers(), model.rules, processors)
