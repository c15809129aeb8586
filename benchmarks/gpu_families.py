"""Every family's tiny models on a GPU, in fp32, against transformers on the CPU.

    python benchmarks/gpu_families.py --json results.json [--part 1/4]

The cases are those of `tests/families`: logits after every token of a prompt in chunks, and 48
greedy tokens. Most of the time goes into compiling kernels: several parts can run at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("announced", "code", "experts", "llama", "modern", "rope_scalings")


def measure(case: Any, parity: Any, directory: Path) -> dict[str, object]:
    model = parity.random_model(case.config, seed=len(case.name))
    path = parity.save(model, directory)
    engine = parity.open_engine(path, context=case.context)
    prompt = parity.prompt_of(engine.spec.vocab_size, seed=3)
    tokens = parity.greedy(engine, engine, prompt)
    expected = parity.expected_logits(model, prompt + tokens)
    found = parity.chunked_logits(engine, prompt + tokens)
    return {
        "case": case.name,
        "greedy_equal": tokens == parity.greedy_from(expected, len(prompt)),
        "max_logit_error": float((found - expected).abs().max()),
        "engine": type(engine).__name__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", default="1/1", help="K/N: every Nth case from the Kth on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    os.environ["SPLITSERVE_TEST_DEVICE"] = options.device
    sys.path.insert(0, str(ROOT))
    parity = importlib.import_module("tests.families.parity")
    modules = [importlib.import_module(f"tests.families.test_{name}") for name in MODULES]
    cases = [case for module in modules for case in module.CASES]
    rows: list[dict[str, object]] = []
    for case in cases[part - 1 :: parts]:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            try:
                row = measure(case, parity, Path(directory) / "model")
            except Exception as error:
                row = {"case": case.name, "error": f"{type(error).__name__}: {error}"[:300]}
        rows.append({**row, "seconds": round(time.monotonic() - start, 2)})
        print(rows[-1], flush=True)
    good = [row for row in rows if row.get("greedy_equal")]
    print(f"{len(good)} of {len(rows)} equal")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
