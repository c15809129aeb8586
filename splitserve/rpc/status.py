"""Errors on the wire: `SplitserveError` to google.rpc.Status and back.

Every status carries an ErrorInfo whose reason is the class's name, so that the far side raises
the same class; InvalidRequest adds BadRequest, Overloaded adds RetryInfo.
"""

from __future__ import annotations

from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from splitserve import errors
from splitserve.errors import FieldViolation, InvalidRequest, Overloaded, SplitserveError

DOMAIN = "splitserve"
DETAILS_KEY = "grpc-status-details-bin"

# A status travels in HTTP/2 headers, of which peers take 8 KiB: the message once in
# percent-encoding, at worst three bytes for one, and once with the details in base64.
MAX_MESSAGE_BYTES = 400
MAX_VIOLATIONS = 16
MAX_FIELD_BYTES = 48
MAX_DESCRIPTION_BYTES = 128


M = TypeVar("M", bound=Message)


class Abortable(Protocol):
    """What is used of `grpc.aio.ServicerContext`."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()
    ) -> NoReturn:
        """Ends the call; raises `grpc.aio.AbortError`."""


async def abort(context: Abortable, error: SplitserveError) -> NoReturn:
    """Ends the call with the status that `error` becomes. Always raises."""
    status = rpc_status.to_status(to_proto(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def to_proto(error: SplitserveError) -> status_pb2.Status:
    """The rich status, cut to what fits into headers."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    ]
    if isinstance(error, InvalidRequest):
        details.append(_bad_request(error.violations))
    if isinstance(error, Overloaded) and error.retry_after_s is not None:
        details.append(_retry_info(error.retry_after_s))
    return status_pb2.Status(
        code=error.code.value[0],
        message=_clip(error.message, MAX_MESSAGE_BYTES),
        details=[_pack(detail) for detail in details],
    )


def error_from_rpc(error: grpc.aio.AioRpcError) -> SplitserveError:
    """The error that a failed call tells of.

    The class is the one the far side raised, or else what the code alone says: a peer that is
    gone or going is Unavailable, a passed deadline DeadlineExceeded. A code that fits no class
    gives a SplitserveError with that code.
    """
    status = _rich_status(error)
    message = error.details() or error.code().name.lower().replace("_", " ")
    info = _detail(status, error_details_pb2.ErrorInfo)
    kind = _KINDS_BY_NAME.get(info.reason) if info and info.domain == DOMAIN else None
    if kind is None or kind.code is not error.code():
        kind = _KINDS_BY_CODE.get(error.code())
    if kind is None:
        unknown = SplitserveError(message)
        unknown.code = error.code()
        return unknown
    if kind is InvalidRequest:
        return InvalidRequest(_violations(status) or [FieldViolation("request", message)])
    if kind is Overloaded:
        return Overloaded(message, _retry_after_s(status))
    return kind(message)


def _bad_request(violations: list[FieldViolation]) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=_clip(violation.field, MAX_FIELD_BYTES),
                description=_clip(violation.description, MAX_DESCRIPTION_BYTES),
            )
            for violation in violations[:MAX_VIOLATIONS]
        ]
    )


def _retry_info(retry_after_s: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromNanoseconds(max(0, round(retry_after_s * 1e9)))
    return info


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _clip(text: str, limit: int) -> str:
    # A client's text may hold what UTF-8 cannot, and a status must not fail for it.
    clean = " ".join(text.splitlines()).encode("utf-8", "replace")
    if len(clean) <= limit:
        return clean.decode()
    return clean[: limit - 3].decode("utf-8", "ignore") + "…"


def _rich_status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    metadata: Any = error.trailing_metadata() or ()
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


def _detail(status: status_pb2.Status, kind: type[M]) -> M | None:
    for packed in status.details:
        if packed.Is(kind.DESCRIPTOR):
            detail = kind()
            try:
                packed.Unpack(detail)
            except DecodeError:
                return None
            return detail
    return None


def _violations(status: status_pb2.Status) -> list[FieldViolation]:
    bad_request = _detail(status, error_details_pb2.BadRequest)
    if bad_request is None:
        return []
    return [FieldViolation(v.field, v.description) for v in bad_request.field_violations]


def _retry_after_s(status: status_pb2.Status) -> float | None:
    info = _detail(status, error_details_pb2.RetryInfo)
    return None if info is None else info.retry_delay.ToNanoseconds() / 1e9


def _all_kinds(root: type[SplitserveError]) -> dict[str, type[SplitserveError]]:
    kinds = {root.__name__: root}
    for kind in root.__subclasses__():
        kinds |= _all_kinds(kind)
    return kinds


_KINDS_BY_NAME = _all_kinds(SplitserveError)
_KINDS_BY_CODE: dict[grpc.StatusCode, type[SplitserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    # Who cancels a call is not told of it by its status. A server that begins to stop gives this to
    # calls that it has not yet taken (grpc/grpc#41785): it is no longer there for them.
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.OUT_OF_RANGE: errors.BlockOutOfRange,
    grpc.StatusCode.DATA_LOSS: errors.BlockCorrupt,
}
