"""Random weights of the shape that a config.json says, and a bench on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from splitserve.cli import main
from splitserve.engine.factory import EngineConfig, open_engine
from splitserve.engine.protocol import Draw, Slice
from splitserve.sampling import SamplingParams
from splitserve.weights.dummy_checkpoint import DummyCheckpoint
from splitserve.weights.source import MatrixSource, TensorSource

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 200,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_weights_have_their_shapes_and_are_the_same_in_every_run(model: Path) -> None:
    draws = []
    for _ in range(2):
        checkpoint = DummyCheckpoint(model, torch.device("cpu"))
        norm = checkpoint.tensor(TensorSource("norm.weight", (64,)), torch.float32)
        matrix = checkpoint.matrix(MatrixSource("q_proj", (64, 48)), torch.bfloat16)
        draws.append((norm, matrix))
    norm, matrix = draws[0]
    assert norm.shape == (64,)
    assert 0.8 < norm.mean() < 1.2
    assert matrix.shape == (64, 48)
    assert matrix.dtype is torch.bfloat16
    assert matrix.float().std() > 0
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_an_engine_computes_with_them(model: Path) -> None:
    engine = open_engine(EngineConfig(model=str(model), load_format="dummy", pool_bytes=1 << 20))
    draws = [Draw(SamplingParams(temperature=0), 0, 0, (), ())]
    [[token]] = engine.step([Slice([1, 2, 3], 0, [0], draws)])
    assert 0 <= token.token_id < CONFIG["vocab_size"]
    engine.close()


@pytest.mark.parametrize("flags", [[], ["--static-batches"]])
def test_a_bench_needs_no_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    workload = tmp_path / "workload.jsonl"
    lines = [{"id": i, "prompt_tokens": 4 + i, "output_tokens": 3 + i} for i in range(5)]
    workload.write_text("\n".join(map(json.dumps, lines)))
    numbers = tmp_path / "out.json"
    command = ["bench", "--engine", "--load-format", "dummy", "--model", str(model)]
    command += ["--workload", str(workload), "--max-batch", "4", "--json", str(numbers), *flags]
    assert main(command) == 0
    report = json.loads(numbers.read_text())
    assert report["completed"] == 5
    assert report["output_tokens"] == sum(line["output_tokens"] for line in lines)
    assert ("static" in report["pacing"]) == bool(flags)
    assert "5 completed, 0 failed" in capsys.readouterr().out
