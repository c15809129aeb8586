"""Workers of two ranks in a suite of real processes: what they hand over, and how they end."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from transformers import LlamaConfig

from splitserve import LLM, SamplingParams, cli
from splitserve.client import AsyncClient
from splitserve.errors import ConfigError, SplitserveError

from ..families import parity
from ..suite import Service, Suite, free_port

BLOCK_TOKENS = 4
PROMPT = parity.prompt_of(99, seed=5)
PARAMS = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
ENDLESS = replace(PARAMS, max_tokens=4000)
LONGEST_S = 30.0
NOTICED_S = 2.0
TWO_RANKS = ("--tensor-parallel-size", "2")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return parity.save(parity.random_model(config, seed=1), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """What one rank in one process makes of `PROMPT`."""
    with LLM(str(model), dtype="float32", threads=1, skip_tokenizer_init=True) as llm:
        [output] = llm.generate(PROMPT, PARAMS)
    return output.outputs[0].token_ids


class Tiers:
    """Router, store and one worker a tier."""

    def __init__(self, store: Service, prefill: Service, decode: Service, router: Service) -> None:
        self.store, self.prefill, self.decode, self.router = store, prefill, decode, router

    @staticmethod
    async def start(
        suite: Suite, model: Path, *, prefill: Sequence[str] = (), decode: Sequence[str] = ()
    ) -> Tiers:
        ports = [suite.free_port() for _ in range(3)]
        at = [f"127.0.0.1:{port}" for port in ports]
        worker = (
            *("--engine", "torch", "--model", str(model), "--dtype", "float32", "--threads", "1"),
            *("--block-tokens", str(BLOCK_TOKENS), "--max-step-tokens", "72"),
            *("--pool-bytes", str(1 << 23)),
        )
        return Tiers(
            *await asyncio.gather(
                suite.kvstore(port=ports[0]),
                suite.prefill(at[0], *worker, *prefill, port=ports[1]),
                suite.decode(at[0], *worker, *decode, port=ports[2]),
                suite.router(at[1:2], at[2:], "--model", str(model), "--skip-tokenizer-init"),
            )
        )

    async def check(self, expected: list[int]) -> None:
        """One answer has the right tokens, and its prompt's KV came from the prefill worker."""
        async with AsyncClient(self.router.address) as client:
            before = await self.moved_bytes()
            output = await client.generate(PROMPT, PARAMS, timeout=LONGEST_S)
            assert output.outputs[0].token_ids == expected
            block_bytes = 3 * 2 * BLOCK_TOKENS * 2 * 8 * 4
            pages = -(-len(PROMPT) // BLOCK_TOKENS)
            assert await self.moved_bytes() - before >= pages * block_bytes

    async def moved_bytes(self) -> float:
        return (await self.decode.metrics()).get("splitserve_kv_transfer_bytes_total", 0.0)


async def kill_after_first_token(client: AsyncClient, rank: psutil.Process) -> None:
    async for delta in client.stream(PROMPT, ENDLESS, timeout=LONGEST_S):
        if any(choice.token_ids for choice in delta.choices) and rank.is_running():
            rank.kill()


async def test_a_rank_killed_in_mid_request(suite: Suite, model: Path, expected: list[int]) -> None:
    """TP 1 hands over to TP 2; the worker ends with one line, and serves again once restarted."""
    tiers = await Tiers.start(suite, model, decode=TWO_RANKS)
    await tiers.check(expected)
    [rank] = psutil.Process(tiers.decode.pid).children()
    async with AsyncClient(tiers.router.address) as client:
        with pytest.raises(SplitserveError) as caught:
            await kill_after_first_token(client, rank)
        assert caught.value.code.name == "UNAVAILABLE"
    assert await asyncio.wait_for(tiers.decode.process.wait(), NOTICED_S) == 1
    [line] = [line for line in tiers.decode.log if "rank" in line]
    assert "rank 1 was ended by SIGKILL, so this worker ends; start it again" in line
    tiers.decode = await suite.restart(tiers.decode)
    await tiers.check(expected)
    [rank] = psutil.Process(tiers.decode.pid).children()
    assert await suite.stop(tiers.decode) == 0
    assert not rank.is_running()


async def test_two_nodes_hand_over_to_one_rank(
    suite: Suite, model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of two processes that meet over TCP, as the pods of two nodes do."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    nodes = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    health = free_port()
    tiers, second = await asyncio.gather(
        Tiers.start(suite, model, prefill=nodes),
        suite.start(
            *("prefill", "--model", str(model), *nodes, "--node-rank", "1"),
            *("--health-port", str(health)),
            port=health,
        ),
    )
    await tiers.check(expected)
    # Whoever wants a node gone wants the worker gone: it drains, and all of it ends.
    assert await suite.stop(second) == 0
    assert await asyncio.wait_for(tiers.prefill.process.wait(), LONGEST_S) == 0
    assert "prefill: SIGTERM: draining" in tiers.prefill.text()


def test_llm_stops_its_ranks(model: Path, expected: list[int]) -> None:
    others = psutil.Process().children()
    with LLM(
        str(model), dtype="float32", threads=1, skip_tokenizer_init=True, tensor_parallel_size=2
    ) as llm:
        [rank] = [each for each in psutil.Process().children() if each not in others]
        [output] = llm.generate(PROMPT, PARAMS)
    assert output.outputs[0].token_ids == expected
    assert not rank.is_running()
    llm.shutdown()  # again


OPEN_AT_EXIT = """
import json, sys, psutil
from splitserve import LLM, SamplingParams
model, prompt = json.loads(sys.argv[1])
llm = LLM(model, dtype="float32", skip_tokenizer_init=True, tensor_parallel_size=2)
[output] = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=4))
print(psutil.Process().children()[0].pid)
"""


def test_ranks_end_with_the_interpreter(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AT_EXIT, json.dumps([str(model), PROMPT])],
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not psutil.pid_exists(int(done.stdout))


def test_a_model_that_does_not_divide_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However it is opened, before any rank is started."""
    line = "num_kv_heads 2 does not divide tensor_parallel_size 3"
    flags = ["--tensor-parallel-size", "3"]
    assert cli.main(["serve", "--model", str(model), *flags]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert cli.main(["models", str(model), *flags]) == 2
    assert f"no: {line}" in capsys.readouterr().out
    with pytest.raises(ConfigError) as caught:
        LLM(str(model), skip_tokenizer_init=True, tensor_parallel_size=3)
    assert caught.value.message == line
