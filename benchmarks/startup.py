"""How long an engine takes to open a checkpoint: one process with nothing compiled, and another.

    python benchmarks/startup.py --model benchmarks/models/llama-3.1-8b --device cuda \
        --dir /tmp/checkpoint --json out.json

Writes a checkpoint of the model's shape with random weights to `--dir`, in shards of safetensors as
they are published, unless there is one. It is in the page cache when the engine is opened. What is
timed is the whole process, from its start until the engine could take its first step: imports,
weights, kernels, graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import describe_machine
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARD_BYTES = 4 << 30
OPEN = "--open"


def write_checkpoint(model: Path, target: Path, device: str) -> None:
    """Random weights of the model's shape under the names that it is published with."""
    target.mkdir(parents=True)
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(empty, "_tied_weights_keys", None) or ())
    shapes = {
        name: tensor.shape
        for name, tensor in empty.state_dict().items()
        if not (config.tie_word_embeddings and name in tied)
    }
    index: dict[str, str] = {}
    for number, names in enumerate(shards(shapes)):
        file = f"model-{number:05}.safetensors"
        tensors = {
            name: (torch.randn(shapes[name], device=device) * 0.02).to(torch.bfloat16).cpu()
            for name in names
        }
        save_file(tensors, target / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    # Last, so that what was cut off is written anew.
    shutil.copy(model / "config.json", target / "config.json")


def shards(shapes: dict[str, torch.Size]) -> Iterator[list[str]]:
    """Names of the tensors of each file."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + 2 * shape.numel() > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * shape.numel()
    yield names


def open_once(options: argparse.Namespace) -> None:
    """In a process of its own."""
    from splitserve.engine.factory import EngineConfig, open_engine

    engine = open_engine(
        EngineConfig(
            model=str(options.dir),
            device=options.device,
            max_batch=options.max_batch,
            max_step_tokens=options.max_step_tokens,
            max_context_tokens=options.max_context_tokens,
        ),
        show_progress=True,
    )
    print(f"ready: {engine.spec.num_pages} pages", flush=True)
    engine.close()


def timed(words: list[str], cache: str) -> float:
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    began = time.monotonic()
    command = [sys.executable, *words, OPEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("ready"):
                seconds = time.monotonic() - began
    if process.returncode:
        raise RuntimeError(f"the engine could not be opened: exit code {process.returncode}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-step-tokens", type=int, default=2048)
    parser.add_argument("--max-context-tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    parser.add_argument(OPEN, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        open_once(options)
        return
    if not (options.dir / "config.json").exists():
        shutil.rmtree(options.dir, ignore_errors=True)
        write_checkpoint(options.model, options.dir, options.device)
    files = list(options.dir.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    for file in files:
        file.read_bytes()
    with tempfile.TemporaryDirectory() as cache:
        rows = {name: timed(sys.argv, cache) for name in ("nothing_compiled_s", "again_s")}
    print({"bytes": size, **rows}, flush=True)
    if options.json:
        document = {"machine": describe_machine(), "command": " ".join(sys.argv), "bytes": size}
        options.json.write_text(json.dumps(document | rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
