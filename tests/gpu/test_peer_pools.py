"""A pool that another process has mapped: on the same GPU, and on another one."""

from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.connection import Connection

import pytest
import torch
from splitserve_kernels.page_digest_rules import digest_pages_reference

from splitserve.kv.pages import LayerRun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PAGES, LAYERS, LAYER_BYTES = 40, 4, 4096


def content() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randint(0, 256, (PAGES, LAYERS * LAYER_BYTES), dtype=torch.uint8)


def lend(device: str, connection: Connection) -> None:
    """The other process: shares its pool until it hears that nobody reads any more."""
    from splitserve.engine.device_pages import DevicePages

    pool = content().to(device)
    pages = DevicePages(pool, LAYER_BYTES, torch.cuda.Stream(device))
    connection.send_bytes(pages.pages_handle())
    connection.recv()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_pages_are_copied_in_a_thread_that_has_another_device(device: str) -> None:
    """A new thread's is the first one, whichever the worker's is."""
    from splitserve.engine.device_pages import DevicePages

    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("needs 2 GPUs")
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=lend, args=("cuda:0", there))
    process.start()
    pool = torch.zeros((PAGES, LAYERS * LAYER_BYTES), dtype=torch.uint8, device=device)
    own = DevicePages(pool, LAYER_BYTES, torch.cuda.Stream(device))
    failures: list[BaseException] = []
    digests: list[bytes] = []

    def take() -> None:
        try:
            peer = own.open_peer(here.recv_bytes())
            runs = [LayerRun([3, 39], [1, 0], 1, 3), LayerRun([7], [2], 0, 1)]
            digests.extend(own.copy_from_peer(peer, runs, [0, 1, 2]))
            peer.close()
        except BaseException as error:
            failures.append(error)

    try:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(60)
        assert not failures
    finally:
        here.send(None)
        process.join(30)
    part = slice(LAYER_BYTES, 3 * LAYER_BYTES)
    expected = torch.zeros(PAGES, LAYERS * LAYER_BYTES, dtype=torch.uint8)
    expected[[1, 0], part] = content()[[3, 39], part]
    expected[2, :LAYER_BYTES] = content()[7, :LAYER_BYTES]
    assert torch.equal(pool.cpu(), expected)
    assert digests == digest_pages_reference(expected.numpy(), [0, 1, 2])
