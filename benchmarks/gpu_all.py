"""Every row of `results/README.md` about GPUs, one script after the other.

    python benchmarks/gpu_all.py --out rows                 # what one GPU can measure
    python benchmarks/gpu_all.py --out rows --gpus 2        # what takes two
    python benchmarks/gpu_all.py --out rows --only llama_bf16 llama_fp8 --budget-s 540

Each script writes OUT/NAME.json and OUT/NAME.log, and is stopped at its limit. One that fails or
has no time left is named at the end; the others run all the same. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LLAMA = "benchmarks/models/llama-3.1-8b"
GPT_J = "benchmarks/models/gpt-j-6b"
WORKLOADS = ("fixed-128-128", "fixed-2048-128", "summarize", "chat")
FAMILY_PARTS = 4
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=")
"""Warnings are of the versions that the machine has: no errors here."""
END_S = 10.0
CHECKPOINT = str(Path(tempfile.gettempdir()) / "splitserve-llama-3.1-8b")
HANDOFF = (
    *("benchmarks/handoff.py", "--device", "cuda", "--load-format", "dummy"),
    *("--model", LLAMA, "--rounds", "15"),
)


@dataclass(frozen=True)
class Step:
    """One script; `limit_s` is about twice what it takes on an H100. `{json}` is its file."""

    name: str
    limit_s: int
    words: tuple[str, ...]
    gpus: int = 1


def engine(name: str, limit_s: int, *words: str) -> Step:
    """Rows of one model in one process."""
    return Step(name, limit_s, ("benchmarks/engine_rows.py", *words, "--json", "{json}"))


def rates(name: str, *words: str) -> Step:
    """A suite on two GPUs under load."""
    command = ("benchmarks/serve_rates.py", "--model", LLAMA, "--device", "cuda:0", "cuda:1")
    return Step(name, 300, (*command, *words, "--json", "{json}"), gpus=2)


STEPS = (
    Step("tests_gpu", 300, (*PYTEST, "tests/gpu", "tests/unit/quant")),
    *(
        Step(
            f"families_{part}",
            400,
            ("benchmarks/gpu_families.py", "--part", f"{part}/{FAMILY_PARTS}", "--json", "{json}"),
        )
        for part in range(1, FAMILY_PARTS + 1)
    ),
    *(
        Step(f"kernels_{name}", 300, (f"benchmarks/kernels/{name}.py", "--json", "{json}"))
        for name in ("attention", "fused", "linear", "experts")
    ),
    Step("large_products", 120, ("benchmarks/kernels/large_products.py",)),
    Step("kernels_whole", 120, ("benchmarks/kernels/linear.py", "--whole", "--json", "{json}")),
    engine(
        "llama_bf16",
        *(400, "--model", LLAMA, "--batch", "1", "64", "--prefill", "64x1024"),
        *("--static", "--workload", *WORKLOADS),
    ),
    engine(
        "llama_fp8",
        *(300, "--model", LLAMA, "--quantization", "fp8", "--batch", "1", "64", "256"),
        *("--prefill", "64x1024", "--workload", *WORKLOADS),
    ),
    engine(
        "gpt_j_fp16",
        *(300, "--model", GPT_J, "--dtype", "float16", "--batch", "1", "64"),
        *("--prefill", "64x1024", "--workload", "fixed-128-128", "summarize"),
    ),
    engine(
        "gpt_j_fp8",
        *(200, "--model", GPT_J, "--dtype", "bfloat16", "--quantization", "fp8"),
        *("--batch", "1", "64", "--workload", "summarize"),
    ),
    Step(
        "startup",
        400,
        ("benchmarks/startup.py", "--model", LLAMA, "--dir", CHECKPOINT, "--json", "{json}"),
    ),
    Step("handoff_device", 150, (*HANDOFF, "--transport", "device", "--json", "{json}")),
    Step(
        "handoff_host",
        150,
        (*HANDOFF, "--gpus", "0,1", "--transport", "shm", "--json", "{json}"),
        gpus=2,
    ),
    Step(
        "handoff_two",
        150,
        (*HANDOFF, "--gpus", "0,1", "--transport", "device", "--json", "{json}"),
        gpus=2,
    ),
    Step(
        "tests_gpus",
        560,
        (*PYTEST, "tests/gpu/test_all_reduce.py", "tests/gpu/test_peer_pools.py"),
        gpus=2,
    ),
    Step(
        "tensor_parallel",
        200,
        ("benchmarks/gpu_tensor_parallel.py", "--json", "{json}"),
        gpus=2,
    ),
    Step(
        "all_reduce",
        200,
        ("benchmarks/kernels/all_reduce.py", "--ranks", "2", "--json", "{json}"),
        gpus=2,
    ),
    *(
        rates(
            f"rates_split_{rate}",
            *("--modes", "split", "--rates", rate, "--chunk", "304"),
            "--router-flag=--local-prefill-tokens=512",
        )
        for rate in ("34", "32")
    ),
    rates(
        "rates_split_30",
        *("--modes", "split", "--rates", "30", "--chunk", "192"),
        *("--worker-flag=--max-batch=144", "--router-flag=--max-prefill-wait-ms=200"),
    ),
    rates(
        "rates_split_30_short",
        *("--modes", "split", "--rates", "30", "--chunk", "144", "--worker-flag=--max-batch=112"),
        "--router-flag=--max-prefill-wait-ms=200",
        "--router-flag=--local-prefill-tokens=512",
    ),
    rates("rates_monolith_34", "--modes", "monolith", "--rates", "34"),
    rates("rates_2048_128", "--workload", "fixed-2048-128", "--rates", "16", "--seconds", "12"),
)


def run(step: Step, out: Path, limit_s: float) -> str:
    """How it ended. Its output goes to the log and to ours."""
    command = [word.format(json=out / f"{step.name}.json") for word in step.words]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT / "kernels"), str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    print(f"== {step.name}: {' '.join(command)}", flush=True)
    began = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        end_group(process)
    sys.stdout.write((out / f"{step.name}.log").read_text()[-4000:])
    ended = "stopped at its limit" if code is None else f"exit code {code}" if code else "done"
    return f"{ended} after {time.monotonic() - began:.0f} s"


def end_group(process: subprocess.Popen[bytes]) -> None:
    """The script, if it still runs, and whatever it started: a rank or a worker that is left would
    keep its memory and be in the next step's way.
    """
    for number, wait_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="for all of it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    out, deadline = options.out.resolve(), time.monotonic() + options.budget_s
    ends = {}
    for step in STEPS:
        wanted = step.name in options.only if options.only else step.gpus == options.gpus
        if not wanted:
            continue
        left_s = deadline - time.monotonic()
        if left_s < 30:
            ends[step.name] = "not begun, no time left"
            continue
        ends[step.name] = run(step, out, min(step.limit_s, left_s))
    for name, end in ends.items():
        print(f"{name:16} {end}")


if __name__ == "__main__":
    main()
