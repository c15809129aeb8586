"""Puts a `CudaEngine` together and records its graphs."""

from __future__ import annotations

import torch
from tqdm import tqdm

from splitserve.engine.cuda.engine import CudaEngine
from splitserve.engine.cuda.forward import Forward
from splitserve.engine.cuda.graphs import numbers_of_nobody
from splitserve.engine.cuda.layout import StepShape
from splitserve.engine.cuda.slots import SlotTable
from splitserve.engine.page_memory import PageMemory, open_page_memory
from splitserve.engine.protocol import EngineSpec
from splitserve.engine.triton_attention import TritonAttention
from splitserve.kv.page_shape import PageShape
from splitserve.models.decoder import Decoder
from splitserve.parallel.group import Group

_MIXED_SLOTS = (8, 32, 64, 128, 192, 256)
_MIXED_ROWS = (64, 128, 256, 384, 512, 768, 1024)
_PROMPT_SLOTS = 8
_PROMPT_ROWS = (1536, 2048)
_MIXED_CHUNKS = 16
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
    engine.warm_up()
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


def graph_shapes(max_batch: int, max_step_tokens: int) -> list[StepShape]:
    """Steps that decode, padded by three rows or an eighth, steps that compute short chunks of
    prompts beside, and steps of prompts with few who decode, as a prefill worker has them.

    Without a graph a step costs the host 10 to 40 ms. Chunks of more rows than those here keep the
    device busy for longer than that.
    """
    few = min(_PROMPT_SLOTS, max_batch)
    beside = {size for size in (*_MIXED_SLOTS, max_batch) if size <= max_batch}
    prompts = [(slots, rows) for slots in sorted(beside) for rows in _MIXED_ROWS]
    prompts += [(few, rows) for rows in _PROMPT_ROWS]
    # The least that holds the largest step; what is larger can never come.
    most = min((rows for _, rows in prompts if rows >= max_step_tokens), default=_PROMPT_ROWS[-1])
    shapes = [StepShape(size) for size in _sizes(max_batch)]
    return shapes + [StepShape(*each, _MIXED_CHUNKS) for each in prompts if each[1] <= most]


def _sizes(max_batch: int) -> list[int]:
    sizes = {1, 2, 3, 4, 6, max_batch}
    size = 8
    while size < max_batch:
        sizes.add(size)
        size += max(4, size // 8 // 4 * 4)
    return sorted(size for size in sizes if size <= max_batch)
