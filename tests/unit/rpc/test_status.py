from __future__ import annotations

from typing import Any
from urllib.parse import quote

import grpc
import pytest
from grpc_status import rpc_status
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve import errors
from splitserve.errors import FieldViolation, InvalidRequest, Overloaded, SplitserveError
from splitserve.rpc import status
from splitserve.rpc.status import error_from_rpc, to_proto

HEADER_LIMIT_BYTES = 8192


def _over_the_wire(error: SplitserveError) -> grpc.aio.AioRpcError:
    wire = rpc_status.to_status(to_proto(error))
    return grpc.aio.AioRpcError(
        wire.code,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(*wire.trailing_metadata),
        details=wire.details,
    )


def _bare(code: grpc.StatusCode, details: str | None = "what") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


@pytest.mark.parametrize(
    "kind",
    [
        errors.ModelNotFound,
        errors.BlockNotFound,
        errors.Unauthenticated,
        errors.Overloaded,
        errors.DeadlineExceeded,
        errors.RequestCancelled,
        errors.Unavailable,
        errors.NoWorker,
        errors.WorkerLost,
        errors.LeaseEnded,
        errors.BlockOutOfRange,
        errors.BlockCorrupt,
    ],
)
def test_every_class_survives_the_wire(kind: type[SplitserveError]) -> None:
    back = error_from_rpc(_over_the_wire(kind("what happened")))
    assert type(back) is kind
    assert back.message == "what happened"


def test_all_violations_survive_the_wire() -> None:
    violations = [FieldViolation("sampling.n", "too many"), FieldViolation("model", "unknown")]
    back = error_from_rpc(_over_the_wire(InvalidRequest(violations)))
    assert isinstance(back, InvalidRequest)
    assert back.violations == violations


@pytest.mark.parametrize(("sent", "got"), [(1.5, 1.5), (0.0, 0.0), (-1.0, 0.0), (None, None)])
def test_retry_delay_survives_the_wire(sent: float | None, got: float | None) -> None:
    back = error_from_rpc(_over_the_wire(Overloaded("full", sent)))
    assert isinstance(back, Overloaded)
    assert back.retry_after_s == got


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, errors.Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded),
        (grpc.StatusCode.PERMISSION_DENIED, errors.Unauthenticated),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
    ],
)
def test_code_alone_is_enough(code: grpc.StatusCode, kind: type[SplitserveError]) -> None:
    back = error_from_rpc(_bare(code))
    assert type(back) is kind
    assert "what" in back.message


@pytest.mark.parametrize("code", [grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNKNOWN])
def test_code_without_a_class_keeps_the_code(code: grpc.StatusCode) -> None:
    back = error_from_rpc(_bare(code, None))
    assert type(back) is SplitserveError
    assert back.code is code
    assert SplitserveError.code is grpc.StatusCode.INTERNAL
    assert back.message == code.name.lower()


def test_details_that_do_not_parse_are_left_aside() -> None:
    broken = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata((status.DETAILS_KEY, b"\xff\xff\xff")),
        details="gone",
    )
    assert type(error_from_rpc(broken)) is errors.Unavailable


def test_reason_of_another_code_is_not_believed() -> None:
    wire = to_proto(errors.WorkerLost("gone"))
    lying = grpc.aio.AioRpcError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.aio.Metadata(),
        grpc.aio.Metadata((status.DETAILS_KEY, wire.SerializeToString())),
    )
    assert type(error_from_rpc(lying)) is errors.DeadlineExceeded


@settings(max_examples=30, deadline=None)
@given(
    fields=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=()), max_size=300),
            st.text(st.characters(exclude_categories=()), max_size=2000),
        ),
        min_size=1,
        max_size=60,
    )
)
def test_any_text_fits_into_headers(fields: list[tuple[str, str]]) -> None:
    proto = to_proto(InvalidRequest([FieldViolation(f, d) for f, d in fields]))
    wire = rpc_status.to_status(proto)
    (_, packed), *_ = wire.trailing_metadata
    # Binary headers travel in base64, the message percent-encoded beside them.
    assert len(packed) * 4 / 3 + len(quote(wire.details)) + 256 < HEADER_LIMIT_BYTES
    assert "\n" not in wire.details


async def test_longest_status_arrives(echo: Any) -> None:
    echo.service.unary_error = InvalidRequest([FieldViolation("ü" * 500, "ß" * 5000)] * 100)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await echo.unary()(b"raise")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    back = error_from_rpc(caught.value)
    assert isinstance(back, InvalidRequest)
    assert len(back.violations) == status.MAX_VIOLATIONS
