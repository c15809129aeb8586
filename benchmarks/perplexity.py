"""Perplexity of every quantisation on English text, against bf16.

    .venv/bin/python benchmarks/perplexity.py --json benchmarks/results/perplexity.json

The text is the beginning of `pydoc_data.topics`, which every Python has; calibration reads its
end. The model's channels are shuffled first: see `shuffled_model`.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from shuffled_model import write_shuffled
from tqdm import tqdm

from splitserve.engine.factory import EngineConfig
from splitserve.engine.protocol import Slice
from splitserve.engine.torch_factory import open_torch_engine
from splitserve.tokenizer import Tokenizer

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32": {"dtype": "float32"},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "int8-smooth": {"quantization": "int8-smooth"},
    "int4": {"quantization": "int4"},
    "int4-awq": {"quantization": "int4-awq"},
    "KV fp8": {"kv_dtype": "fp8"},
    "KV int8": {"kv_dtype": "int8"},
}
LIMITS = {"fp8": 1.5, "int8": 0.5, "int8-smooth": 1.5, "int4": 8.0, "int4-awq": 5.0, "KV fp8": 0.5}
WINDOW = 512
POOL_BYTES = 1 << 26


@dataclass(frozen=True)
class Row:
    """One setting. `change` is that of the perplexity against bf16's, in percent."""

    setting: str
    perplexity: float
    change: float
    limit: float | None
    load_s: float


def windows(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """The beginning of the text, cut into windows of 512 tokens."""
    topics = pydoc_data.topics.topics
    tokens = tokenizer.encode(
        "\n".join(topics[name] for name in sorted(topics))[: count * WINDOW * 8]
    )
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]


def perplexity(config: EngineConfig, texts: list[list[int]], name: str) -> tuple[float, float]:
    """exp of the mean negative log-probability of all tokens but each window's first; seconds
    that loading took.
    """
    start = time.monotonic()
    engine = open_torch_engine(config, show_progress=True)
    load_s = time.monotonic() - start
    pages = range(-(-WINDOW // config.block_tokens))
    total, count = 0.0, 0
    for text in tqdm(texts, desc=name, unit="window"):
        logprobs = torch.log_softmax(engine.score(Slice(text, 0, pages, ())), dim=-1)
        targets = torch.tensor(text[1:], device=logprobs.device)
        total -= float(logprobs[:-1].gather(1, targets[:, None]).double().sum())
        count += len(text) - 1
    return math.exp(total / count), load_s


def measure(model: Path, names: list[str], count: int, device: str, *, shuffled: bool) -> list[Row]:
    texts = windows(Tokenizer.from_checkpoint(model), count)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        path = write_shuffled(model, Path(directory), shuffled=shuffled)
        for name in names:
            settings = {"device": device, "pool_bytes": POOL_BYTES, **SETTINGS[name]}
            value, load_s = perplexity(EngineConfig(model=str(path), **settings), texts, name)
            change = 100 * (value / rows[0].perplexity - 1) if rows else 0.0
            rows.append(Row(name, value, change, LIMITS.get(name), load_s))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--as-stored", action="store_true", help="leave channels where 4 bits once put them"
    )
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    options = parser.parse_args()
    rows = measure(
        options.model,
        options.settings,
        options.windows,
        options.device,
        shuffled=not options.as_stored,
    )
    if options.json:
        document = {
            "machine": describe_machine(),
            "shuffled": not options.as_stored,
            "tokens": options.windows * (WINDOW - 1),
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| setting | perplexity | against bf16 | limit |", "|---|---|---|---|"]
    for row in rows:
        limit = "" if row.limit is None else f"+{row.limit}%"
        lines.append(f"| {row.setting} | {row.perplexity:.3f} | {row.change:+.2f}% | {limit} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
