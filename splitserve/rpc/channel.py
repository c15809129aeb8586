"""A gRPC channel as every service of the suite opens it."""

from __future__ import annotations

import grpc

from splitserve.obs.tracing import Tracing
from splitserve.rpc.client_interceptor import client_interceptors
from splitserve.rpc.options import DEFAULT_MAX_MESSAGE_BYTES, channel_options
from splitserve.rpc.tls import TlsConfig


def open_channel(
    address: str,
    *,
    tls: TlsConfig | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    tracing: Tracing | None = None,
) -> grpc.aio.Channel:
    """A channel to `address`, such as `127.0.0.1:50054` or `dns:///prefill.default:50052`.

    Connects on first use and again after a loss. A peer that stops answering fails all its calls
    with UNAVAILABLE within a second, see `options`. Without `tracing` the process's is used.
    Close it with `await channel.close()`. Raises ConfigError if certificates do not load.
    """
    options = channel_options(max_message_bytes)
    interceptors = client_interceptors(tracing or Tracing.of_process())
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(
        address,
        tls.channel_credentials(),
        options=[*options, *tls.channel_options()],
        interceptors=interceptors,
    )
