"""Addresses from lists and from DNS."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from services.router.discovery import DnsTargets, StaticTargets, parse_targets
from splitserve.errors import ConfigError


async def test_list() -> None:
    targets = parse_targets("a:1, b:2,[::1]:3", variable="prefill", refresh_s=1)
    assert isinstance(targets, StaticTargets)
    assert targets.refresh_s is None
    assert await targets.resolve() == {"a:1", "b:2", "[::1]:3"}


@pytest.mark.parametrize("text", ["", ",", "a", "a:", ":1", "a:x", "a:0", "a:65536", "dns:///a"])
def test_bad_targets_name_the_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="decode"):
        parse_targets(text, variable="decode", refresh_s=1)


async def test_every_address_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = parse_targets("dns:///workers.test:50052", variable="prefill", refresh_s=3)
    assert isinstance(targets, DnsTargets)
    assert targets.refresh_s == 3
    answers: list[Any] = [
        [(socket.AF_INET, 0, 0, "", ("10.0.0.1", 50052)), (0, 0, 0, "", ("10.0.0.2", 50052))],
        OSError("no such name"),
        [(socket.AF_INET6, 0, 0, "", ("fd00::1", 50052, 0, 0))],
    ]

    async def getaddrinfo(*_: Any, **__: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    assert await targets.resolve() == {"10.0.0.1:50052", "10.0.0.2:50052"}
    # A failing name server must not cost workers that are there.
    assert await targets.resolve() == {"10.0.0.1:50052", "10.0.0.2:50052"}
    assert await targets.resolve() == {"[fd00::1]:50052"}
