"""What is written quantised is what quantising while loading makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from splitserve.engine.export import ExportConfig, export
from splitserve.engine.factory import Quantization
from splitserve.errors import CheckpointError, ConfigError, SplitserveError

from ...families import parity
from .quantizable import CONFIGS, TOKENS, distance, logits, open_engine, save

CALIBRATED: tuple[Quantization, ...] = ("int8-smooth", "int4-awq")
ROUNDED: tuple[Quantization, ...] = ("fp8", "int8", "int4")
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Saves each model once."""
    root = tmp_path_factory.mktemp("models")
    return lambda name: root / name if (root / name).exists() else save(name, root / name)


@pytest.fixture
def plain(models: Models, tmp_path: Path) -> Path:
    """A copy of a small one that a test may change."""
    return Path(shutil.copytree(models("llama"), tmp_path / "plain"))


def written(model: Path, output: Path, quantization: Quantization, dtype: str = "float32") -> Path:
    report = export(ExportConfig(model, output, quantization, dtype=dtype))
    assert report.num_quantized > 0
    return output


def config_of(directory: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((directory / "config.json").read_text())
    return found


def names_of(directory: Path) -> set[str]:
    names: set[str] = set()
    for shard in directory.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("quantization", ROUNDED)
@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_weights_give_the_same_bits(
    name: str, quantization: Quantization, models: Models, tmp_path: Path
) -> None:
    """Whatever way projections are stored: apart, stacked, grouped, transposed, as experts."""
    copy = written(models(name), tmp_path / "copy", quantization)
    expected = logits(open_engine(models(name), quantization))
    assert torch.equal(logits(open_engine(copy)), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16_gives_the_same_bits(name: str, models: Models, tmp_path: Path) -> None:
    copy = written(models(name), tmp_path / "copy", "int4", "auto")
    expected = logits(open_engine(models(name), "int4", "auto"))
    assert torch.equal(logits(open_engine(copy, dtype="auto")), expected)


@pytest.mark.parametrize("quantization", CALIBRATED)
@pytest.mark.parametrize("name", CONFIGS)
def test_folded_smoothing_gives_the_same_but_for_rounding(
    name: str, quantization: Quantization, models: Models, tmp_path: Path
) -> None:
    """x / s rounds elsewhere than norm(x; weight / s), which int8 inputs on an edge show."""
    copy = written(models(name), tmp_path / "copy", quantization)
    expected = logits(open_engine(models(name), quantization))
    most = 2e-2 if quantization == "int8-smooth" else 1e-5
    assert distance(logits(open_engine(copy)), expected) < most


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama-tied", set()),
        ("phi3", set()),
        # Two query heads share a value head, each with a smoothing of its own.
        ("llama", {"self_attn.o_proj"}),
        # There is no gate.
        ("neox", {"mlp.dense_4h_to_h"}),
        ("gpt2", {"mlp.c_proj"}),
        # Norms keep their weights less one, which cannot be divided in bf16.
        ("gemma", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                   "mlp.gate_proj", "mlp.up_proj"}),
    ],
)  # fmt: skip
def test_smoothing_is_folded_where_nobody_else_reads(
    name: str, kept: set[str], models: Models, tmp_path: Path
) -> None:
    copy = written(models(name), tmp_path / "copy", "int4-awq")
    suffix = ".input_smoothing"
    private = {each.removesuffix(suffix) for each in names_of(copy) if each.endswith(suffix)}
    assert {".".join(each.split(".")[-2:]) for each in private} == kept
    notes = config_of(copy)["splitserve"]
    assert isinstance(notes, dict)
    assert notes.get("input_smoothing", []) == sorted(private)


def test_experts_keep_theirs_because_the_router_reads_the_norm(
    models: Models, tmp_path: Path
) -> None:
    report = export(ExportConfig(models("mixtral"), tmp_path / "copy", "int8-smooth"))
    assert {each.rpartition(".")[2] for each in report.private_modules} == {"o_proj", "w1", "w3"}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", "fp8"), ("neox", "int8"), ("phi3", "int4"), ("llama-tied", "int4-awq"),
     ("phi3", "int4-awq")],
)  # fmt: skip
def test_transformers_reads_it(
    name: str, quantization: Quantization, models: Models, tmp_path: Path
) -> None:
    """Which knows nothing of this project's notes; without them the logits are the same."""
    copy = written(models(name), tmp_path / "copy", quantization)
    config = config_of(copy)
    config.pop("splitserve", None)
    (copy / "config.json").write_text(json.dumps(config))
    options = CompressedTensorsConfig(dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        copy, dtype=torch.float32, quantization_config=options
    )
    expected = parity.expected_logits(model.eval(), TOKENS)
    assert distance(logits(open_engine(copy)), expected) < 1e-5


