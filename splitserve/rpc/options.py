"""Channel arguments that both ends of every connection agree on.

A server answers a client that pings more often than it permits with GOAWAY too_many_pings, so
what clients send and what servers permit stand here side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

Options = list[tuple[str, int | str]]

MIB = 1024 * 1024
# A KV chunk is at most 1 MiB; the largest prompt in tokens stays below 4 MiB.
DEFAULT_MAX_MESSAGE_BYTES = 4 * MIB
MESSAGE_OVERHEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Keepalive:
    """How a silent peer is found out: a ping each `interval_ms`, given up after `timeout_ms`.

    It is noticed after at most the interval, twice the timeout and a tenth of a second. Pings are
    answered by threads of gRPC's core that do not need the interpreter lock, so a busy peer is
    not taken for a dead one. The core enforces no lower bound, only the server's
    min_ping_interval below.
    """

    interval_ms: int
    timeout_ms: int


BETWEEN_TIERS = Keepalive(interval_ms=200, timeout_ms=350)
"""A worker that hangs must be noticed within a second."""

TO_CLIENTS = Keepalive(interval_ms=10_000, timeout_ms=10_000)
"""A client may be far away and its machine busy; one that has died is mostly told by TCP."""

LEAST_PING_INTERVAL_MS = 100

# Between a server's read of the socket and a slow handler lie at most this many bytes a stream.
LOOKAHEAD_BYTES = 65536
MAX_PENDING_REQUESTS = 65536
MAX_PENDING_REQUESTS_HARD = 131072
RECONNECT_MIN_MS = 50
RECONNECT_MAX_MS = 1000


def channel_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES, keepalive: Keepalive = BETWEEN_TIERS
) -> Options:
    """What a client's end of a connection uses."""
    return [
        *_common(max_message_bytes, keepalive),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MIN_MS),
        ("grpc.min_reconnect_backoff_ms", RECONNECT_MAX_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        # One connection a channel: a closed channel must not keep another's connection open.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_connection_age_s: float | None = None,
    keepalive: Keepalive = BETWEEN_TIERS,
) -> Options:
    """What a server's end of a connection uses.

    `max_connection_age_s` makes clients reconnect now and then, so that added replicas get their
    share; streams that are open go on. None: never.
    """
    options: Options = [
        *_common(max_message_bytes, keepalive),
        # Half of what tiers send, for timers are not exact; 0 strikes means none is counted.
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_REQUESTS_HARD),
        # Two servers on one port would each get half of the requests without a word.
        ("grpc.so_reuseport", 0),
    ]
    if max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", round(max_connection_age_s * 1000)))
    return options


def _common(max_message_bytes: int, keepalive: Keepalive) -> Options:
    limit = max_message_bytes + MESSAGE_OVERHEAD_BYTES
    return [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.keepalive_time_ms", keepalive.interval_ms),
        ("grpc.keepalive_timeout_ms", keepalive.timeout_ms),
        ("grpc.http2.ping_timeout_ms", keepalive.timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # With the probe on, flow control grows until a stalled reader's backlog fills memory.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
    ]
