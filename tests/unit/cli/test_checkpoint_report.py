"""What is said of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve import cli
from splitserve.cli.checkpoint_report import find_checkpoints, inspect
from splitserve.models.footprint import Workload

ANY = Workload(context=0, batch=1)


@pytest.mark.model
def test_the_small_model_is_described(model_path: Path):
    report = inspect(model_path, Workload(context=1024, batch=2))
    assert report.loads
    assert report.problem == ""
    assert report.architecture == "LlamaForCausalLM"
    assert (report.num_layers, report.num_heads, report.num_kv_heads) == (30, 9, 3)
    assert (report.head_dim, report.vocab_size) == (64, 49152)
    # 2 (keys and values) x 30 layers x 3 heads x 64 x 2 bytes
    assert report.kv_bytes_per_token == 23_040
    assert report.parameters == 134_515_008
    # The embedding is looked up in 16 bits and multiplied by as codes of 8 bits, the projections
    # are codes of 4 bits (some of 8): what is stored quantised is held so.
    norms, table = 2 * 61 * 576, 49_152 * 576
    projections = report.weight_bytes - norms - 2 * table - round(1.125 * table)
    assert 0.625 <= projections / (134_515_008 - table - 61 * 576) < 0.65
    assert report.prefill_bytes == report.weight_bytes + 1024 * 23_040
    assert report.decode_bytes == report.weight_bytes + 2 * 1024 * 23_040
    assert "Q4_1" in report.stored_dtypes
    assert report.tokenizer == "yes, 49152 tokens"
    assert report.chat_template == "yes"


def test_a_broken_file_will_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\x00")
    report = inspect(broken, ANY)
    assert not report.loads
    assert "broken.gguf" in report.problem
    assert cli.main(["models", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["loads"] is False


def test_pickles_are_refused_unopened(tmp_path: Path):
    pickled = tmp_path / "pytorch_model.bin"
    pickled.write_bytes(b"")
    assert "can run code" in inspect(pickled, ANY).problem


def test_a_directory_is_searched_for_checkpoints(tmp_path: Path):
    (tmp_path / "b.gguf").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").touch()
    (tmp_path / "empty").mkdir()
    assert find_checkpoints(tmp_path) == [tmp_path / "a", tmp_path / "b.gguf"]
    assert find_checkpoints(tmp_path / "a") == [tmp_path / "a"]
    assert find_checkpoints(tmp_path / "empty") == []
    assert cli.main(["models", str(tmp_path / "empty")]) == 2
