"""Settings of a service: command line over environment over defaults, read once and frozen.

`--max-batch 8` and `SPLITSERVE_MAX_BATCH=8` set the same field. A bad value stops the process at
start with one line that names both. Each service subclasses `ServiceConfig` in its own package:

    class RouterConfig(ServiceConfig):
        port: int = Field(50051, ge=0, le=65535, description="port of the gRPC server")

    def main() -> None:
        run_main(RouterConfig, serve)          # serve(config) is the service's coroutine
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from splitserve.errors import CheckpointError, ConfigError
from splitserve.obs.logging import LogFormat, log_uncaught, setup_logging
from splitserve.rpc.lifecycle import die_with_parent
from splitserve.rpc.tls import TlsConfig

ENV_PREFIX = "SPLITSERVE_"
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130

_log = logging.getLogger(__name__)

Config = TypeVar("Config", bound="ServiceConfig")
LogLevel = Literal["debug", "info", "warning", "error"]


def _otlp_endpoint() -> str | None:
    return os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def _split(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


# For settings that are several names: `--store a:1,b:2`, `--store a:1 --store b:2`, or the
# variable with commas.
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


class ServiceConfig(BaseSettings):
    """What every service has."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        use_attribute_docstrings=False,
        protected_namespaces=(),
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="port of the gRPC server, 0: a free one")
    advertise_address: str | None = Field(
        None, description="HOST:PORT under which others reach this service; default: where it binds"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="port of /metrics, /livez and /readyz, 0: a free one"
    )
    health_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port of a plaintext listener for health checks alone, for probes that have "
        "no certificate; 0: none",
    )
    tls_cert: str | None = Field(None, description="PEM file of this service's certificate")
    tls_key: str | None = Field(None, description="PEM file of its private key")
    tls_ca: str | None = Field(None, description="PEM file of the CA that peers must be signed by")
    tls_server_name: str | None = Field(
        None,
        description="name that peers' certificates must carry, whatever address they are dialled "
        "at; default: the host that was dialled",
    )
    insecure: bool = Field(False, description="allow plaintext off loopback")
    log_level: LogLevel = Field("info", description="least severe level that is logged")
    log_format: LogFormat = Field("json", description="how log lines are written")
    otlp_endpoint: str | None = Field(
        default_factory=_otlp_endpoint,
        description="where traces go, such as http://127.0.0.1:4317; "
        "default: OTEL_EXPORTER_OTLP_ENDPOINT, or no traces",
    )
    drain_grace_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that open calls get to end after SIGTERM"
    )
    max_connection_age_s: float | None = Field(
        None, gt=0, description="seconds after which clients must reconnect; default: never"
    )
    die_with_parent: bool = Field(
        False, description="end when the process that started this one ends (Linux)"
    )

    @model_validator(mode="after")
    def _check_tls(self) -> ServiceConfig:
        files = {"tls_cert": self.tls_cert, "tls_key": self.tls_key, "tls_ca": self.tls_ca}
        missing = [name for name, path in files.items() if not path]
        if missing and len(missing) < len(files):
            raise ConfigError(f"{_both_names(missing[0])}: TLS needs all of {', '.join(files)}")
        return self

    @property
    def bind(self) -> str:
        """Where the gRPC server listens, host:port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def tls(self) -> TlsConfig | None:
        """Mutual TLS for server and channels; None: plaintext."""
        if self.tls_cert is None or self.tls_key is None or self.tls_ca is None:
            return None
        return TlsConfig(self.tls_cert, self.tls_key, self.tls_ca, self.tls_server_name)


def load(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Reads the settings of `cls` from `argv` (without the program's name) and the environment.

    Raises ConfigError naming variable and flag. `--help` prints and raises SystemExit(0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    build: Any = cls
    try:
        config: Config = build(_cli_parse_args=arguments, _cli_exit_on_error=False)
    except ValidationError as error:
        raise ConfigError(_first_fault(error)) from None
    except SettingsError as error:
        raise ConfigError(_unreadable(error)) from None
    return config


def run_main(
    cls: type[Config],
    main: Callable[[Config], Awaitable[None]],
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs a service's coroutine with its settings and exits: 0 at its end, 2 with one line on
    stderr for a ConfigError or CheckpointError, 1 for any other exception, which is logged.

    Logging is set up from the settings, and `die_with_parent` obeyed, before `main` is called.
    """

    async def run(config: Config) -> None:
        log_uncaught(asyncio.get_running_loop())
        await main(config)

    try:
        config = load(cls, argv)
        if config.die_with_parent:
            die_with_parent()
        setup_logging(_service_name(cls), config.log_level, config.log_format)
        asyncio.run(run(config))
    except (ConfigError, CheckpointError) as error:
        print(f"error: {_one_line(error.message)}", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception:
        _log.critical("the service failed", exc_info=True)
        sys.exit(EXIT_FAILED)
    sys.exit(0)


def _service_name(cls: type[ServiceConfig]) -> str:
    return cls.__name__.removesuffix("Config").lower() or "service"


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"]]
    reason = _one_line(fault["msg"])
    if fault["type"] == "extra_forbidden":
        return f"{path[0]}: no such setting; see --help"
    if not path:
        return reason
    return f"{_both_names(path[0])}: {reason}, not {str(fault['input'])!r}"


def _unreadable(error: SettingsError) -> str:
    """A fault of the command line as a whole, or a variable that should be JSON and is not."""
    text = _one_line(str(error))
    field = re.search(r'for field "(\w+)"', text)
    return f"{_both_names(field[1])}: is not JSON" if field else text


def _both_names(field: str) -> str:
    return f"{ENV_PREFIX}{field.upper()} (--{field.replace('_', '-')})"


def _one_line(text: str) -> str:
    return " ".join(text.split())
