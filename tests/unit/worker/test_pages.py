"""What hand-overs see of an engine's pool."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from splitserve.engine.fake import FakeEngine
from splitserve.engine.fake_shared import SharedFakeEngine
from splitserve.worker.pages import EnginePages


class OnDevice(FakeEngine):
    """Its pool is another object's, as a GPU's is."""

    @cached_property
    def device_pages(self) -> SharedFakeEngine:
        return SharedFakeEngine(num_pages=2)


def test_a_pool_is_shared_by_who_has_its_copies() -> None:
    plain, shared, on_device = FakeEngine(num_pages=2), SharedFakeEngine(num_pages=2), OnDevice()
    assert EnginePages(plain).shared is None
    assert EnginePages(shared).shared is shared
    assert EnginePages(on_device).shared is on_device.device_pages


def test_pages_that_are_no_whole_words_cannot_be_digested() -> None:
    engine = SharedFakeEngine(num_pages=2)
    engine.spec = replace(engine.spec, block_bytes=engine.spec.block_bytes + 4)
    assert EnginePages(engine).shared is None