def test_the_rest_is_as_it_was(models: Models, tmp_path: Path) -> None:
    model = models("llama-tied")
    copy = written(model, tmp_path / "copy", "int8")
    before = load_file(model / "model.safetensors")
    (shard,) = copy.glob("*.safetensors")
    after = load_file(shard)
    same = {name for name in before if name in after and before[name].dtype == after[name].dtype}
    assert same == {name for name in before if not name.endswith("proj.weight")}
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert (copy / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    config = config_of(copy)
    assert config["splitserve"] == {"rounded_unembedding": "int8"}
    quantization = config["quantization_config"]
    assert isinstance(quantization, dict)
    assert {"lm_head", "model.embed_tokens"} <= set(quantization["ignore"])
    fp8 = config_of(written(model, tmp_path / "fp8", "fp8"))
    assert "splitserve" not in fp8


def test_shards_are_as_small_as_asked(models: Models, tmp_path: Path) -> None:
    config = ExportConfig(
        models("llama"), tmp_path / "copy", "int8", dtype="float32", max_shard_bytes=20_000
    )
    export(config)
    for shard in config.output.glob("*.safetensors"):
        tensors = load_file(shard)
        # A module is never torn apart, and two tables alone are larger than was asked for.
        assert sum(each.nbytes for each in tensors.values()) <= 20_000 or len(tensors) == 1
    expected = logits(open_engine(config.model, "int8"))
    assert torch.equal(logits(open_engine(config.output)), expected)


def refused(config: ExportConfig, kind: type[SplitserveError], said: str) -> None:
    """In one line that has these words, and without a trace of the copy."""
    there = sorted(config.output.parent.iterdir())
    with pytest.raises(kind, match=said) as refusal:
        export(config)
    assert "\n" not in refusal.value.message
    assert sorted(config.output.parent.iterdir()) == there


def test_what_is_quantised_already_is_refused(models: Models, tmp_path: Path) -> None:
    once = written(models("llama"), tmp_path / "once", "int8")
    said = r"once: is quantised already \(compressed-tensors\); leave --quantization out"
    refused(ExportConfig(once, tmp_path / "twice", "fp8"), ConfigError, said)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    gguf = ExportConfig(tmp_path / "model.gguf", tmp_path / "twice", "fp8")
    refused(gguf, ConfigError, "is quantised already, as a GGUF file")


def test_an_output_that_is_there_is_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    refused(ExportConfig(plain, tmp_path / "taken", "fp8"), CheckpointError, "is there already")


@pytest.mark.parametrize("quantization", CALIBRATED)
def test_text_needs_a_tokenizer(plain: Path, tmp_path: Path, quantization: Quantization) -> None:
    (plain / "tokenizer.json").unlink()
    said = "run the model on text.*tokenizer"
    refused(ExportConfig(plain, tmp_path / "copy", quantization), ConfigError, said)


@pytest.mark.parametrize("quantization", ["int4", "int4-awq"])
def test_groups_that_do_not_divide_name_the_tensor(
    models: Models, tmp_path: Path, quantization: Quantization
) -> None:
    model = Path(shutil.copytree(models("llama"), tmp_path / "odd"))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:72].contiguous()
        elif "down_proj" in name:
            tensors[name] = tensor[:, :72].contiguous()
    save_file(tensors, model / "model.safetensors")
    config = config_of(model) | {"intermediate_size": 72}
    (model / "config.json").write_text(json.dumps(config))
    said = r"'model\.layers\.0\.mlp\.down_proj\.weight': groups of 32 do not divide 72 columns"
    refused(ExportConfig(model, tmp_path / "copy", quantization), CheckpointError, said)


@pytest.mark.parametrize("quantization", [*ROUNDED, *CALIBRATED])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_numbers_that_are_not_finite_name_the_tensor(
    name: str, quantization: Quantization, plain: Path, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = load_file(plain / "model.safetensors")
    tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, plain / "model.safetensors")
    refused(ExportConfig(plain, tmp_path / "copy", quantization), CheckpointError, f"'{name}'")


def test_a_layer_that_overflows_on_text_is_refused(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(3e38)
    save_file(tensors, plain / "model.safetensors")
    said = "layer 1 gives numbers that are not finite"
    config = ExportConfig(plain, tmp_path / "copy", "int4-awq", dtype="float32")
    refused(config, CheckpointError, said)


def test_stacks_of_experts_are_refused(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=128,
    )  # fmt: skip
    model = parity.save(parity.random_model(config, seed=1), tmp_path / "model")
    said = "layers.0.mlp.experts.gate_up_proj' is a stack of experts"
    refused(ExportConfig(model, tmp_path / "copy", "fp8"), CheckpointError, said)
