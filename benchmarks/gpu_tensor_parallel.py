"""Two ranks on two GPUs against one on tiny models: the same greedy tokens, over NCCL.

python benchmarks/gpu_tensor_parallel.py --json results.json
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

from splitserve import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    ("llama", "llama-gqa-biases-llama3-rope"),
    ("announced", "falcon-40b"),
    ("experts", "mixtral"),
    ("modern", "olmo2-mha"),
)


def greedy(path: Path, prompts: list[list[int]], ranks: int, device: str) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM(
        str(path),
        device=device,
        dtype="float32",
        block_tokens=4,
        pool_bytes=1 << 22,
        tensor_parallel_size=ranks,
        skip_tokenizer_init=True,
    ) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["SPLITSERVE_TEST_DEVICE"] = "cpu"
    sys.path.insert(0, str(ROOT))
    parity = importlib.import_module("tests.families.parity")
    rows = []
    for module, name in CASES:
        cases = importlib.import_module(f"tests.families.test_{module}").CASES
        [case] = [each for each in cases if each.name == name]
        with tempfile.TemporaryDirectory() as directory:
            model = parity.random_model(case.config, seed=1)
            path = parity.save(model, Path(directory) / "model")
            vocab = case.config.vocab_size
            prompts = [parity.prompt_of(vocab, seed) for seed in range(4)]
            start = time.monotonic()
            one = greedy(path, prompts, 1, options.device)
            two = greedy(path, prompts, 2, options.device)
        rows.append({"case": name, "equal": one == two, "seconds": time.monotonic() - start})
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if not all(row["equal"] for row in rows):
        raise SystemExit("two ranks differ from one")


if __name__ == "__main__":
    main()
