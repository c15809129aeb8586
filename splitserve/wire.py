"""Proto messages of `splitserve.v1` to the library's own types and back.

Services handle messages only at their edges; what travels inside is the types of `sampling`,
`engine` and `errors`. Blocks and leases have theirs in `splitserve.kv.layout`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import grpc

from splitserve.engine.protocol import DrawnToken, Logprob
from splitserve.errors import (
    BlockCorrupt,
    BlockNotFound,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    LeaseEnded,
    Overloaded,
    RequestCancelled,
    SplitserveError,
    Unauthenticated,
    Unavailable,
)
from splitserve.kv.layout import Lease
from splitserve.sampling import FinishReason, SamplingParams
from splitserve.v1 import common_pb2, decode_pb2

_OPTIONAL_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "logprobs",
    "n",
)

_REASON_TO_PROTO = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}
_REASON_FROM_PROTO = {
    common_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
}


# -- sampling --------------------------------------------------------------------------------------


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    """Parameters with defaults for what is unset. Ranges are not checked here."""
    given = {name: getattr(message, name) for name in _OPTIONAL_FIELDS if message.HasField(name)}
    return SamplingParams(
        **given, stop=tuple(message.stop), stop_token_ids=tuple(message.stop_token_ids)
    )


def sampling_to_proto(params: SamplingParams) -> common_pb2.SamplingParams:
    """The message, with every field set that is not None, so that no default can differ."""
    message = common_pb2.SamplingParams(stop=params.stop, stop_token_ids=params.stop_token_ids)
    for name in _OPTIONAL_FIELDS:
        value = getattr(params, name)
        if value is not None:
            setattr(message, name, value)
    return message


def seed_of(message: common_pb2.SamplingParams) -> int:
    """The seed that the router has decided.

    Raises:
        InvalidRequest: it is missing, so that another worker could not draw the same tokens.
    """
    if not message.HasField("seed"):
        raise InvalidRequest.single("sampling.seed", "must be set by the router")
    return message.seed


# -- requests of routers ---------------------------------------------------------------------------

MAX_NAME_CHARS = 256
_HOST_PORT = re.compile(r"[A-Za-z0-9._-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.%]+\]:[0-9]{1,5}")


def check_request_id(request_id: str) -> None:
    """Raise `InvalidRequest` unless it is a name that may be kept, logged and repeated."""
    if not 0 < len(request_id) <= MAX_NAME_CHARS:
        raise InvalidRequest.single("request_id", f"must have 1 to {MAX_NAME_CHARS} characters")


def lease_from_proto(message: common_pb2.LeaseRef) -> Lease:
    """A lease that the worker may act on. Whether it is live is its store's to say.

    Raises:
        InvalidRequest: its store is named by something else than HOST:PORT, or a name is too long.
    """
    if len(message.lease_id) > MAX_NAME_CHARS:
        raise InvalidRequest.single("lease.lease_id", f"has more than {MAX_NAME_CHARS} characters")
    address = message.store_address
    if address and (len(address) > MAX_NAME_CHARS or not _HOST_PORT.fullmatch(address)):
        raise InvalidRequest.single("lease.store_address", "must be HOST:PORT")
    return Lease.from_proto(message)


# -- tokens ----------------------------------------------------------------------------------------


def token_to_proto(token: DrawnToken) -> common_pb2.Token:
    """One drawn token; log-probabilities are present only if they were asked for."""
    if token.logprob is None:
        return common_pb2.Token(id=token.token_id)
    chosen = common_pb2.TokenLogprob(token_id=token.token_id, logprob=token.logprob)
    top = [common_pb2.TokenLogprob(token_id=t.token_id, logprob=t.logprob) for t in token.top]
    positions = common_pb2.PositionLogprobs(chosen=chosen, top=top)
    return common_pb2.Token(id=token.token_id, logprobs=positions)


def tokens_to_proto(tokens: Iterable[DrawnToken]) -> list[common_pb2.Token]:
    """Drawn tokens, in order."""
    return [token_to_proto(token) for token in tokens]


def token_from_proto(message: common_pb2.Token) -> DrawnToken:
    """One drawn token."""
    if not message.HasField("logprobs"):
        return DrawnToken(message.id)
    top = tuple(Logprob(t.token_id, t.logprob) for t in message.logprobs.top)
    return DrawnToken(message.id, message.logprobs.chosen.logprob, top)


def finish_reason_to_proto(reason: FinishReason | None) -> common_pb2.FinishReason:
    """None, for a choice that goes on, is UNSPECIFIED."""
    return _REASON_TO_PROTO[reason]


def finish_reason_from_proto(reason: common_pb2.FinishReason) -> FinishReason | None:
    """UNSPECIFIED, and a reason of a newer peer that is not known here, are None."""
    return _REASON_FROM_PROTO.get(reason)


# -- errors of one sequence ------------------------------------------------------------------------

_CODE_OF_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def error_to_proto(error: SplitserveError) -> decode_pb2.SequenceError:
    """The failure of one choice, for a stream that goes on."""
    return decode_pb2.SequenceError(code=error.code.value[0], message=error.message)


def error_from_proto(message: decode_pb2.SequenceError) -> SplitserveError:
    """The inverse, as closely as a status code tells. An unknown code is a plain error."""
    code = _CODE_OF_NUMBER.get(message.code)
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest([FieldViolation("request", message.message)])
        case grpc.StatusCode.NOT_FOUND:
            # The model was checked at the front door; what a worker misses is KV or a sequence.
            return BlockNotFound(message.message)
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(message.message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(message.message)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(message.message)
        case grpc.StatusCode.CANCELLED:
            return RequestCancelled(message.message)
        case grpc.StatusCode.UNAVAILABLE:
            return Unavailable(message.message)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return LeaseEnded(message.message)
        case grpc.StatusCode.DATA_LOSS:
            return BlockCorrupt(message.message)
        case _:
            return SplitserveError(message.message)
