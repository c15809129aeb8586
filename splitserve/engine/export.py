"""Writes a quantised copy of a checkpoint: what `--quantization` makes of it while loading.

Layer by layer, so that memory is that of one layer, its codes and the text it is run on:

1. The loader makes a layer as for serving. Its projections are quantised; nobody multiplies
   with them, they are only caught.
2. Smoothing is folded into what comes before, where that is possible (`folding`).
3. Matrices that were stacked for one product are cut into the tensors that they were stored as.
4. When all layers have been written, what was not quantised is copied as it is stored.

The unembedding stays as it is, so that a tied one is still the embedding and others' readers
find the plain one they expect. In integer modes config.json notes that it is rounded to int8
while loading, as `--quantization` does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Final, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from splitserve.engine.factory import Quantization
from splitserve.engine.folding import Folding, stored_rows
from splitserve.engine.quantization import ROUNDED_UNEMBEDDING, quantizing, rounds_unembedding
from splitserve.engine.torch_factory import parse_device, parse_dtype
from splitserve.errors import CheckpointError, ConfigError
from splitserve.models.config import ModelConfig
from splitserve.models.linear import Linear, choose_products
from splitserve.models.load import Loader
from splitserve.models.plan import LayerPlan, MlpPlan, ProjectionPlan
from splitserve.models.planner import ModelPlanner
from splitserve.parallel.group import SingleGroup
from splitserve.parallel.shard import Shard
from splitserve.quant.matrix import QuantizedMatrix, Weight
from splitserve.weights.arrays import ITEM_BYTES
from splitserve.weights.checkpoint import open_checkpoint
from splitserve.weights.dense import to_tensor
from splitserve.weights.grid import Grid
from splitserve.weights.hf_checkpoint import HuggingFaceCheckpoint
from splitserve.weights.source import MatrixSource
from splitserve.weights.stored import PLAIN_TYPES, StoredTensor
from splitserve.weights.writer import CheckpointWriter

MAX_SHARD_BYTES: Final = 4 << 30


@dataclass(frozen=True)
class ExportConfig:
    """What is written where, and how. `dtype` is the one in which weights are quantised and the
    model is run on text: that of the engine which would otherwise quantise while loading.
    """

    model: Path
    output: Path
    quantization: Quantization
    device: str = "cpu"
    dtype: str = "auto"
    max_shard_bytes: int = MAX_SHARD_BYTES


@dataclass(frozen=True)
class ExportReport:
    """What was written. `private_modules` have a smoothing that only this project reads."""

    num_quantized: int
    private_modules: tuple[str, ...]


def export(config: ExportConfig, *, show_progress: bool = False) -> ExportReport:
    """Writes the directory `config.output`, all or nothing.

    Raises `ConfigError` for a checkpoint that is quantised already and for settings that do not
    fit it, `CheckpointError` for what cannot be read, quantised or written, naming the tensor.
    """
    if config.model.is_file() and config.model.suffix == ".gguf":
        raise ConfigError(
            f"{config.model}: is quantised already, as a GGUF file; quantize takes a Hugging Face "
            "directory"
        )
    checkpoint = open_checkpoint(config.model)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    with CheckpointWriter(config.output, config.model, config.max_shard_bytes) as writer:
        return _Export(config, checkpoint, writer).run(show_progress)


class _Export:
    """One export."""

    def __init__(
        self, config: ExportConfig, checkpoint: HuggingFaceCheckpoint, writer: CheckpointWriter
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._writer = writer
        self._planner = ModelPlanner(checkpoint.config, Shard())
        self._divisors: dict[str, Tensor] = {}
        self._written: set[str] = set()
        self._private: list[str] = []

    def run(self, show_progress: bool) -> ExportReport:
        shape = self._checkpoint.config
        layers = range(shape.num_layers)
        for index in layers:
            _check_can_be_stored(self._planner.layer(index))
        with closing(self._matrices(shape)) as matrices:
            for index in tqdm(layers, "quantising", unit="layer", disable=not show_progress):
                self._write_layer(self._planner.layer(index), next(matrices))
        self._copy_the_rest(show_progress)
        self._note(shape)
        return ExportReport(len(self._written), tuple(self._private))

    def _matrices(self, shape: ModelConfig) -> Generator[list[QuantizedMatrix]]:
        """Each layer's, in the order in which they are loaded."""
        config = self._config
        device, dtype = parse_device(config.device), parse_dtype(config.dtype)
        caught = _Caught()
        products = choose_products(dtype, device, deterministic=False)
        products = replace(products, projection=caught.make)
        products, observers = quantizing(products, config.quantization, str(config.model))
        loader = Loader(shape, self._checkpoint, products, SingleGroup(), dtype, device)
        for _ in loader.blocks(loader.embedding(), shape.max_context_tokens, observers):
            yield caught.take()

    def _write_layer(self, plan: LayerPlan, matrices: Sequence[QuantizedMatrix]) -> None:
        made = zip(_projections(plan), matrices, strict=True)
        folding = Folding(self._checkpoint.config, plan, dict(made))
        folding.fold()
        self._divisors |= folding.divisors
        for projection, matrix in folding.matrices.items():
            self._write(projection, matrix)

    def _write(self, projection: ProjectionPlan, matrix: QuantizedMatrix) -> None:
        """A product's matrix, as the tensors that its weights were stored as."""
        start = 0
        for source in projection.weights:
            end = start + source.read_shape[0]
            self._writer.add_matrix(source.name, _as_stored(source, matrix, slice(start, end)))
            self._written.add(source.name)
            if matrix.smoothing is not None:
                self._private.append(source.module)
            start = end
        assert start == matrix.shape[0]

    def _copy_the_rest(self, show_progress: bool) -> None:
        """Masks and other buffers, whose types hold no weights, are no part of a checkpoint."""
        rest = {
            name: stored
            for name, stored in self._checkpoint.stored_tensors().items()
            if name not in self._written and stored.dtype in PLAIN_TYPES
        }
        needed = {source.name for source in self._planner.sources()}
        for name, stored in tqdm(rest.items(), "copying", disable=not show_progress):
            tensor = _read_whole(stored)
            if name in self._divisors:
                tensor = (tensor.float() / self._divisors[name]).to(tensor.dtype)
            if name in needed and not _is_finite(tensor):
                raise stored.error("has numbers that are not finite")
            self._writer.add_tensor(name, tensor)

    def _note(self, shape: ModelConfig) -> None:
        unembedding = shape.names.unembedding
        if f"{unembedding}.weight" not in self._checkpoint.stored_tensors():
            self._writer.leave_plain(unembedding)
        if rounds_unembedding(self._config.quantization):
            self._writer.note(ROUNDED_UNEMBEDDING, "int8")
        if self._private:
            self._writer.note("input_smoothing", sorted(self._private))


