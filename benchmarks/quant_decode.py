"""Decoding one sequence on a CPU with weights of fewer bits, and llama.cpp on the same file.

    .venv/bin/python benchmarks/quant_decode.py --json benchmarks/results/quant_decode.json \\
        --llama-python /path/to/venv/bin/python   # one that has the package xllamacpp

Each measurement is a process of its own; rounds go through all of them in turn, so that a slow
minute of a shared machine falls on each. Ratios within a run mean something, seconds do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine
from shuffled_model import write_shuffled

PROMPT_TOKENS = 64
STEPS = 160
WARM_UP = 32
SETTINGS = {
    "bf16": {},
    "fp8": {"quantization": "fp8"},
    "int8": {"quantization": "int8"},
    "int8-smooth": {"quantization": "int8-smooth"},
    "int4": {"quantization": "int4"},
}
GGUF = "GGUF Q4_1 as it is"
LLAMA = "llama.cpp, the same GGUF"


def steps_per_second(model: str, settings: dict[str, str], threads: int) -> float:
    """Engine steps of one sequence: the median."""
    from splitserve.engine.factory import EngineConfig, open_engine
    from splitserve.engine.protocol import Draw, Slice
    from splitserve.sampling import SamplingParams

    engine = open_engine(
        EngineConfig(model=model, pool_bytes=1 << 26, threads=threads, **settings)  # type: ignore[arg-type]
    )
    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    pages, prompt = list(range(32)), list(range(100, 100 + PROMPT_TOKENS))
    engine.step([Slice(prompt, 0, pages, ())])
    seconds, token = [], 5
    for place in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
        start = time.perf_counter()
        draws = (Draw(params, 0, 0, prompt, ()),)
        [[drawn]] = engine.step([Slice([token], place, pages, draws)])
        token = drawn.token_id
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[WARM_UP:])


LLAMA_SCRIPT = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup = 512, 1, True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(params)
request = {"prompt": list(range(100, 164)), "n_predict": 160, "temperature": 0, "ignore_eos": True}
answer = server.handle_completions(request)
answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
answer = answer[0] if isinstance(answer, list) else answer
print("RESULT", answer["timings"]["predicted_per_second"])
"""


def measured(command: list[str]) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return float(lines[-1].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct.Q4_1.gguf")
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama-python", help="an interpreter that has xllamacpp")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, settings = options.one
        print("RESULT", steps_per_second(model, json.loads(settings), options.threads))
        return
    with tempfile.TemporaryDirectory() as directory:
        plain = write_shuffled(options.model, Path(directory))
        rates = measure(options, plain)
    rows = [summary(name, values, rates["bf16"]) for name, values in rates.items()]
    print("| weights | tokens/s | against bf16 (range) |\n|---|---|---|")
    for row in rows:
        low, high = row["lowest_ratio"], row["highest_ratio"]
        print(
            f"| {row['weights']} | {row['tokens_per_s']:.0f} | {row['ratio']:.2f} x "
            f"({low:.2f}-{high:.2f}) |"
        )
    if options.json:
        document = {"machine": describe_machine(), "threads": options.threads, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


def measure(options: argparse.Namespace, plain: Path) -> dict[str, list[float]]:
    ours = [sys.executable, __file__, "--threads", str(options.threads), "--one"]
    commands = {
        name: [*ours, str(plain), json.dumps(settings)] for name, settings in SETTINGS.items()
    }
    commands[GGUF] = [*ours, str(options.model), "{}"]
    if options.llama_python:
        script = [options.llama_python, "-c", LLAMA_SCRIPT]
        commands[LLAMA] = [*script, str(options.model), str(options.threads)]
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            rates[name].append(measured(command))
            print(f"{name}: {rates[name][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    return rates


def summary(name: str, values: list[float], base: list[float]) -> dict[str, object]:
    """Medians, and ratios round by round."""
    ratios = [value / each for value, each in zip(values, base, strict=True)]
    return {
        "weights": name,
        "tokens_per_s": statistics.median(values),
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
    }


if __name__ == "__main__":
    main()
