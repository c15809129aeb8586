"""Shows the whole suite at work: one question through four processes, and its trace.

1. An OTLP collector is started in this process, and the four services beside it, on free ports.
2. The question is asked as a chat message, greedily; the answer is streamed as it comes.
3. Everything is stopped, so that every span has been sent.
4. The request's time to first token, its speed and its trace are printed.

Ctrl-C at any moment stops everything and exits with 130.
"""

from __future__ import annotations

import sys

try:
    import argparse
    import contextlib
    import tempfile
    import time
    from collections.abc import Iterator
    from dataclasses import dataclass
    from pathlib import Path
    from typing import Never

    from opentelemetry import trace
    from tqdm import tqdm

    from splitserve.client import Client
    from splitserve.errors import SplitserveError
    from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig
    from splitserve.obs.collector import Collector
    from splitserve.obs.tracing import Tracing, setup_tracing
    from splitserve.obs.tree import render_tree
    from splitserve.outputs import OutputDelta
    from splitserve.sampling import SamplingParams
except KeyboardInterrupt:
    sys.exit(130)

QUESTION = "Explain in two sentences why the sky is blue."
MODEL = Path(__file__).resolve().parent.parent / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BAR_FORMAT = "{desc}: {bar:20} {n}/{total} {elapsed}"
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass
class Answer:
    """What was measured of one answer, by the client's clock."""

    trace_id: str
    num_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token."""
        return (self.num_tokens - 1) / self.decode_s if self.decode_s else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Returns the process's exit status."""
    options = _parse(arguments)
    try:
        _demo(options)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is stopped", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SplitserveError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return EXIT_ERROR
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One question through the whole suite.")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint to serve")
    parser.add_argument("--question", default=QUESTION, help="what to ask")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer")
    parser.add_argument("--log-dir", type=Path, help="keep the services' logs in this directory")
    return parser.parse_args(arguments)


def _demo(options: argparse.Namespace) -> None:
    with StopSignals() as signals, _collector() as collector, _log_dir(options.log_dir) as logs:
        config = SuiteConfig(
            model=str(options.model), otlp_endpoint=collector.endpoint, drain_grace_s=1.0
        )
        tracing = setup_tracing("client", collector.endpoint)
        try:
            with LocalSuite(config, signals, logs) as suite:
                _start(suite)
                answer = _ask(suite.target, options, tracing)
        finally:
            tracing.shutdown()
        print(
            f"\n\nTTFT {answer.ttft_s * 1000:.0f} ms, {answer.tokens_per_s:.1f} tokens/s, "
            f"{answer.num_tokens} tokens\n\ntrace {answer.trace_id}"
        )
        print(render_tree(collector.spans(answer.trace_id)))


def _start(suite: LocalSuite) -> None:
    print("starting router, prefill, decode and kvstore", flush=True)
    with tqdm(total=4, desc="starting", bar_format=BAR_FORMAT, leave=False, disable=None) as bar:
        suite.start(on_ready=lambda plan: _show_ready(bar, plan.name))
    print(f"they are ready, as processes {suite.pids}", flush=True)


def _show_ready(bar: tqdm[Never], name: str) -> None:
    bar.set_description(f"{name} is ready")
    bar.update()


def _ask(target: str, options: argparse.Namespace, tracing: Tracing) -> Answer:
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    print(f"\n> {options.question}\n", flush=True)
    with tracing.tracer.start_as_current_span("demo") as span, Client(target) as client:
        answer = Answer(trace.format_trace_id(span.get_span_context().trace_id))
        turns = [{"role": "user", "content": options.question}]
        with contextlib.closing(client.stream(turns, params)) as deltas:
            for delta in _timed(deltas, answer):
                print("".join(choice.text for choice in delta.choices), end="", flush=True)
    return answer


def _timed(deltas: Iterator[OutputDelta], answer: Answer) -> Iterator[OutputDelta]:
    began = time.perf_counter()
    for delta in deltas:
        now = time.perf_counter()
        if answer.num_tokens == 0:
            answer.ttft_s = now - began
        answer.decode_s = now - began - answer.ttft_s
        answer.num_tokens += sum(len(choice.token_ids) for choice in delta.choices)
        yield delta


@contextlib.contextmanager
def _collector() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.stop()


@contextlib.contextmanager
def _log_dir(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="splitserve-demo-") as made:
        yield Path(made)


if __name__ == "__main__":
    sys.exit(main())
