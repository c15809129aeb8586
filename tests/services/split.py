"""One prefill and one decode worker around a store, driven by hand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from splitserve.engine.factory import EngineConfig, open_engine
from splitserve.kv.client import KvStoreClient
from splitserve.kv.control import StoreControl
from splitserve.kv.layout import KvLayout
from splitserve.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc

SPEC = open_engine(EngineConfig(kind="fake")).spec
BLOCK, FINGERPRINT = SPEC.block_tokens, SPEC.fingerprint
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1000)
LAYOUT = KvLayout(FINGERPRINT, BLOCK, SPEC.block_bytes)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(7 * i + 13 * salt + 3) % 997 for i in range(length)]


class Split:
    """One prefill and one decode worker around a store, with the router's part played here."""

    def __init__(self, suite, store, prefill, decode, attachment) -> None:
        self.suite, self.store = suite, store
        self.prefill, self.decode, self.attachment = prefill, decode, attachment
        self.control = StoreControl(store.address)
        self._channel = grpc.aio.insecure_channel(prefill.address)
        self.stub = prefill_pb2_grpc.PrefillServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()
        await self.control.close()

    @contextlib.asynccontextmanager
    async def suite_client(self) -> AsyncIterator[KvStoreClient]:
        """A client that sees the store's memory."""
        client = await KvStoreClient.connect(
            self.store.address, worker_id="test", layout=LAYOUT, transport="shm"
        )
        try:
            yield client
        finally:
            await client.close()

    async def lease(self, ttl_ms: int = 10_000):
        return await self.control.grant_lease("test", ttl_ms)

    def prefill_request(
        self, request_id: str, prompt: list[int], lease=None, *, n: int = 1, max_tokens: int = 8
    ) -> prefill_pb2.PrefillRequest:
        return prefill_pb2.PrefillRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=common_pb2.SamplingParams(
                temperature=0.0, max_tokens=max_tokens, n=n, seed=7, ignore_eos=True
            ),
            lease=lease.to_proto() if lease else None,
        )

    async def compute(self, request_id: str, prompt: list[int], lease, **fields: int):
        return await self.stub.Prefill(
            self.prefill_request(request_id, prompt, lease, **fields), timeout=20
        )

    async def run(self, request_id: str, prompt: list[int], max_tokens: int = 8) -> list[int]:
        """One request as a router serves it; its tokens."""
        lease = await self.lease()
        await self.attachment.submit(
            request_id, prompt, lease=lease.to_proto(), max_tokens=max_tokens
        )
        answer = await self.compute(request_id, prompt, lease, max_tokens=max_tokens)
        first = answer.first_tokens[0].token.id
        await self.attachment.start(request_id, [first], answer)
        choice = await self.attachment.result(request_id)
        await self.control.release([lease])
        assert choice.error is None, choice.error
        return [first, *choice.tokens]
