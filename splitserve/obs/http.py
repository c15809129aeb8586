"""Metrics and probes over plain HTTP, in a thread of its own.

GET /metrics   Prometheus or OpenMetrics text
GET /livez     200 as long as `live()` is true, else 503
GET /readyz    200 as long as `ready()` is true, else 503
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from splitserve.errors import ConfigError

Probe = Callable[[], bool]

REQUEST_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class ObsServer:
    """Serves from the moment it is made until `stop`. The probes are called from its threads."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        ready: Probe,
        live: Probe = lambda: True,
    ) -> None:
        """Binds `host:port`; port 0 takes a free one. Raises ConfigError if it cannot."""
        handler = _handler_class(registry, {"/livez": live, "/readyz": ready})
        try:
            self._server = _Server((host, port), handler)
        except OSError as error:
            raise ConfigError(
                f"metrics_port: cannot listen on {host}:{port}: {error.strerror}; "
                "set --metrics-port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Closes the port. Returns once no more requests are taken."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        _log.debug("HTTP client %s went away", client_address, exc_info=True)


def _handler_class(
    registry: CollectorRegistry, probes: dict[str, Probe]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(registry), content_type)
            elif path in probes:
                self._probe(probes[path])
            else:
                self._answer(HTTPStatus.NOT_FOUND, b"try /metrics, /livez or /readyz\n")

        def _probe(self, probe: Probe) -> None:
            try:
                healthy = probe()
            except Exception:
                _log.exception("the probe failed")
                healthy = False
            if healthy:
                self._answer(HTTPStatus.OK, b"ok\n")
            else:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, b"not ready\n")

        def _answer(
            self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8"
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            _log.debug(format, *args)

    return Handler
