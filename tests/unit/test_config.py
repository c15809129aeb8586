from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import Field, ValidationError

from splitserve.config import CommaList, ServiceConfig, load
from splitserve.errors import ConfigError


class EchoConfig(ServiceConfig):
    """Settings of the echo service."""

    port: int = Field(50099, ge=0, le=65535, description="port of the gRPC server")
    max_batch: int = Field(8, ge=1, description="most sequences in one batch")
    model: str = Field("tiny", description="model to serve")
    stores: CommaList = Field((), description="addresses of KV stores")
    sizes: list[int] = Field(default_factory=list, description="sizes")
    deterministic: bool = Field(False, description="same tokens in any topology")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)


def test_defaults() -> None:
    config = load(EchoConfig, [])
    assert (config.bind, config.max_batch, config.tls) == ("127.0.0.1:50099", 8, None)
    assert (config.otlp_endpoint, config.die_with_parent) == (None, False)


def test_flags_win_over_environment_and_environment_over_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPLITSERVE_MAX_BATCH", "16")
    monkeypatch.setenv("SPLITSERVE_MODEL", "from-env")
    config = load(EchoConfig, ["--model", "from-flag"])
    assert (config.max_batch, config.model) == (16, "from-flag")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--deterministic"], True),
        (["--no-deterministic"], False),
    ],
)
def test_boolean_flags(argv: list[str], expected: bool) -> None:
    assert load(EchoConfig, argv).deterministic is expected


def test_lists() -> None:
    config = load(EchoConfig, ["--stores", "a:1", "--stores", "b:2"])
    assert config.stores == ("a:1", "b:2")
    assert load(EchoConfig, ["--stores", "a:1,b:2"]).stores == ("a:1", "b:2")
    assert load(EchoConfig, ["--stores", ""]).stores == ()


def test_lists_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_STORES", "a:1, b:2")
    assert load(EchoConfig, []).stores == ("a:1", "b:2")
    monkeypatch.setenv("SPLITSERVE_SIZES", "1,2")
    with pytest.raises(ConfigError, match=r"SPLITSERVE_SIZES \(--sizes\)"):
        load(EchoConfig, [])


def test_otlp_endpoint_of_the_standard_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    assert load(EchoConfig, []).otlp_endpoint == "http://127.0.0.1:4317"
    monkeypatch.setenv("SPLITSERVE_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert load(EchoConfig, []).otlp_endpoint == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--max-batch", "0"], ["SPLITSERVE_MAX_BATCH", "--max-batch", "0"]),
        (["--max-batch", "many"], ["SPLITSERVE_MAX_BATCH", "--max-batch", "many"]),
        (["--port", "70000"], ["SPLITSERVE_PORT", "--port"]),
        (["--log-level", "loud"], ["SPLITSERVE_LOG_LEVEL", "--log-level"]),
        (["--tls-cert", "c.pem"], ["SPLITSERVE_TLS_KEY", "--tls-key"]),
        (["--drain-grace-s", "nan"], ["SPLITSERVE_DRAIN_GRACE_S"]),
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["stray"], ["stray"]),
        (["--deterministic=false"], ["--no-deterministic"]),
        (["--max-batch"], ["--max-batch"]),
    ],
)
def test_bad_value_names_variable_and_flag(argv: list[str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(EchoConfig, argv)
    for name in names:
        assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITSERVE_MAX_BATCH", "-3")
    with pytest.raises(ConfigError, match="SPLITSERVE_MAX_BATCH"):
        load(EchoConfig, [])


def test_frozen() -> None:
    config: Any = load(EchoConfig, [])
    with pytest.raises(ValidationError):
        config.port = 1


def test_tls_of_three_files() -> None:
    config = load(EchoConfig, ["--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a"])
    assert config.tls is not None
    assert (config.tls.cert_file, config.tls.key_file, config.tls.ca_file) == ("c", "k", "a")


def test_ipv6_host_goes_in_brackets() -> None:
    assert load(EchoConfig, ["--host", "::1"]).bind == "[::1]:50099"


PROGRAM = """
import sys
from splitserve.config import ServiceConfig, run_main
from splitserve.errors import ConfigError

class EchoConfig(ServiceConfig):
    fail: bool = False
    crash: bool = False

async def serve(config):
    print("port", config.port)
    if config.fail:
        raise ConfigError("model: no such file")
    if config.crash:
        raise RuntimeError("a fault")

run_main(EchoConfig, serve)
"""


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, timeout=30
    )


def test_program_that_runs_to_its_end() -> None:
    done = _run("--port", "7")
    assert (done.returncode, done.stdout) == (0, "port 7\n")


def test_program_with_a_bad_flag_exits_2_with_one_line() -> None:
    done = _run("--port", "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "SPLITSERVE_PORT (--port)" in done.stderr


def test_program_that_finds_a_bad_setting_at_start_exits_2() -> None:
    done = _run("--fail")
    assert (done.returncode, done.stderr) == (2, "error: model: no such file\n")


def test_help_names_flags_and_exits_0() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert "--metrics-port" in done.stdout
    assert "port of the gRPC server" in done.stdout


def test_program_that_fails_exits_1_with_a_log_line() -> None:
    done = _run("--crash")
    assert done.returncode == 1
    line = json.loads(done.stderr)
    assert (line["level"], line["service"]) == ("critical", "echo")
    assert "RuntimeError: a fault" in line["exception"]
