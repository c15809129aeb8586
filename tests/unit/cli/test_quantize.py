"""`splitserve quantize` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve import cli

from ..engine.quantizable import save

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("cli") / "model")


def run(*arguments: str | Path) -> int:
    try:
        return cli.main(["quantize", *map(str, arguments)])
    except SystemExit as exit_:
        return int(str(exit_.code))


def test_a_copy_is_written_and_told_of(model: Path, tmp_path: Path, capsys: Capture) -> None:
    output = tmp_path / "copy"
    assert run(model, output, "--quantization", "int4-awq", "--max-shard-bytes", "30000") == 0
    said = capsys.readouterr()
    # Two layers of query, key, value, output, gate, up and down.
    assert said.out.splitlines() == [
        f"{output}: 14 matrices in int4-awq",
        "2 of them have an input_smoothing that only splitserve reads, such as "
        "model.layers.0.self_attn.o_proj",
    ]
    assert said.err == ""
    assert len(list(output.glob("*.safetensors"))) > 1
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert cli.main(["models", str(output)]) == 0
    assert "will load:     yes" in capsys.readouterr().out


def test_no_more_is_said_where_every_reader_understands(
    model: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(model, tmp_path / "copy", "--quantization", "fp8") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'copy'}: 14 matrices in fp8\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "MODEL, OUTPUT, --quantization"),
        (["{model}", "{new}"], "--quantization"),
        (["{model}", "{new}", "--quantization", "none"], "--quantization"),
        (["{model}", "{new}", "--quantization", "int3"], "--quantization"),
        (["{model}", "{new}", "--quantization", "int8", "--max-shard-bytes", "0"], "at least 1"),
        (["{model}", "{new}", "--quantization", "int8", "--device", "abacus"], "abacus"),
        (["{model}", "{new}", "--quantization", "int8", "--dtype", "int8"], "'int8' is not one of"),
        (["{model}", "{model}", "--quantization", "int8"], "is there already"),
        (["/nowhere", "{new}", "--quantization", "int8"], "/nowhere"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    filled = [each.format(model=model, new=tmp_path / "copy") for each in arguments]
    assert run(*filled) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
