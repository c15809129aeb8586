"""Talks to a running suite: `Client` for plain code, `AsyncClient` for asyncio.

    with Client("127.0.0.1:50051") as client:
        output = client.generate("Once upon a time", SamplingParams(max_tokens=32))
        print(output.outputs[0].text)

Every call has a deadline, is cancelled on the server when it is left early, and joins the trace
that is current where it is made. Errors are those of `splitserve.errors`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Any, cast

import grpc

from splitserve.errors import ConfigError
from splitserve.inference_wire import (
    ModelCard,
    Prompt,
    delta_from_proto,
    generate_request,
    models_from_proto,
)
from splitserve.obs.tracing import inject
from splitserve.outputs import OutputBuilder, OutputDelta, RequestOutput
from splitserve.rpc.options import TO_CLIENTS, channel_options
from splitserve.rpc.status import error_from_rpc
from splitserve.rpc.tls import TlsConfig
from splitserve.sampling import SamplingParams
from splitserve.v1 import inference_pb2, inference_pb2_grpc

DEFAULT_TIMEOUT_S = 600.0
MODELS_TIMEOUT_S = 10.0

Metadata = tuple[tuple[str, str], ...]


class Client:
    """A blocking client of one router. Safe to use from several threads; close it after use."""

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: TlsConfig | None = None
    ) -> None:
        """Connects on first use to `target`, HOST:PORT. `tls=None` is plaintext.

        Raises ConfigError if the key cannot be sent or the certificates do not load.
        """
        self._metadata = _authorization(api_key)
        if tls is None:
            self._channel = grpc.insecure_channel(
                target, options=channel_options(keepalive=TO_CLIENTS)
            )
        else:
            self._channel = grpc.secure_channel(
                target,
                tls.channel_credentials(),
                options=[*channel_options(keepalive=TO_CLIENTS), *tls.channel_options()],
            )
        stub: Any = inference_pb2_grpc.InferenceServiceStub
        self._stub = stub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        keep_special_tokens: bool = False,
    ) -> RequestOutput:
        """The whole answer. `timeout` is in seconds and reaches all tiers.

        Raises SplitserveError: InvalidRequest, ModelNotFound, Overloaded (with `retry_after_s`),
        DeadlineExceeded, Unavailable, Unauthenticated.
        """
        deltas = self.stream(
            prompt,
            params,
            model=model,
            request_id=request_id,
            timeout=timeout,
            keep_special_tokens=keep_special_tokens,
        )
        with contextlib.closing(deltas):
            return _builder(prompt).extend(deltas)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        keep_special_tokens: bool = False,
    ) -> Generator[OutputDelta, None, None]:
        """The answer as it is made; leaving the iterator cancels. Raises as `generate` does.

        A prompt that cannot be sent raises here, everything else while iterating.
        """
        request = generate_request(
            prompt,
            params,
            model=model,
            request_id=request_id,
            keep_special_tokens=keep_special_tokens,
        )
        return self._deltas(request, timeout)

    def models(self, timeout: float | None = MODELS_TIMEOUT_S) -> list[ModelCard]:
        """The models that can be asked for."""
        try:
            reply = self._stub.ListModels(
                inference_pb2.ListModelsRequest(),
                timeout=timeout,
                metadata=_with_trace(self._metadata),
            )
        except grpc.RpcError as error:
            raise error_from_rpc(cast(grpc.aio.AioRpcError, error)) from error
        return models_from_proto(reply)

    def close(self) -> None:
        """Closes the connection; open calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _deltas(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> Generator[OutputDelta, None, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=_with_trace(self._metadata))
        try:
            for message in call:
                yield delta_from_proto(message)
        except grpc.RpcError as error:
            # A synchronous error tells the same as an asynchronous one, by the same methods.
            raise error_from_rpc(cast(grpc.aio.AioRpcError, error)) from error
        finally:
            call.cancel()


class AsyncClient:
    """The asyncio twin of `Client`. Make it and use it inside one event loop."""

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: TlsConfig | None = None
    ) -> None:
        """See `Client`."""
        self._metadata = _authorization(api_key)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(
                target, options=channel_options(keepalive=TO_CLIENTS)
            )
        else:
            self._channel = grpc.aio.secure_channel(
                target,
                tls.channel_credentials(),
                options=[*channel_options(keepalive=TO_CLIENTS), *tls.channel_options()],
            )
        stub: Any = inference_pb2_grpc.InferenceServiceStub
        self._stub = stub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        keep_special_tokens: bool = False,
    ) -> RequestOutput:
        """See `Client.generate`."""
        deltas = self.stream(
            prompt,
            params,
            model=model,
            request_id=request_id,
            timeout=timeout,
            keep_special_tokens=keep_special_tokens,
        )
        builder = _builder(prompt)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                builder.add(delta)
        return builder.build()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        model: str = "",
        request_id: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
        keep_special_tokens: bool = False,
    ) -> AsyncGenerator[OutputDelta, None]:
        """See `Client.stream`. Leave it early inside `contextlib.aclosing`."""
        request = generate_request(
            prompt,
            params,
            model=model,
            request_id=request_id,
            keep_special_tokens=keep_special_tokens,
        )
        return self._deltas(request, timeout)

    async def models(self, timeout: float | None = MODELS_TIMEOUT_S) -> list[ModelCard]:
        """The models that can be asked for."""
        try:
            reply = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(),
                timeout=timeout,
                metadata=_with_trace(self._metadata),
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return models_from_proto(reply)

    async def close(self) -> None:
        """Closes the connection; open calls are cancelled."""
        await self._channel.close(None)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _deltas(
        self, request: inference_pb2.GenerateRequest, timeout: float | None
    ) -> AsyncGenerator[OutputDelta, None]:
        call = self._stub.Generate(request, timeout=timeout, metadata=_with_trace(self._metadata))
        try:
            async for message in call:
                yield delta_from_proto(message)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()


def _builder(prompt: Prompt) -> OutputBuilder:
    if isinstance(prompt, str):
        return OutputBuilder(prompt, None)
    token_ids = [each for each in prompt if isinstance(each, int)]
    return OutputBuilder(None, token_ids or None)


def _authorization(api_key: str | None) -> Metadata:
    if api_key is None:
        return ()
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("api_key: must be printable ASCII")
    return (("authorization", f"Bearer {api_key}"),)


def _with_trace(metadata: Metadata) -> Metadata:
    carrier: dict[str, str] = {}
    inject(carrier)
    return (*metadata, *carrier.items())
