"""Checkpoints that must not load: one clear line that names file and tensor, and never ready.

Every case is loaded in process, as `LLM`, `splitserve models` and the workers' own start do it;
a few as real processes, since importing torch for each takes seconds.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from splitserve import LLM, cli
from splitserve.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (32, 16),
    LAYER + "input_layernorm.weight": (16,),
    LAYER + "self_attn.q_proj.weight": (16, 16),
    LAYER + "self_attn.k_proj.weight": (8, 16),
    LAYER + "self_attn.v_proj.weight": (8, 16),
    LAYER + "self_attn.o_proj.weight": (16, 16),
    LAYER + "post_attention_layernorm.weight": (16,),
    LAYER + "mlp.gate_proj.weight": (24, 16),
    LAYER + "mlp.up_proj.weight": (24, 16),
    LAYER + "mlp.down_proj.weight": (16, 24),
}
UP = LAYER + "mlp.up_proj.weight"
SINGLE = "model.safetensors"


def write(directory: Path, **changes: Any) -> Path:
    """A good checkpoint, but for the changes to its config. It has no tokenizer."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(weights(), directory / SINGLE)
    return directory


def weights() -> dict[str, np.ndarray]:
    dice = np.random.default_rng(7)
    return {name: dice.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def change_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite what the safetensors file says of itself, and leave its data."""
    path = directory / SINGLE
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def header_cut_short(directory: Path) -> None:
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:100])


def data_cut_short(directory: Path) -> None:
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def header_lies_of_its_length(directory: Path) -> None:
    path = directory / SINGLE
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def header_lies_of_a_shape(directory: Path) -> None:
    change_header(directory, lambda header: header[UP].update(shape=[1 << 40, 1 << 20]))


def header_lies_of_an_offset(directory: Path) -> None:
    change_header(
        directory, lambda header: header[UP].update(data_offsets=[1 << 50, (1 << 50) + 1536])
    )


def tensors_overlap(directory: Path) -> None:
    gate = LAYER + "mlp.gate_proj.weight"
    change_header(
        directory, lambda header: header[UP].update(data_offsets=header[gate]["data_offsets"])
    )


def name_of_megabytes(directory: Path) -> None:
    change_header(directory, lambda header: header.update({"x" * (1 << 21): header.pop(UP)}))


def header_is_no_json(directory: Path) -> None:
    (directory / SINGLE).write_bytes((8).to_bytes(8, "little") + b"{" * 8 + bytes(100))


def tensor_missing(directory: Path) -> None:
    save_file({name: w for name, w in weights().items() if name != UP}, directory / SINGLE)


def wrong_shape(directory: Path) -> None:
    save_file(weights() | {UP: np.zeros((16, 24), np.float32)}, directory / SINGLE)


def integers(directory: Path) -> None:
    save_file(weights() | {UP: np.zeros((24, 16), np.int8)}, directory / SINGLE)


def shard_missing(directory: Path) -> None:
    names = {name: f"model-{1 + (name == UP)}.safetensors" for name in SHAPES}
    (directory / SINGLE).rename(directory / "model-1.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def shard_elsewhere(directory: Path) -> None:
    names = dict.fromkeys(SHAPES, "../../other.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class Bomb:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("unpickled"), "boom"))


def pickled(directory: Path) -> None:
    (directory / SINGLE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def gguf(*content: bytes) -> Callable[[Path], None]:
    """Something else than a good GGUF file, in `model.gguf`."""
    return lambda directory: (directory / "model.gguf").write_bytes(b"".join(content)) and None


def counts(tensors: int, keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


# A name, how the checkpoint is spoiled, what is changed in its config, what the line names.
CASES: list[tuple[str, Callable[[Path], None] | None, dict[str, Any], tuple[str, ...]]] = [
    ("header cut short", header_cut_short, {}, (SINGLE, "truncated")),
    ("data cut short", data_cut_short, {}, (SINGLE, "past the end")),
    ("lying header length", header_lies_of_its_length, {}, (SINGLE, str(2**63))),
    ("lying shape", header_lies_of_a_shape, {}, (SINGLE, UP)),
    ("lying offset", header_lies_of_an_offset, {}, (SINGLE, UP)),
    ("overlap", tensors_overlap, {}, (SINGLE, UP, "overlaps")),
    ("long name", name_of_megabytes, {}, (SINGLE, "xxxx", str(1 << 21))),
    ("no JSON", header_is_no_json, {}, (SINGLE, "JSON")),
    ("tensor missing", tensor_missing, {}, (UP, "missing")),
    ("wrong shape", wrong_shape, {}, (SINGLE, UP, "(16, 24)", "(24, 16)")),
    ("integers", integers, {}, (SINGLE, UP, "I8")),
    ("shard missing", shard_missing, {}, ("model-2.safetensors", "missing")),
    ("shard elsewhere", shard_elsewhere, {}, ("index.json", "../../other.safetensors")),
    ("pickle only", pickled, {}, ("pickled", "safetensors")),
    ("no config", no_config, {}, ("config.json",)),
    ("unknown architecture", None, {"architectures": ["OtherForCausalLM"]}, ("OtherForCausalLM",)),
    ("auto_map", None, {"auto_map": {"AutoModel": "evil.Model"}}, ("config.json", "auto_map")),
    ("no layers", None, {"num_hidden_layers": 0}, ("config.json", "num_layers")),
    ("huge", None, {"hidden_size": 1 << 40}, ("config.json", "hidden_size")),
    ("many layers", None, {"num_hidden_layers": 1000}, ("model.layers.1.", "missing")),
    ("odd heads", None, {"num_attention_heads": 3}, ("config.json", "num_attention_heads")),
    ("negative", None, {"vocab_size": -1}, ("config.json", "vocab_size")),
    ("not a number", None, {"rms_norm_eps": "NaN"}, ("config.json", "rms_norm_eps")),
    ("infinite base", None, {"rope_theta": 1e300}, ("config.json", "rope_theta")),
    ("other shape", None, {"intermediate_size": 25}, (SINGLE, "gate_proj", "(25, 16)")),
    ("empty gguf", gguf(), {}, ("model.gguf",)),
    ("gguf magic", gguf(b"GGML", bytes(60)), {}, ("model.gguf", "not a GGUF file")),
    ("gguf cut short", gguf(counts(1, 1)), {}, ("model.gguf", "truncated")),
    ("gguf counts", gguf(counts(2**63, 2**63), bytes(60)), {}, ("model.gguf", str(2**63))),
    ("gguf without keys", gguf(counts(0, 0), bytes(60)), {}, ("general.architecture", "missing")),
]


@pytest.fixture
def spoiled(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The checkpoint of a case."""
    _, spoil, changes, _ = request.param
    directory = write(tmp_path / "model", **changes)
    if spoil is not None:
        spoil(directory)
    file = directory / "model.gguf"
    return file if file.exists() else directory


each_case = pytest.mark.parametrize(
    ("spoiled", "names"),
    [pytest.param(case, case[3], id=case[0]) for case in CASES],
    indirect=["spoiled"],
)


def assert_one_line(message: str, path: Path, names: tuple[str, ...]) -> None:
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    for name in (path.name, *names):
        assert name in message


@each_case
def test_llm_raises_one_line(spoiled: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        LLM(model=str(spoiled), skip_tokenizer_init=True)
    assert_one_line(caught.value.message, spoiled, names)
    assert not Path("unpickled").exists()


@each_case
def test_the_models_command_says_the_same(
    spoiled: Path, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["models", str(spoiled), "--json"]) == 2
    out, err = capsys.readouterr()
    if not (spoiled.is_file() or (spoiled / "config.json").exists()):
        # A directory of other things is no broken checkpoint.
        assert_one_line(err, spoiled, ("no checkpoint there",))
        return
    report = json.loads(out)
    assert report["loads"] is False
    assert_one_line(report["problem"], spoiled, names)


def test_the_good_one_is_good(tmp_path: Path) -> None:
    with LLM(model=str(write(tmp_path / "model")), skip_tokenizer_init=True) as llm:
        assert len(llm.generate([[1, 2, 3]])[0].outputs[0].token_ids) > 0


async def refusal(tier: str, *flags: str) -> str:
    """The only line of a process that does not start. It never says that it is ready."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{tier}", "--port", "0", "--metrics-port", "0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert stdout == b""
    [line] = stderr.decode().splitlines()
    return line


PROCESSES = [case for case in CASES if case[0] in ("lying shape", "shard missing", "gguf counts")]


@pytest.mark.parametrize(
    ("spoiled", "names", "tier"),
    [
        pytest.param(case, case[3], tier, id=f"{tier}: {case[0]}")
        for case, tier in zip(PROCESSES, ("prefill", "decode", "prefill"), strict=True)
    ],
    indirect=["spoiled"],
)
async def test_a_worker_does_not_start(spoiled: Path, names: tuple[str, ...], tier: str) -> None:
    line = await refusal(tier, "--engine", "torch", "--model", str(spoiled))
    assert_one_line(line, spoiled, names)


async def test_a_router_needs_the_tokenizer_unless_told_otherwise(tmp_path: Path) -> None:
    model = write(tmp_path / "model")
    line = await refusal("router", "--model", str(model))
    assert_one_line(line, model, ("tokenizer.json", "skip_tokenizer_init"))
    (model / "tokenizer.json").write_text("{}")
    line = await refusal("router", "--model", str(model))
    assert_one_line(line, model, ("tokenizer.json", "not a valid tokenizer"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        LLM(model=str(model))


async def test_a_router_refuses_what_a_worker_would(tmp_path: Path) -> None:
    model = write(tmp_path / "model", auto_map={"AutoModel": "evil.Model"})
    line = await refusal("router", "--model", str(model), "--skip-tokenizer-init")
    assert_one_line(line, model, ("config.json", "auto_map"))
