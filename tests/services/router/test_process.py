"""The router as a process of its own: settings, signals, probes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from splitserve.v1 import inference_pb2_grpc

PROMPT = [7, 11, 13, 17, 19, 23, 29, 31]


async def run_router(*flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.router", "--port=0", "--metrics-port=0", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.fixture
async def process(start_suite: Any) -> AsyncIterator[tuple[Any, Any, dict[str, Any]]]:
    """A suite, a second router in front of its workers, and what that printed."""
    suite = await start_suite()
    router = await run_router(
        "--skip-tokenizer-init",
        "--vocab-size=1000",
        f"--prefill={suite.prefill.address}",
        f"--decode={suite.decode.address}",
        "--local-prefill-tokens=0",
        "--drain-grace-s=10",
    )
    try:
        assert router.stdout is not None
        line = await asyncio.wait_for(router.stdout.readline(), 20)
        yield suite, router, json.loads(line)
    finally:
        if router.returncode is None:
            router.kill()
        await router.communicate()


async def http_get(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    answer = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    await writer.wait_closed()
    return int(answer.split()[1]), answer


async def until_ready_is(port: int, status: int) -> None:
    async with asyncio.timeout(20):
        while (await http_get(port, "/readyz"))[0] != status:  # noqa: ASYNC110 - it is polled
            await asyncio.sleep(0.02)


async def test_drains_on_sigterm(process: Any, tools: Any) -> None:
    suite, router, ports = process
    await until_ready_is(ports["metrics_port"], 200)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['port']}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        suite.decode.hold_at = 2
        call = stub.Generate(tools.make_request(max_tokens=5), timeout=20)
        first = await call.read()
        router.terminate()
        await until_ready_is(ports["metrics_port"], 503)
        suite.decode.release()
        messages = [first, *await tools.rest_of(call)]
        assert tools.token_ids(messages) == tools.tokens_after(PROMPT, 5)
    assert await asyncio.wait_for(router.wait(), 15) == 0


async def test_metrics(process: Any, tools: Any) -> None:
    _, _, ports = process
    async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['port']}") as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(tools.make_request(max_tokens=5), timeout=20, wait_for_ready=True)
        await tools.rest_of(call)
        with pytest.raises(grpc.aio.AioRpcError):
            await tools.rest_of(stub.Generate(tools.make_request(n=0), timeout=20))
    status, text = await http_get(ports["metrics_port"], "/metrics")
    assert status == 200
    for line in (
        'splitserve_generation_tokens_total{model_name="default"} 5.0',
        'splitserve_prompt_tokens_total{model_name="default"} 8.0',
        'splitserve_time_to_first_token_seconds_count{model_name="default"} 1.0',
        'splitserve_inter_token_latency_seconds_count{model_name="default"} 4.0',
        'splitserve_e2e_request_latency_seconds_count{model_name="default"} 1.0',
        'splitserve_num_requests_running{model_name="default"} 0.0',
        'splitserve_request_failures_total{code="INVALID_ARGUMENT",model_name="default"} 1.0',
    ):
        assert line in text


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], "model"),
        (["--model=/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["--skip-tokenizer-init", "--policy=best"], "policy"),
        (["--skip-tokenizer-init", "--prefill=nowhere"], "prefill"),
        (["--skip-tokenizer-init", "--api-keys-file=/nowhere"], "api_keys_file"),
        (["--skip-tokenizer-init", "--max-running=0"], "max_running"),
    ],
)
async def test_bad_settings_stop_it_with_one_line(flags: list[str], names: str) -> None:
    router = await run_router(*flags)
    _, stderr = await asyncio.wait_for(router.communicate(), 20)
    assert router.returncode not in (0, None)
    lines = stderr.decode().strip().splitlines()
    assert len(lines) == 1
    assert names.lower() in lines[0].lower()
