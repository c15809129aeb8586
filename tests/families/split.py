"""The four services of one checkpoint in one process, over gRPC on loopback.

A process a service would take seconds to import torch, for every case. What is missing here of
`python -m services.*` is the process: signals, the command line, and the port of the metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.decode import __main__ as decode
from services.decode.config import DecodeConfig
from services.kvstore import __main__ as kvstore
from services.kvstore.config import KvStoreConfig
from services.prefill import __main__ as prefill
from services.prefill.config import PrefillConfig
from services.router import __main__ as router
from services.router.config import RouterConfig
from splitserve.client import AsyncClient
from splitserve.obs import names
from splitserve.obs.tracing import Tracing
from splitserve.sampling import SamplingParams
from splitserve.worker.process import Worker

LONGEST_S = 30.0
MAX_BATCH = 4
POOL_BYTES = 1 << 22


@dataclass(frozen=True)
class Split:
    """A suite that takes requests."""

    prefill: Worker
    decode: Worker
    client: AsyncClient

    async def generate(self, prompt: Sequence[int], params: SamplingParams) -> list[int]:
        """The answer's tokens, over the router's own gRPC."""
        output = await self.client.generate(prompt, params, timeout=LONGEST_S)
        return list(output.outputs[0].token_ids)

    @property
    def written_bytes(self) -> int:
        """KV that the prefill worker has put into the store."""
        return _moved(self.prefill, "write")

    @property
    def read_bytes(self) -> int:
        """KV that the decode worker has taken from the store."""
        return _moved(self.decode, "read")


@contextlib.asynccontextmanager
async def serving(
    path: Path, *, context: int, block_tokens: int, step_tokens: int
) -> AsyncIterator[Split]:
    """Everything is stopped at the end. `context` 0 is the model's own."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(LONGEST_S):
        enter = stack.enter_async_context
        store_config = KvStoreConfig(port=0, arena_bytes=2 * POOL_BYTES)
        store = await enter(kvstore.started(store_config, Tracing.off()))
        settings: dict[str, Any] = {
            "port": 0,
            "model": str(path),
            "dtype": "float32",
            "threads": 1,
            "max_context_tokens": context,
            "pool_bytes": POOL_BYTES,
            "block_tokens": block_tokens,
            "max_step_tokens": step_tokens,
            "max_batch": MAX_BATCH,
            "kvstore": f"127.0.0.1:{store.server.port}",
        }
        first, _ = await enter(prefill.assembled(PrefillConfig(**settings)))
        second, _ = await enter(decode.assembled(DecodeConfig(**settings)))
        for worker, name in ((first, prefill.SERVICE_NAME), (second, decode.SERVICE_NAME)):
            while not worker.stores.home_address:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.001)
            await enter(worker.listening(name))
        router_config = RouterConfig(
            port=0,
            model=path,
            skip_tokenizer_init=True,
            prefill=f"127.0.0.1:{first.server.port}",
            decode=f"127.0.0.1:{second.server.port}",
        )
        front = await enter(router.started(router_config, Tracing.off()))
        for pool in front.pools:
            assert await pool.wait_ready(LONGEST_S)
        client = await enter(AsyncClient(f"127.0.0.1:{front.server.port}"))
        yield Split(first, second, client)


def _moved(worker: Worker, direction: str) -> int:
    family = worker.metrics.kv_transfer_bytes.collect()[0]
    return sum(
        int(sample.value)
        for sample in family.samples
        if sample.labels.get(names.LABEL_DIRECTION) == direction and sample.name.endswith("_total")
    )
