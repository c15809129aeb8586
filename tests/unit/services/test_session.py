"""What goes wrong inside of one command ends that command's request and nothing else."""

from __future__ import annotations

import asyncio
from itertools import count

import grpc
import pytest

from services.decode.outbox import Outbox
from services.decode.session import Bench, Session
from splitserve.engine.sequence import Sequence
from splitserve.sampling import SamplingLimits
from splitserve.v1 import common_pb2, decode_pb2
from splitserve.worker.relay import OutputRelay

LEASE = common_pb2.LeaseRef(lease_id="l", epoch=1, store_address="store:1")
INTERNAL = grpc.StatusCode.INTERNAL.value[0]


class FaultyCore:
    """Takes sequences, and fails in a way that nobody foresaw."""

    def __init__(self) -> None:
        self.live: set[str] = set()
        self.fail_submit = self.fail_first_token = False

    def submit(self, sequence: Sequence) -> None:
        if self.fail_submit and sequence.choice == 1:
            raise RuntimeError("a fault")
        self.live.add(sequence.id)

    def first_token(self, sequence_id: str, token_id: int) -> None:
        if self.fail_first_token:
            raise RuntimeError("a fault")

    def abort(self, sequence_id: str) -> None:
        self.live.discard(sequence_id)


class Recorder:
    def __init__(self) -> None:
        self.ends: list[grpc.StatusCode] = []

    def refused(self, code: grpc.StatusCode) -> None:
        self.ends.append(code)

    def ended(self, request: object, code: grpc.StatusCode) -> None:
        self.ends.append(code)


class Rig:
    def __init__(self) -> None:
        self.core, self.recorder, self.outbox = FaultyCore(), Recorder(), Outbox(1000)
        bench = Bench(
            core=self.core,  # type: ignore[arg-type]
            relay=OutputRelay(asyncio.get_running_loop()),
            recorder=self.recorder,  # type: ignore[arg-type]
            limits=SamplingLimits(
                vocab_size=100, max_context_tokens=100, max_tokens=100, max_choices=8
            ),
            eos_token_ids=frozenset(),
            open_loader=lambda submission: None,
            serials=count(),
        )
        self.session = Session(bench, self.outbox)

    def submit(self, name: str, n: int = 1) -> None:
        sampling = common_pb2.SamplingParams(max_tokens=5, n=n, seed=1)
        submit = decode_pb2.Submit(
            request_id=name, prompt_token_ids=[1, 2], sampling=sampling, lease=LEASE
        )
        self.session.handle(decode_pb2.AttachRequest(submit=submit))

    async def errors(self) -> list[tuple[str, int, int]]:
        message = await asyncio.wait_for(self.outbox.take(), 5)
        assert message is not None
        return [(delta.request_id, delta.choice, delta.error.code) for delta in message.deltas]


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_a_faulty_submit_ends_its_own_request(rig: Rig, caplog) -> None:
    rig.submit("good")
    rig.core.fail_submit = True
    rig.submit("bad", n=2)
    assert await rig.errors() == [("bad", 0, INTERNAL), ("bad", 1, INTERNAL)]
    assert rig.core.live == {"good#0.0"}, "the choice that was taken on before the fault is gone"
    assert len(rig.session) == 1
    assert rig.recorder.ends == [grpc.StatusCode.INTERNAL]
    assert "a fault" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_faulty_start_ends_its_own_request(rig: Rig) -> None:
    rig.submit("good")
    rig.submit("bad", n=2)
    rig.core.fail_first_token = True
    start = decode_pb2.Start(request_id="bad", first_token_ids=[3, 4])
    rig.session.handle(decode_pb2.AttachRequest(start=start))
    assert await rig.errors() == [("bad", 0, INTERNAL), ("bad", 1, INTERNAL)]
    assert rig.core.live == {"good#0.0"}
    rig.core.fail_submit = rig.core.fail_first_token = False
    rig.submit("bad")  # the name is free again
    assert len(rig.session) == 2
