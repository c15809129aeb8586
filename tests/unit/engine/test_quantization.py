"""`--quantization`: what it does to a model, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from splitserve.engine.factory import Quantization
from splitserve.engine.quantization import quantizing
from splitserve.errors import CheckpointError, ConfigError, SplitserveError
from splitserve.models.linear import Linear, Products
from splitserve.quant.matrix import QuantizedMatrix, Weight

from .quantizable import distance, logits, open_engine, save

# Of logits against the plain model's, over their deviation. Random weights, in which no error
# averages out, lose far more than trained ones; each bound is about 1.5 times what was found.
MOST_LOST: dict[Quantization, float] = {
    "fp8": 0.18,
    "int8": 0.05,
    "int8-smooth": 0.07,
    "int4": 0.5,
    "int4-awq": 0.6,
}
NAMES = ("llama", "gpt2", "mixtral")
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Saves each model once."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else save(name, root / name)


@pytest.mark.parametrize("quantization", MOST_LOST)
@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_close(name: str, quantization: Quantization, models: Models) -> None:
    plain = logits(open_engine(models(name)))
    lost = distance(logits(open_engine(models(name), quantization)), plain)
    assert 0 < lost < MOST_LOST[quantization]


@pytest.mark.parametrize("quantization", MOST_LOST)
def test_deterministic_mode_is_the_same_in_any_chunks(
    quantization: Quantization, models: Models
) -> None:
    """And in two engines: quantising is itself repeatable."""
    name = "mixtral" if quantization == "int4-awq" else "llama"
    model = models(name)
    first = open_engine(model, quantization, "auto", deterministic=True)
    second = open_engine(model, quantization, "auto", deterministic=True)
    whole = logits(first)
    for chunk in (1, 7, 24):
        assert torch.equal(logits(second, chunk), whole)
    fast = logits(open_engine(model, quantization, "auto"))
    # bf16 keeps 8 bits.
    assert distance(fast, whole) < 0.1


class Seen:
    """Products that keep what they are made of."""

    def __init__(self) -> None:
        self.projection: list[Weight] = []
        self.unembedding: list[Weight] = []
        self.products = Products(
            projection=self._keeping(self.projection),
            unembedding=self._keeping(self.unembedding),
            exact=self._keeping([]),
        )

    def _keeping(self, kept: list[Weight]) -> Callable[[Weight, Tensor | None], Linear]:
        def make(weight: Weight, bias: Tensor | None) -> Linear:
            kept.append(weight)
            return lambda x: x

        return make


@pytest.mark.parametrize(
    ("quantization", "projection", "unembedding"),
    [
        ("fp8", "fp8", None),
        ("int8", "int8", "int8"),
        ("int4", "int4", "int8"),
    ],
)
def test_what_becomes_what(
    quantization: Quantization, projection: str, unembedding: str | None, models: Models
) -> None:
    seen = Seen()
    products, observers = quantizing(seen.products, quantization, str(models("llama")))
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    products.projection(weight, None)
    products.unembedding(weight, None)
    [made] = seen.projection
    assert isinstance(made, QuantizedMatrix)
    assert made.kind == projection
    [head] = seen.unembedding
    assert (head.kind if isinstance(head, QuantizedMatrix) else None) == unembedding
    assert observers == []


def test_none_leaves_all_as_it_is(models: Models) -> None:
    seen = Seen()
    assert quantizing(seen.products, "none", str(models("llama"))) == (seen.products, [])


def config(directory: Path, **changes: object) -> Path:
    found = json.loads((directory / "config.json").read_text())
    directory.joinpath("config.json").write_text(json.dumps(found | changes))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "model")


def refused(model: Path, quantization: Quantization, kind: type[SplitserveError]) -> str:
    with pytest.raises(kind) as refusal:
        quantizing(Seen().products, quantization, str(model))
    assert "\n" not in refusal.value.message
    return refusal.value.message


@pytest.mark.parametrize("quantization", ["fp8", "int8-smooth"])
@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "fp8"},
    ],
)
def test_what_is_quantised_already_is_refused(
    model: Path, stored: dict[str, object], quantization: Quantization
) -> None:
    said = refused(config(model, quantization_config=stored), quantization, ConfigError)
    method = stored["quant_method"]
    assert said == f"{model}: is quantised already ({method}); leave --quantization out"


def test_modelopts_own_file_counts(model: Path) -> None:
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert "is quantised already (modelopt)" in refused(model, "int8", ConfigError)


@pytest.mark.parametrize("coded", [False, True])
def test_gguf_files_count_by_their_types(tmp_path: Path, coded: bool) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if coded:
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor("output.weight", np.zeros((2, 18), np.uint8), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if coded:
        assert "is quantised already (Q4_0)" in refused(path, "int8", ConfigError)
    else:
        quantizing(Seen().products, "int8", str(path))


def test_text_needs_a_tokenizer_that_fits(model: Path) -> None:
    config(model, vocab_size=100, bos_token_id=1, eos_token_id=2)
    said = refused(model, "int4-awq", ConfigError)
    assert said.endswith("the tokenizer does not fit the model's vocabulary of 100")
    (model / "tokenizer.json").unlink()
    said = refused(model, "int4-awq", ConfigError)
    assert said.startswith("int8-smooth and int4-awq run the model on text while loading it: ")


def test_notes_that_are_not_known_are_refused(model: Path) -> None:
    config(model, splitserve={"rounded_unembedding": "int2"})
    assert "rounded_unembedding is 'int2', supported: 'int8'" in refused(
        model, "none", CheckpointError
    )


@pytest.mark.parametrize("rounded", [False, True])
def test_a_note_rounds_the_unembedding(model: Path, rounded: bool) -> None:
    seen = Seen()
    if rounded:
        config(model, splitserve={"rounded_unembedding": "int8"})
    products, _ = quantizing(seen.products, "none", str(model))
    products.unembedding(torch.eye(4), None)
    products.projection(torch.eye(4), None)
    assert isinstance(seen.unembedding[0], QuantizedMatrix) == rounded
    assert isinstance(seen.projection[0], Tensor)
