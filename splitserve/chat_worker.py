"""The child process in which untrusted chat templates run; see `splitserve.chat_process`.

Frames on stdin and stdout are four bytes of length, little-endian, and that much JSON. The first
frame in names the template, each further one is a conversation and gets one frame back. The
process dies by SIGALRM when a conversation takes too long, which also stops loops inside C code.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

from splitserve.chat import ChatTemplate
from splitserve.errors import CheckpointError, InvalidRequest


def main() -> None:
    """Serves until stdin ends."""
    frames, out = sys.stdin.buffer, sys.stdout.buffer
    setup = _read_frame(frames)
    if setup is None:
        return
    limit = setup["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, setup["time_s"])
    template = ChatTemplate(setup["source"], setup["special_tokens"])
    try:
        template.compile()
    except CheckpointError as exc:
        _write_frame(out, {"error": exc.message})
        return
    signal.setitimer(signal.ITIMER_REAL, 0)
    _write_frame(out, {})
    while (request := _read_frame(frames)) is not None:
        signal.setitimer(signal.ITIMER_REAL, setup["time_s"])
        response = _render(template, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write_frame(out, response)


def _render(template: ChatTemplate, request: dict[str, Any]) -> dict[str, Any]:
    try:
        text = template.render(
            request["messages"], add_generation_prompt=request["add_generation_prompt"]
        )
    except InvalidRequest as exc:
        return {"error": exc.violations[0].description}
    return {"text": text}


def _read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    frame: dict[str, Any] = json.loads(stream.read(int.from_bytes(header, "little")))
    return frame


def _write_frame(stream: BinaryIO, frame: dict[str, Any]) -> None:
    data = json.dumps(frame).encode()
    stream.write(len(data).to_bytes(4, "little") + data)
    stream.flush()


if __name__ == "__main__":
    main()