class _Caught:
    """Makes products of nothing, and keeps the matrices until they are taken."""

    def __init__(self) -> None:
        self._matrices: list[QuantizedMatrix] = []

    def make(self, weight: Weight, bias: Tensor | None) -> Linear:
        """A `MakeLinear`."""
        assert isinstance(weight, QuantizedMatrix)
        self._matrices.append(weight.to(torch.device("cpu")))
        return _never

    def take(self) -> list[QuantizedMatrix]:
        """All that were made since the last time, oldest first."""
        matrices, self._matrices = self._matrices, []
        return matrices


def _never(x: Tensor) -> NoReturn:
    raise AssertionError("the layer has been observed; nothing multiplies with it any more")


def _projections(plan: LayerPlan) -> Iterator[ProjectionPlan]:
    """Those of a layer that are quantised, in the order in which `Loader` makes them."""
    yield plan.qkv
    yield plan.attention_out
    mlps = [plan.mlp] if isinstance(plan.mlp, MlpPlan) else plan.mlp.experts.values()
    for mlp in mlps:
        yield mlp.gate_up
        yield mlp.down


def _check_can_be_stored(plan: LayerPlan) -> None:
    for projection in _projections(plan):
        for source in projection.weights:
            if source.stack:
                raise CheckpointError(
                    f"tensor {source.name!r} is a stack of experts, which the format cannot hold "
                    "quantised; leave it and use --quantization when loading"
                )


def _as_stored(source: MatrixSource, matrix: QuantizedMatrix, rows: slice) -> QuantizedMatrix:
    """One weight's part of a product's matrix, its rows where the checkpoint has them."""
    zeros = matrix.zeros
    return replace(
        matrix,
        codes=stored_rows(source, matrix.codes[rows]),
        scales=stored_rows(source, matrix.scales[rows]),
        zeros=None if zeros is None else stored_rows(source, zeros[rows]),
    )


def _is_finite(tensor: Tensor) -> bool:
    """Without a tensor of answers: an embedding is the largest there is."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _read_whole(stored: StoredTensor) -> Tensor:
    grid = Grid(stored, 1, prod(stored.shape), ITEM_BYTES[stored.dtype])
    return to_tensor(grid.read(), stored.dtype).reshape(stored.shape)
