"""The command against a running suite with the fake engine."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitserve import cli
from splitserve.engine.fake import expected_tokens
from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig

Capture = pytest.CaptureFixture[str]

GREEDY = ("--temperature", "0", "--max-tokens", "5", "--ignore-eos")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of a suite that takes token ids only."""
    slow = ("--fake-step-ms", "5")
    config = SuiteConfig(engine="fake", drain_grace_s=1.0, flags={"prefill": slow, "decode": slow})
    logs = tmp_path_factory.mktemp("logs")
    with StopSignals() as signals, LocalSuite(config, signals, logs) as suite:
        suite.start(timeout_s=60)
        yield suite.target


def test_generate_prints_one_json_object_a_line(target: str, capsys: Capture):
    given = ("generate", "--target", target, "--token-ids", "3,5,7", "--json", *GREEDY)
    assert cli.main(given) == 0
    deltas = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokens = [t for d in deltas for choice in d["choices"] for t in choice["token_ids"]]
    assert tokens == expected_tokens([3, 5, 7], 5)
    assert deltas[-1]["usage"]["completion_tokens"] == 5
    assert "total_ms" in deltas[-1]["timings"]


def test_generate_shows_tokens_where_there_is_no_text(target: str, capsys: Capture):
    assert cli.main(["generate", "--target", target, "--token-ids", "3,5,7", *GREEDY]) == 0
    expected = ",".join(str(token) for token in expected_tokens([3, 5, 7], 5))
    assert capsys.readouterr().out == expected + "\n"


def test_a_refused_request_is_one_line(target: str, capsys: Capture):
    assert cli.main(["generate", "--target", target, "--prompt", "x"]) == 2
    assert capsys.readouterr().err == "error: text: this server has no tokenizer; send tokens\n"
    assert cli.main(["generate", "--target", target, "--token-ids", "1", "--top-p", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: sampling.top_p: ")


def test_a_turn_that_fails_is_told_and_the_chat_goes_on(
    target: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/reset\nagain\n/exit\nnever\n"))
    assert cli.main(["chat", "--target", target]) == 2
    assert capsys.readouterr().err.count("error: chat: ") == 2


def test_models_of_a_suite(target: str, capsys: Capture):
    assert cli.main(["models", "--target", target]) == 0
    assert capsys.readouterr().out == (
        "fake: ready, context 4096 tokens, vocabulary 1000, token ids only\n"
    )


def test_bench_measures_every_request(target: str, tmp_path: Path, capsys: Capture):
    workload = tmp_path / "w.jsonl"
    workload.write_text(
        "".join(
            json.dumps({"id": i, "prompt_tokens": 20 + i, "output_tokens": 4, "arrival_s": i / 100})
            + "\n"
            for i in range(12)
        )
    )
    numbers = tmp_path / "numbers.json"
    base = ("bench", "--target", target, "--workload", str(workload))
    limits = ("--ttft-ms", "60000", "--itl-ms", "60000")
    assert cli.main([*base, "--json", str(numbers), *limits]) == 0
    table = capsys.readouterr().out
    assert "12 completed, 0 failed" in table
    assert "recorded arrivals x 1" in table
    report = json.loads(numbers.read_text())
    assert (report["completed"], report["failed"], report["output_tokens"]) == (12, 0, 48)
    assert report["prompt_tokens"] == sum(20 + i for i in range(12))
    assert report["goodput"]["share"] == 1.0
    assert report["ttft_ms"]["count"] == 12
    assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"] <= report["ttft_ms"]["max"]
    assert report["duration_s"] > 0.11


def test_bench_says_what_failed(target: str, tmp_path: Path, capsys: Capture):
    workload = tmp_path / "w.jsonl"
    workload.write_text('{"prompt_tokens": 5, "output_tokens": 4000}\n' * 2)
    base = ("bench", "--target", target, "--workload", str(workload), "--concurrency", "2")
    assert cli.main([*base, "--timeout", "1"]) == 1
    assert "2 x DEADLINE_EXCEEDED" in capsys.readouterr().out
    assert cli.main([*base, "--max-output-tokens", "2"]) == 0
    workload.write_text('{"prompt_tokens": 4000, "output_tokens": 4000}\n')
    assert cli.main([*base, "--concurrency", "1"]) == 2
    assert "the context has 4096" in capsys.readouterr().err
