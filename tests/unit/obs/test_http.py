from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from splitserve.errors import ConfigError
from splitserve.obs.http import ObsServer
from splitserve.obs.metrics import Metrics


@dataclass
class _State:
    ready: bool = False
    live: bool = True

    def is_ready(self) -> bool:
        return self.ready

    def is_live(self) -> bool:
        return self.live


@pytest.fixture
def state() -> _State:
    return _State()


@pytest.fixture
def server(state: _State) -> Iterator[ObsServer]:
    metrics = Metrics(model_name="m")
    metrics.num_requests_running.set(4)
    server = ObsServer("127.0.0.1", 0, metrics.registry, ready=state.is_ready, live=state.is_live)
    yield server
    server.stop()


def _get(server: ObsServer, path: str, **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def test_metrics_in_both_formats(server: ObsServer) -> None:
    status, content_type, body = _get(server, "/metrics")
    assert (status, content_type.split(";")[0]) == (200, "text/plain")
    assert 'splitserve_num_requests_running{model_name="m"} 4.0' in body
    _, content_type, body = _get(server, "/metrics?x=1", Accept="application/openmetrics-text")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


def test_probes_follow_their_state(server: ObsServer, state: _State) -> None:
    assert _get(server, "/readyz")[0] == 503
    state.ready = True
    assert _get(server, "/readyz")[0] == 200
    assert _get(server, "/livez")[0] == 200
    state.live = False
    assert _get(server, "/livez")[0] == 503


def test_failing_probe_is_unhealthy(state: _State) -> None:
    def broken() -> bool:
        raise RuntimeError("no")

    server = ObsServer("127.0.0.1", 0, Metrics().registry, ready=broken)
    assert _get(server, "/readyz")[0] == 503
    assert _get(server, "/livez")[0] == 200
    server.stop()


def test_other_paths_are_not_found(server: ObsServer) -> None:
    assert _get(server, "/")[0] == 404


def test_taken_port_is_a_config_error(server: ObsServer) -> None:
    with pytest.raises(ConfigError, match="--metrics-port"):
        ObsServer("127.0.0.1", server.port, Metrics().registry, ready=lambda: True)


def test_client_that_hangs_up_or_stalls_does_no_harm(server: ObsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as stalled:
        stalled.sendall(b"GET /metr")
        with socket.create_connection(("127.0.0.1", server.port)) as garbage:
            garbage.sendall(b"\x00\xff\r\n\r\n")
        assert _get(server, "/livez")[0] == 200


def test_stop_frees_the_port(state: _State) -> None:
    server = ObsServer("127.0.0.1", 0, Metrics().registry, ready=state.is_ready)
    server.stop()
    again = ObsServer("127.0.0.1", server.port, Metrics().registry, ready=state.is_ready)
    assert again.port == server.port
    again.stop()
