"""Renders chat templates in a child process with bounds on time and memory.

A template is untrusted and may loop for hours or build a string of gigabytes out of a short
conversation. In a process of its own that costs one request, not the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from splitserve.chat import ChatTemplate
from splitserve.errors import CheckpointError, InvalidRequest, Unavailable

_START_TIME_S: Final = 30.0


class ChatProcess:
    """Renders one template, one conversation at a time, for the event loop it is used on.

    The child starts with the first conversation (or `start`) and again after it had to die. It
    is shared, so a caller that is cancelled leaves it alone: what was begun for it is carried to
    its end, within the bounds, and thrown away.
    """

    def __init__(
        self, template: ChatTemplate, *, time_s: float = 2.0, memory_bytes: int = 1 << 30
    ) -> None:
        """`time_s` bounds each conversation, `memory_bytes` the child's address space."""
        self._template = template
        self._time_s = time_s
        self._memory_bytes = memory_bytes
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Starts the child if it does not run, so that the first request need not wait.

        Raises `CheckpointError` if the template cannot be compiled within the bounds.
        """
        async with self._turn:
            await self._running_child()

    async def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt's text.

        Raises `InvalidRequest` if the template refuses the conversation or exceeds the bounds.
        """
        request = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        await self._turn.acquire()
        # The turn ends with the exchange, not with a caller that may be gone before.
        exchange = asyncio.create_task(self._render(request))
        exchange.add_done_callback(self._end_turn)
        response = await asyncio.shield(exchange)
        if response is None:
            raise InvalidRequest.single(
                "chat",
                f"the model's chat template needs more than {self._time_s:g} s or "
                f"{self._memory_bytes >> 20} MiB for it",
            )
        if "error" in response:
            raise InvalidRequest.single("chat", response["error"])
        text: str = response["text"]
        return text

    async def close(self) -> None:
        """Ends the child. Idempotent."""
        async with self._turn:
            await self._kill()

    async def _render(self, request: dict[str, Any]) -> dict[str, Any] | None:
        child = await self._running_child()
        return await self._exchange(child, request, self._time_s + 1)

    def _end_turn(self, exchange: asyncio.Task[dict[str, Any] | None]) -> None:
        self._turn.release()
        if not exchange.cancelled():
            # Marks a failure that nobody waits for any more as seen.
            exchange.exception()

    async def _running_child(self) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        await self._kill()
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "splitserve.chat_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # A Ctrl-C in the terminal is for the service, which then ends the child.
            start_new_session=True,
        )
        setup = {
            "source": self._template.source,
            "special_tokens": self._template.special_tokens,
            "time_s": self._time_s,
            "memory_bytes": self._memory_bytes,
        }
        response = await self._exchange(child, setup, _START_TIME_S)
        if response is None and child.returncode == -signal.SIGALRM:
            raise CheckpointError(f"chat template does not compile within {self._time_s:g} s")
        if response is None:
            raise Unavailable("the process that renders chat templates does not start")
        if "error" in response:
            await self._kill()
            raise CheckpointError(response["error"])
        return child

    async def _exchange(
        self, child: asyncio.subprocess.Process, frame: dict[str, Any], time_s: float
    ) -> dict[str, Any] | None:
        """One frame there and one back. None if the child died or had to be killed."""
        answered = False
        try:
            async with asyncio.timeout(time_s):
                try:
                    response = await _send_and_receive(child, frame)
                except (asyncio.IncompleteReadError, ConnectionError):
                    # It died. asyncio must learn how before anyone else asks the system.
                    await child.wait()
                    return None
            answered = True
            return response
        except TimeoutError:
            return None
        finally:
            # Also when cancelled: a late answer must not meet the next request.
            if not answered:
                await self._kill()

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            child.stdin.close()
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await child.wait()


async def _send_and_receive(
    child: asyncio.subprocess.Process, frame: dict[str, Any]
) -> dict[str, Any]:
    if child.stdin is None or child.stdout is None:
        raise ConnectionError("the child has no pipes")
    data = json.dumps(frame).encode()
    child.stdin.write(len(data).to_bytes(4, "little") + data)
    await child.stdin.drain()
    size = int.from_bytes(await child.stdout.readexactly(4), "little")
    response: dict[str, Any] = json.loads(await child.stdout.readexactly(size))
    return response
