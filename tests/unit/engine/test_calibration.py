"""A model that is quantised while it is loaded sees text as it does when it serves."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from splitserve.engine.calibration import Calibration
from splitserve.errors import CheckpointError
from splitserve.models.config import ExpertsConfig, MlpConfig, ModelConfig
from splitserve.models.families import mixtral
from splitserve.models.layers.rotary import Rotation
from splitserve.models.layers.self_attention import Attend
from splitserve.models.linear import Linear, PlainLinear, choose_products
from splitserve.models.load import Loader
from splitserve.parallel.group import SingleGroup
from splitserve.quant.matrix import QuantizedMatrix, Weight
from splitserve.quant.quantizers import quantize_int8
from splitserve.quant.scales import InputSeen
from splitserve.weights.source import MatrixSource, TensorSource

from ...tiny_model import CONFIG, CPU, RandomWeights

TEXTS = [[(7 * i) % 120 for i in range(19)], [5], [(11 * i) % 120 for i in range(30)]]
UNUSED = 2
MIXTURE = replace(
    CONFIG,
    names=mixtral.NAMES,
    mlp=None,
    experts=ExpertsConfig(MlpConfig(40), count=4, top_k=2, router_bias=True),
    layers=tuple(replace(layer, has_experts=True) for layer in CONFIG.layers),
)


class MixtureWeights(RandomWeights):
    """Whose routers never choose the third expert."""

    def tensor(self, source: TensorSource, dtype: torch.dtype) -> Tensor:
        values = super().tensor(source, dtype)
        if source.name.endswith("gate.bias"):
            values[UNUSED] = -1e9
        return values


@dataclass
class Asked:
    """What was to be quantised: the weight, of which only a trace is kept, and its inputs."""

    weight: weakref.ref[Tensor]
    inputs: Tensor | None


class Watch:
    """Quantises to int8 and remembers."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.made: list[Weight] = []

    def quantize(self, weight: Tensor, seen: InputSeen | None) -> QuantizedMatrix:
        self.asked.append(Asked(weakref.ref(weight), None if seen is None else seen.rows))
        return quantize_int8(weight)

    def make(self, weight: Weight, bias: Tensor | None) -> Linear:
        self.made.append(weight)
        dense = weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32)
        return PlainLinear(dense, bias)


class Recording:
    """A plain product that keeps its inputs."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        assert isinstance(weight, Tensor)
        self._product = PlainLinear(weight, bias)
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return self._product(x)


def weights_of(config: ModelConfig) -> RandomWeights:
    return MixtureWeights() if config.experts else RandomWeights()


def calibrate(config: ModelConfig, watch: Watch, texts: list[list[int]] = TEXTS) -> Calibration:
    """Loads all layers, which are quantised one after the other."""
    calibration = Calibration(texts, watch.quantize, watch.make)
    products = choose_products(torch.float32, CPU, deterministic=False)
    products = replace(products, projection=calibration.projection)
    loader = Loader(config, weights_of(config), products, SingleGroup(), torch.float32, CPU)
    for _ in loader.blocks(loader.embedding(), 512, [calibration]):
        assert all(asked.weight() is None for asked in watch.asked), "a weight is still held"
    return calibration


def plain_inputs(config: ModelConfig) -> list[Tensor | None]:
    """What each product of a plain model reads of all the texts, in the order of loading."""
    recordings: list[Recording] = []

    def make(weight: Weight, bias: Tensor | None) -> Linear:
        recordings.append(Recording(weight, bias))
        return recordings[-1]

    products = choose_products(torch.float32, CPU, deterministic=False)
    loader = Loader(
        config, weights_of(config), replace(products, projection=make), SingleGroup(),
        torch.float32, CPU,
    )  # fmt: skip
    model = loader.load(512)
    for text in TEXTS:
        model.hidden(torch.tensor(text), torch.arange(len(text)), _attention(config))
    return [torch.cat(each.inputs) if each.inputs else None for each in recordings]


def _attention(config: ModelConfig) -> Attend:
    """The definition: every query's softmax over the keys up to its own."""

    def attend(
        _: int, queries: Tensor, keys: Tensor, values: Tensor, rotation: Rotation | None
    ) -> Tensor:
        group = config.attention.num_heads // config.attention.num_kv_heads
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * config.attention.scale
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    return attend


@pytest.mark.parametrize("config", [CONFIG, MIXTURE], ids=["mlp", "experts"])
@torch.inference_mode()
def test_inputs_are_those_of_the_plain_model(config: ModelConfig) -> None:
    """All rows of all texts, in every layer: layers below have not been rounded yet."""
    watch = Watch()
    calibrate(config, watch)
    expected = plain_inputs(config)
    assert len(watch.asked) == len(expected) > 0
    for asked, inputs in zip(watch.asked, expected, strict=True):
        assert (asked.inputs is None) == (inputs is None)
        if asked.inputs is not None and inputs is not None:
            assert asked.inputs.shape == inputs.shape
            torch.testing.assert_close(asked.inputs, inputs, rtol=1e-3, atol=1e-4)


def test_an_expert_that_is_never_chosen_has_no_inputs() -> None:
    watch = Watch()
    calibrate(MIXTURE, watch)
    # Query, key and value; output; gate with up, and down, of four experts.
    unused = (2 + 2 * UNUSED, 3 + 2 * UNUSED)
    for number, asked in enumerate(watch.asked):
        assert (asked.inputs is None) == (number % 10 in unused)


def test_every_product_is_made_of_codes() -> None:
    watch = Watch()
    calibrate(CONFIG, watch)
    assert len(watch.made) == len(watch.asked) == 3 * 4
    assert all(isinstance(weight, QuantizedMatrix) for weight in watch.made)


def test_products_compute_with_codes_from_then_on() -> None:
    watch = Watch()
    calibration = Calibration(TEXTS, watch.quantize, watch.make)
    products = choose_products(torch.float32, CPU, deterministic=False)
    products = replace(products, projection=calibration.projection)
    loader = Loader(CONFIG, RandomWeights(), products, SingleGroup(), torch.float32, CPU)
    block = next(loader.blocks(loader.embedding(), 512, [calibration]))
    x = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = watch.make(watch.made[0], None)(x)
    bias = block.attention.qkv(torch.zeros_like(x))
    torch.testing.assert_close(block.attention.qkv(x), expected + bias, rtol=0, atol=1e-5)


def test_what_is_stored_quantised_stays_as_it_is() -> None:
    watch = Watch()
    calibration = Calibration(TEXTS, watch.quantize, watch.make)
    stored = quantize_int8(torch.eye(4))
    x = torch.ones(1, 4)
    torch.testing.assert_close(calibration.projection(stored, None)(x), x, rtol=0, atol=1e-2)
    assert watch.made == [stored]
    assert watch.asked == []


def test_text_that_overflows_is_refused() -> None:
    class Huge(RandomWeights):
        def matrix(self, source: MatrixSource, dtype: torch.dtype) -> Tensor:
            values = super().matrix(source, dtype)
            return values.fill_(3e38) if "layers.1.mlp.down" in source.name else values

    watch = Watch()
    calibration = Calibration(TEXTS, watch.quantize, watch.make)
    products = choose_products(torch.float32, CPU, deterministic=False)
    products = replace(products, projection=calibration.projection)
    loader = Loader(CONFIG, Huge(), products, SingleGroup(), torch.float32, CPU)
    with pytest.raises(CheckpointError, match="layer 1 gives numbers that are not finite"):
        list(loader.blocks(loader.embedding(), 512, [calibration]))
