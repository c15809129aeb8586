"""What the spans of RPCs have in common on both ends."""

from __future__ import annotations

import grpc
from opentelemetry.trace import Span, StatusCode
from opentelemetry.util.types import AttributeValue

from splitserve.obs import names

# A server is not at fault for what its client did wrong, so these leave its span unset.
_CLIENT_FAULTS = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNAUTHENTICATED,
    }
)


def start_attributes(method: str) -> dict[str, AttributeValue]:
    """Known when the call starts. `method` is `/package.Service/Method`."""
    return {names.RPC_SYSTEM_NAME: names.RPC_SYSTEM_GRPC, names.RPC_METHOD: method[1:]}


def finish_span(span: Span, code: grpc.StatusCode, *, server: bool) -> None:
    """Records how the call ended and ends the span."""
    span.set_attribute(names.RPC_STATUS_CODE, code.name)
    if code is not grpc.StatusCode.OK and not (server and code in _CLIENT_FAULTS):
        span.set_attribute(names.ERROR_TYPE, code.name)
        span.set_status(StatusCode.ERROR, code.name)
    span.end()
