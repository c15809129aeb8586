"""Every setting that a manifest makes is one that the service has, with a value it takes."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter

from splitserve.config import ENV_PREFIX, ServiceConfig
from splitserve.v1 import kvstore_pb2

TIERS = {"router": 50051, "prefill": 50052, "decode": 50053, "kvstore": 50054}
# Stand-ins for what the cluster fills in.
FILLED_IN = {"SPLITSERVE_THREADS": "4", "SPLITSERVE_NODE_RANK": "1"}


def _config_class(service: str) -> type[ServiceConfig]:
    module = importlib.import_module(f"services.{service}.config")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceConfig)
        and value.__module__ == module.__name__
    ]
    most_derived = [c for c in classes if not any(c is not o and issubclass(o, c) for o in classes)]
    assert len(most_derived) == 1, f"services.{service}.config: {most_derived}"
    return most_derived[0]


def _settings(overlay: Any, service: str) -> dict[str, str]:
    """Field name to value, as the environment of the service's container gives it."""
    settings = {}
    for variable, value in overlay.environment(service).items():
        if variable.startswith(ENV_PREFIX):
            given = FILLED_IN[variable] if value is None else value
            settings[variable.removeprefix(ENV_PREFIX).lower()] = given
    return settings


@pytest.mark.parametrize("service", TIERS)
def test_settings_exist_and_are_valid(overlay: Any, service: str) -> None:
    fields = _config_class(service).model_fields
    settings = _settings(overlay, service)
    assert settings.keys() - fields.keys() == set(), "no such settings"
    for name, value in settings.items():
        field = fields[name]
        kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else None
        TypeAdapter(kind or field.annotation).validate_python(value)


@pytest.mark.parametrize("service", TIERS)
def test_required_settings_are_made(overlay: Any, service: str) -> None:
    required = {n for n, f in _config_class(service).model_fields.items() if f.is_required()}
    assert required <= set(_settings(overlay, service))


@pytest.mark.parametrize(("service", "port"), TIERS.items())
def test_ports_are_the_services_defaults(service: str, port: int) -> None:
    fields = _config_class(service).model_fields
    assert fields["port"].default == port
    assert fields["metrics_port"].default == 9090 + port % 10


@pytest.mark.parametrize("service", TIERS)
def test_containers_start_their_own_service(rendered: Any, service: str) -> None:
    """The image's entry point is `python -m`, so the first argument is a module to run."""
    module, *flags = rendered.server(service)["args"]
    assert module == f"services.{service}"
    assert "command" not in rendered.server(service)
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    fields = _config_class(service).model_fields
    for flag in flags:
        assert flag.removeprefix("--").split("=")[0].replace("-", "_") in fields


def test_a_store_tells_its_workers_how_others_reach_it() -> None:
    """A worker's own name for its store, `kvstore`, means another store on another node."""
    assert "advertised_address" in kvstore_pb2.ConnectResponse.DESCRIPTOR.fields_by_name
