"""Usage, errors and exit codes of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve import cli
from splitserve.cli.generate import _without_none
from splitserve.errors import InvalidRequest, Overloaded

Capture = pytest.CaptureFixture[str]

COMMANDS = ("serve", "generate", "chat", "bench", "models", "quantize")


def run(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit_:
        return int(str(exit_.code))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_there(command: str, capsys: Capture):
    assert run(*([command] if command else []), "--help") == 0
    shown = capsys.readouterr().out
    assert "usage: splitserve" in shown
    if not command:
        assert all(each in shown for each in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice"),
        (["generate", "--prompt", "x"], "--target --model"),
        (["generate", "--target", "127.0.0.1:1"], "--prompt --token-ids"),
        (["generate", "--target", "nowhere", "--prompt", "x"], "'nowhere' is not HOST:PORT"),
        (["generate", "--target", "a:1", "--prompt", "x", "--top-k", "many"], "--top-k"),
        (["generate", "--target", "a:1", "--token-ids", "1,x"], "--token-ids"),
        (["generate", "--target", "a:1", "--token-ids", "1", "--chat"], "--chat takes text"),
        (["generate", "--target", "a:1", "--prompt", "x", "--tls-ca", "f"], "TLS needs all of"),
        (["generate", "--model", "/nowhere.gguf", "--prompt", "x"], "/nowhere.gguf"),
        (["chat"], "--target"),
        (["chat", "--target", "a:1", "--n", "2"], "goes on from one answer"),
        (["serve"], "name a checkpoint"),
        (["serve", "--model", "/nowhere"], "/nowhere: no such file"),
        (["serve", "--engine", "fake", "--prefill-workers", "-1"], "--prefill-workers"),
        (["bench", "--target", "a:1", "--workload", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["models", "/nowhere"], ""),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    arguments: list[str], problem: str, capsys: Capture
):
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert problem in said
    assert len(said.splitlines()) <= 1
    assert "Traceback" not in said


def test_a_suite_that_is_not_there_is_an_error(unused_port: int, capsys: Capture):
    target = f"127.0.0.1:{unused_port}"
    assert run("generate", "--target", target, "--prompt", "x", "--timeout", "5") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_bench_refuses_workloads_it_cannot_replay(tmp_path: Path, capsys: Capture):
    workload = tmp_path / "w.jsonl"
    workload.write_text('{"prompt_tokens": 1, "output_tokens": 1}\n')
    base = ("bench", "--target", "127.0.0.1:1", "--workload", str(workload))
    assert run(*base, "--num-requests", "2") == 2
    assert "only 1" in capsys.readouterr().err
    assert run(*base, "--time-scale", "2") == 2
    assert "arrival_s" in capsys.readouterr().err
    assert run("bench", "--engine", "--workload", str(workload)) == 2
    assert "--engine needs --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Overloaded("the queue is full", 1.25), "the queue is full; try again in 1.2 s"),
        (Overloaded("the queue is full"), "the queue is full"),
        (InvalidRequest.single("top_p", "must be\nless"), "top_p: must be less"),
        (RuntimeError("oops"), "unexpected RuntimeError: oops; --traceback shows where"),
        (FileNotFoundError(2, "No such file", "f"), "f: No such file"),
    ],
)
def test_each_error_is_told_in_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
):
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr(cli.models, "run", fail)
    assert run("models") == 2
    assert capsys.readouterr().err == f"error: {said}\n"


def test_ctrl_c_is_130_and_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch):
    def interrupt(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.models, "run", interrupt)
    assert run("models") == 130

    def fail(options: object) -> int:
        raise RuntimeError("oops")

    monkeypatch.setattr(cli.models, "run", fail)
    with pytest.raises(RuntimeError, match="oops"):
        run("--traceback", "models")


def test_json_leaves_out_what_is_not_there():
    assert _without_none({"a": None, "b": [{"c": None, "d": 0}], "e": ""}) == {
        "b": [{"d": 0}],
        "e": "",
    }
    assert json.dumps(_without_none({"top": (1, 2)})) == '{"top": [1, 2]}'
