"""InferenceService: messages and metadata in, domain calls, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import grpc

from services.router.generation import Generation
from services.router.model import ServedModel
from services.router.tokenization import PromptEncoder
from splitserve.errors import DeadlineExceeded, SplitserveError
from splitserve.obs.metrics import Metrics
from splitserve.rpc.deadline import remaining_s
from splitserve.v1 import inference_pb2, inference_pb2_grpc

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# The client's own clock ends the call at the deadline. Ending a little earlier lets it see why.
DEADLINE_MARGIN_S = 0.02


class Access(Protocol):
    """Who may call."""

    def tenant(self, authorization: str | None) -> str:
        """The caller's tenant. Raises Unauthenticated."""
        ...


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """The RPCs that clients call. Typed errors become statuses in the server's interceptor."""

    def __init__(
        self,
        generation: Generation,
        model: ServedModel,
        encoder: PromptEncoder,
        access: Access,
        metrics: Metrics,
        *,
        ready: Callable[[], bool],
        default_deadline_s: float,
        max_deadline_s: float,
    ) -> None:
        self._generation = generation
        self._model = model
        self._encoder = encoder
        self._access = access
        self._metrics = metrics
        self._ready = ready
        self._default_deadline_s = default_deadline_s
        self._max_deadline_s = max_deadline_s

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Generates text for one prompt and streams it."""
        try:
            tenant = self._access.tenant(_authorization(context))
            # Ahead of the first message: while one waits that has the metadata with it, as for a
            # client that does not read, gRPC can send no status either.
            await context.send_initial_metadata(())
            await self._generation.serve(request, tenant, self._timeout_s(context), context.write)
        except SplitserveError as error:
            self._metrics.request_failed(error.code.name)
            raise
        except asyncio.CancelledError:
            self._metrics.request_failed(grpc.StatusCode.CANCELLED.name)
            raise
        except Exception:
            self._metrics.request_failed(grpc.StatusCode.INTERNAL.name)
            raise

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        """Lists the models that can be asked for."""
        self._access.tenant(_authorization(context))
        model = self._model.describe(
            has_tokenizer=self._encoder.has_tokenizer,
            has_chat_template=self._encoder.has_chat_template,
            ready=self._ready(),
        )
        return inference_pb2.ListModelsResponse(models=[model])

    def _timeout_s(self, context: Context) -> float:
        """Seconds the request may take. Raises DeadlineExceeded if there are none."""
        left_s = remaining_s(context)
        if left_s is None:
            return self._default_deadline_s
        timeout_s = min(left_s, self._max_deadline_s) - DEADLINE_MARGIN_S
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        return timeout_s


def _authorization(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
