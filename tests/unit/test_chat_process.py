from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from splitserve.chat import ChatTemplate
from splitserve.chat_process import ChatProcess
from splitserve.errors import CheckpointError, InvalidRequest

MESSAGES = [{"role": "user", "content": "hé"}]
ECHO = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
# Harmless unless the message is 'loop'.
LOOP = (
    "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}ok"
)
LOOP_MESSAGES = [{"role": "user", "content": "loop"}]


@asynccontextmanager
async def running(source: str, time_s: float = 2.0, **bounds: int) -> AsyncIterator[ChatProcess]:
    process = ChatProcess(ChatTemplate(source, {}), time_s=time_s, **bounds)
    try:
        yield process
    finally:
        await process.close()


async def test_renders_in_turn():
    async with running(ECHO) as process:
        await process.start()
        assert await process.render(MESSAGES) == "hé>"
        assert await process.render(MESSAGES, add_generation_prompt=False) == "hé"
        many = [[{"role": "user", "content": str(i)}] for i in range(20)]
        texts = await asyncio.gather(*(process.render(messages) for messages in many))
        assert texts == [f"{i}>" for i in range(20)]


async def test_a_loop_ends_in_time_and_the_next_conversation_is_served():
    async with running(LOOP, time_s=0.3) as process:
        assert await process.render(MESSAGES) == "ok"
        start = time.perf_counter()
        with pytest.raises(InvalidRequest, match=r"needs more than 0\.3 s or 1024 MiB"):
            await process.render(LOOP_MESSAGES)
        assert time.perf_counter() - start < 2
        assert await process.render(MESSAGES) == "ok"


async def test_a_cancelled_conversation_does_not_answer_the_next():
    async with running(LOOP, time_s=0.3) as process:
        await process.start()
        task = asyncio.create_task(process.render(LOOP_MESSAGES))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 0.05)
        assert await process.render(MESSAGES) == "ok"


async def test_a_cancelled_conversation_leaves_the_child_to_the_others():
    async with running(ECHO) as process:
        await process.start()
        child = process._child
        for number in range(3):
            task = asyncio.create_task(process.render([{"role": "user", "content": "gone"}]))
            # So many steps into it: about to send, having sent, and between.
            for _ in range(number + 1):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await process.render(MESSAGES) == "hé>"
        assert process._child is child
        assert child.returncode is None


async def test_who_is_cancelled_while_waiting_costs_no_render():
    async with running(ECHO) as process:
        await process.start()
        first = asyncio.create_task(process.render(MESSAGES))
        waiting = asyncio.create_task(process.render(MESSAGES))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await first == "hé>"
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await process.render(MESSAGES) == "hé>"


async def test_memory_is_bounded():
    grows = (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}"
    )
    async with running(grows, memory_bytes=256 << 20) as process:
        with pytest.raises(InvalidRequest, match="MemoryError"):
            await process.render(MESSAGES)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if %}", "chat template is not valid"),
        # jinja2 folds constants while it compiles.
        ("{{ 7 ** (7 ** 12) }}", r"does not compile within 0\.3 s"),
    ],
)
async def test_templates_that_do_not_compile(source, expected):
    async with running(source, time_s=0.3) as process:
        with pytest.raises(CheckpointError, match=expected):
            await process.start()


async def test_a_refusal_names_the_reason():
    async with running("{{ raise_exception('no') }}") as process:
        with pytest.raises(InvalidRequest, match="chat: the model's chat template refused it: no"):
            await process.render(MESSAGES)


async def test_close_is_idempotent_and_start_again_works():
    async with running(ECHO) as process:
        await process.render(MESSAGES)
        await process.close()
        await process.close()
        assert await process.render(MESSAGES) == "hé>"
