"""Every error the suite raises on purpose, and the gRPC status each becomes.

SplitserveError
├── InvalidRequest        INVALID_ARGUMENT     names each field at fault
├── ModelNotFound         NOT_FOUND
├── Unauthenticated       UNAUTHENTICATED
├── Overloaded            RESOURCE_EXHAUSTED   may say when to come back
├── DeadlineExceeded      DEADLINE_EXCEEDED
├── RequestCancelled      CANCELLED
├── Unavailable           UNAVAILABLE
│   ├── NoWorker
│   └── WorkerLost
├── LeaseEnded            FAILED_PRECONDITION
├── BlockNotFound         NOT_FOUND
├── BlockOutOfRange       OUT_OF_RANGE
├── BlockCorrupt          DATA_LOSS
├── ConfigError           FAILED_PRECONDITION  at start only
└── CheckpointError       FAILED_PRECONDITION  at load only

A message says what happened and what to do about it, in one line. Anything else that escapes a
handler becomes INTERNAL with no inner detail (see `splitserve.rpc`).
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc


class SplitserveError(Exception):
    """Base of the tree. `code` is the gRPC status that the error becomes."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True)
class FieldViolation:
    """One field at fault: its path in the request, such as `sampling.top_p`, and why."""

    field: str
    description: str


class InvalidRequest(SplitserveError):
    """The request can never be served as it is. Carries every violation found, not the first."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, violations: list[FieldViolation]) -> None:
        if not violations:
            raise ValueError("InvalidRequest needs at least one violation")
        self.violations = violations
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))

    @classmethod
    def single(cls, field: str, description: str) -> InvalidRequest:
        """An error with one violation."""
        return cls([FieldViolation(field, description)])


class ModelNotFound(SplitserveError):
    """The model named is not served here."""

    code = grpc.StatusCode.NOT_FOUND


class Unauthenticated(SplitserveError):
    """No key, or one that is not known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class Overloaded(SplitserveError):
    """No room now. `retry_after_s`, if set, is when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(SplitserveError):
    """The request's deadline passed first."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelled(SplitserveError):
    """The caller went away or cancelled."""

    code = grpc.StatusCode.CANCELLED


class Unavailable(SplitserveError):
    """A part of the suite that the request needs is not there."""

    code = grpc.StatusCode.UNAVAILABLE


class NoWorker(Unavailable):
    """No worker of a tier is ready."""


class WorkerLost(Unavailable):
    """The worker that had the request is gone."""


class LeaseEnded(SplitserveError):
    """The lease has run out, was released, or is of an earlier run of the store."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class BlockNotFound(SplitserveError):
    """The store has no such block for this lease."""

    code = grpc.StatusCode.NOT_FOUND


class BlockOutOfRange(SplitserveError):
    """Bytes were addressed past the end of a block."""

    code = grpc.StatusCode.OUT_OF_RANGE


class BlockCorrupt(SplitserveError):
    """A block's content does not match its digest or identity; it must not be used."""

    code = grpc.StatusCode.DATA_LOSS


class ConfigError(SplitserveError):
    """A setting is wrong. The message names the variable. The process does not start."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(SplitserveError):
    """A checkpoint cannot be loaded. The message is one line that names file and tensor."""

    code = grpc.StatusCode.FAILED_PRECONDITION
