"""Wraps a method handler of any of the four kinds of RPC in one scope.

Every wrapped handler is a plain coroutine, even around an async generator. A generator that is
suspended at a `yield` when its call is cancelled is otherwise closed by the garbage collector,
some time later and in another task; here the cancellation arrives in the coroutine, which closes
the generator before the call ends, so that a handler's `finally` runs at once.

Requests are parsed inside the scope, so that one that cannot be is an InvalidRequest like any
other; gRPC itself would end the call as if the server were at fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError

from splitserve.errors import InvalidRequest
from splitserve.rpc.types import Context, Handler

# Called with the request; None where requests are a stream, or where it could not be parsed.
Scope = Callable[[Any, Context], AbstractAsyncContextManager[None]]
Behavior = Callable[[Any, Context], Any]
Parse = Callable[[bytes], Any]


def wrap_handler(handler: Handler, scope: Scope) -> Handler:
    """`handler` with every call run inside `scope(request, context)`."""
    kind = _STREAMING_KINDS if handler.request_streaming else _UNARY_KINDS
    make, attribute = kind[bool(handler.response_streaming)]
    behavior: Behavior = getattr(handler, attribute)
    parse = _strict(handler.request_deserializer)
    run = _to_stream if handler.response_streaming else _to_response
    if handler.request_streaming:
        # Runs inside the scope already: it is called as the handler reads.
        wrapped = make(run(behavior, scope, None), parse, handler.response_serializer)
    else:
        wrapped = make(run(behavior, scope, parse), None, handler.response_serializer)
    return cast(Handler, wrapped)


# By whether the response is a stream.
_UNARY_KINDS: dict[bool, tuple[Any, str]] = {
    False: (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    True: (grpc.unary_stream_rpc_method_handler, "unary_stream"),
}
_STREAMING_KINDS: dict[bool, tuple[Any, str]] = {
    False: (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    True: (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}


def _strict(deserialize: Callable[[bytes], Any] | None) -> Parse:
    def parse(message: bytes) -> Any:
        if deserialize is None:
            return message
        try:
            return deserialize(message)
        except DecodeError as error:
            raise InvalidRequest.single("request", "cannot be parsed as its type") from error

    return parse


def _to_response(behavior: Behavior, scope: Scope, parse: Parse | None) -> Behavior:
    async def call(message: Any, context: Context) -> Any:
        request, fault = _parsed(message, parse)
        async with scope(None if parse is None else request, context):
            if fault is not None:
                raise fault
            return await behavior(request, context)

    return call


def _to_stream(
    behavior: Behavior, scope: Scope, parse: Parse | None
) -> Callable[[Any, Context], Awaitable[None]]:
    async def call(message: Any, context: Context) -> None:
        request, fault = _parsed(message, parse)
        async with scope(None if parse is None else request, context):
            if fault is not None:
                raise fault
            await _send_all(behavior(request, context), context)

    return call


def _parsed(message: Any, parse: Parse | None) -> tuple[Any, InvalidRequest | None]:
    """The request, or why there is none. Without `parse` the message is a stream of requests."""
    if parse is None:
        return message, None
    try:
        return parse(message), None
    except InvalidRequest as fault:
        return None, fault


async def _send_all(result: Any, context: Context) -> None:
    if not hasattr(result, "__aiter__"):
        await result
        return
    async with aclosing(cast(AsyncGenerator[Any, None], result)):
        async for response in result:
            await _write(response, context)


async def _write(response: Any, context: Context) -> None:
    try:
        await context.write(response)
    except grpc.aio.InternalError as error:
        # The client is gone; its cancellation is on the way here and merely came second.
        raise asyncio.CancelledError("the client went away") from error
