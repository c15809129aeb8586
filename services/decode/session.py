"""One router's stream: its commands go in, its sequences' news comes out.

A request's life here:

1. `Submit` is checked; each choice becomes a sequence in the core, which sets pages aside.
2. The request's loader fills the pages with blocks from the store while the prefill still runs.
3. `Start` brings the first tokens; the sequences join the batch at the next step.
4. Each step's news goes to the outbox, which the stream's writer empties.
5. The last token, `Cancel`, an error, the deadline or the end of the stream ends it; whichever
   it is, pages, loads, timer and subscription go at once.

Everything here runs on the event loop and nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import grpc

from services.decode.outbox import Outbox, TaggedToken
from services.decode.recorder import Recorder
from services.decode.request import LiveChoice, LiveRequest
from services.decode.submission import Submission, parse
from splitserve import wire
from splitserve.engine.core import EngineCore
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.errors import (
    BlockNotFound,
    DeadlineExceeded,
    InvalidRequest,
    SplitserveError,
    Unavailable,
)
from splitserve.kv.receipt import KvReceipt
from splitserve.sampling import SamplingLimits
from splitserve.v1 import decode_pb2
from splitserve.worker.block_loader import BlockLoader
from splitserve.worker.relay import OutputRelay, Step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bench:
    """What all sessions of a worker work with."""

    core: EngineCore
    relay: OutputRelay
    recorder: Recorder
    limits: SamplingLimits
    eos_token_ids: frozenset[int]
    open_loader: Callable[[Submission], BlockLoader | None]
    serials: count[int]


class Session:
    """The requests of one router on this worker."""

    def __init__(self, bench: Bench, outbox: Outbox) -> None:
        self._bench = bench
        self._outbox = outbox
        self._live: dict[str, LiveRequest] = {}
        self._closing = False
        self._loop = asyncio.get_running_loop()
        self.fell_behind = asyncio.Event()

    def __len__(self) -> int:
        """Requests that live."""
        return len(self._live)

    # -- from the stream -----------------------------------------------------------------------

    def handle(self, command: decode_pb2.AttachRequest) -> None:
        """Carry out one command. What fails ends its own request only."""
        try:
            match command.WhichOneof("command"):
                case "submit":
                    self._submit(command.submit)
                case "start":
                    self._start(command.start)
                case "cancel":
                    self._cancel(command.cancel)
                case _:
                    _log.warning("an empty command was ignored")
        except SplitserveError as error:
            self._give_up(command, error)
        except Exception:
            _log.exception("a command failed; its request ends")
            self._give_up(command, SplitserveError("the decode worker failed; see its log"))

    def finish(self) -> None:
        """Take no more requests; end the stream once those that live have ended."""
        self._closing = True
        self._close_when_idle()

    def close(self) -> None:
        """The stream is gone: abort everything on it."""
        self._closing = True
        for request in list(self._live.values()):
            self._drop(request, list(request.choices))
            self._forget(request, grpc.StatusCode.CANCELLED)

    # -- commands ------------------------------------------------------------------------------

    def _submit(self, message: decode_pb2.Submit) -> None:
        try:
            if self._closing:
                raise Unavailable("the decode worker is stopping; try another")
            self._check_unused(message.request_id)
            self._admit(parse(message, self._bench.limits))
        except SplitserveError as error:
            self._bench.recorder.refused(error.code)
            self._report_refusal(message, error)

    def _give_up(self, command: decode_pb2.AttachRequest, error: SplitserveError) -> None:
        """Ends the request of a command that failed half-way, whether it lives yet or not."""
        kind = command.WhichOneof("command")
        request_id = getattr(command, kind).request_id if kind else ""
        live = self._live.get(request_id)
        if live is not None:
            self._fail(live, error)
        elif command.HasField("submit"):
            self._bench.recorder.refused(error.code)
            self._report_refusal(command.submit, error)
        else:
            self._report(request_id, range(1), error)

    def _check_unused(self, request_id: str) -> None:
        """A name that is used twice tells nobody's news apart: both requests end."""
        other = self._live.get(request_id)
        if other is not None:
            error = InvalidRequest.single("request_id", f"{request_id!r} is in use")
            self._fail(other, error)
            raise error

    def _admit(self, submission: Submission) -> None:
        request = LiveRequest(submission, self._bench.open_loader(submission))
        self._live[submission.request_id] = request
        serial = next(self._bench.serials)
        try:
            for choice, output in submission.outputs.items():
                sequence_id = f"{submission.request_id}#{serial}.{choice}"
                self._admit_choice(request, sequence_id, choice, list(output))
        except Exception:
            self._drop(request, list(request.choices))
            del self._live[request.request_id]
            raise
        if submission.deadline_s is not None:
            request.deadline = self._loop.call_later(submission.deadline_s, self._expire, request)

    def _admit_choice(
        self, request: LiveRequest, sequence_id: str, choice: int, output: list[int]
    ) -> None:
        submission = request.submission
        sequence = Sequence(
            id=sequence_id,
            prompt=submission.prompt,
            params=submission.params,
            seed=submission.seed,
            choice=choice,
            cache_salt=submission.cache_salt,
            output=output,
            source=request.loader,
            await_first_token=submission.awaits_first_tokens,
        )
        tag = submission.first_tag and submission.first_tag + choice
        live = LiveChoice(request, choice, tag, sequence)
        self._bench.relay.subscribe(sequence_id, partial(self._on_output, live))
        try:
            self._bench.core.submit(sequence)
        except Exception:
            self._bench.relay.unsubscribe(sequence_id)
            raise
        request.choices[choice] = live

    def _start(self, message: decode_pb2.Start) -> None:
        request = self._live.get(message.request_id)
        if request is None:
            gone = BlockNotFound("no such request lives on this worker; submit it first")
            self._report(message.request_id, range(1), gone)
            return
        fault = self._fault_of(request, message)
        if fault:
            self._fail(request, InvalidRequest.single("start", fault))
            return
        request.started = True
        if request.loader:
            request.loader.prefill_done(_receipt_of(message))
        for choice in list(request.choices.values()):
            self._start_choice(choice, message.first_token_ids[choice.index])
        self._forget_if_ended(request)

    def _fault_of(self, request: LiveRequest, message: decode_pb2.Start) -> str | None:
        submission = request.submission
        if not submission.awaits_first_tokens or request.started:
            return "the request does not await first tokens"
        if len(message.first_token_ids) != submission.params.n:
            return f"{len(message.first_token_ids)} first tokens for n = {submission.params.n}"
        if max(message.first_token_ids) >= self._bench.limits.vocab_size:
            return f"a first token is not below the vocabulary {self._bench.limits.vocab_size}"
        return None

    def _start_choice(self, choice: LiveChoice, token_id: int) -> None:
        request, sequence = choice.request, choice.sequence
        reason = sequence.params.finish_after(token_id, 1, self._bench.eos_token_ids)
        if reason is None:
            self._bench.core.first_token(sequence.id, token_id)
            return
        self._drop(request, [choice.index])
        self._put(
            0,
            decode_pb2.SequenceDelta(
                request_id=request.request_id,
                choice=choice.index,
                first_token_index=1,
                finish_reason=wire.finish_reason_to_proto(reason),
            ),
        )

    def _cancel(self, message: decode_pb2.Cancel) -> None:
        request = self._live.get(message.request_id)
        if request is None:
            return
        named = [message.choice] if message.HasField("choice") else list(request.choices)
        self._drop(request, [choice for choice in named if choice in request.choices])
        for choice in named:
            self._outbox.forget(request.request_id, choice)
        self._forget_if_ended(request, grpc.StatusCode.CANCELLED)

    def _expire(self, request: LiveRequest) -> None:
        self._fail(request, DeadlineExceeded("the deadline passed while the request was decoded"))

    # -- news ----------------------------------------------------------------------------------

    def _on_output(self, choice: LiveChoice, step: Step, output: SequenceOutput) -> None:
        is_first = not choice.last_token_ns
        self._bench.recorder.output(choice, step.ended_ns, output)
        if choice.tag and output.is_plain and not is_first:
            self._put_token(choice, step.number, output)
            return
        request = choice.request
        delta = decode_pb2.SequenceDelta(
            request_id=request.request_id,
            choice=choice.index,
            first_token_index=output.first_token_index,
            tokens=wire.tokens_to_proto(output.tokens),
            finish_reason=wire.finish_reason_to_proto(output.finish_reason),
        )
        if is_first:
            delta.cached_tokens = request.num_cached = output.sequence.num_cached
        if output.error:
            delta.error.CopyFrom(wire.error_to_proto(output.error))
        self._put(step.number, delta)
        if output.error or output.finish_reason:
            self._drop(request, [choice.index])
            code = output.error.code if output.error else grpc.StatusCode.OK
            self._forget_if_ended(request, code)

    def _put_token(self, choice: LiveChoice, step: int, output: SequenceOutput) -> None:
        """In short: this is what most steps have to tell of most choices."""
        token = TaggedToken(choice.tag, output.first_token_index, output.tokens[0].token_id)
        self._outbox.put_token(step, choice.request.request_id, choice.index, token)
        if self._outbox.overfull:
            self.fell_behind.set()

    def _put(self, step: int, delta: decode_pb2.SequenceDelta) -> None:
        self._outbox.put(step, delta)
        if self._outbox.overfull:
            self.fell_behind.set()

    def _report(self, request_id: str, choices: range | list[int], error: SplitserveError) -> None:
        for choice in choices:
            delta = decode_pb2.SequenceDelta(
                request_id=request_id, choice=choice, error=wire.error_to_proto(error)
            )
            self._put(0, delta)

    def _report_refusal(self, message: decode_pb2.Submit, error: SplitserveError) -> None:
        """Tell all choices that were asked for; of a name too long to repeat that often, one."""
        asked = min(max(1, message.sampling.n), self._bench.limits.max_choices)
        told = asked if len(message.request_id) <= wire.MAX_NAME_CHARS else 1
        self._report(message.request_id, range(told), error)

    # -- ends ----------------------------------------------------------------------------------

    def _fail(self, request: LiveRequest, error: SplitserveError) -> None:
        choices = list(request.choices)
        self._drop(request, choices)
        self._report(request.request_id, choices, error)
        self._forget(request, error.code)

    def _drop(self, request: LiveRequest, choices: list[int]) -> None:
        """Free all that the choices hold. Harmless for one that has ended by itself."""
        for choice in choices:
            sequence = request.choices.pop(choice).sequence
            self._bench.relay.unsubscribe(sequence.id)
            self._bench.core.abort(sequence.id)
            request.scheduled_ns = request.scheduled_ns or sequence.scheduled_ns
            if request.loader:
                request.loader.cancel(sequence.id)

    def _forget_if_ended(
        self, request: LiveRequest, code: grpc.StatusCode = grpc.StatusCode.OK
    ) -> None:
        if not request.choices:
            self._forget(request, code)

    def _forget(self, request: LiveRequest, code: grpc.StatusCode) -> None:
        request.close()
        self._live.pop(request.request_id, None)
        self._bench.recorder.ended(request, code)
        self._close_when_idle()

    def _close_when_idle(self) -> None:
        if self._closing and not self._live:
            self._outbox.close()


def _receipt_of(message: decode_pb2.Start) -> KvReceipt | None:
    """A hint, and no client's fault: one that cannot be read is left aside."""
    if not message.HasField("kv_receipt"):
        return None
    try:
        return KvReceipt.from_proto(message.kv_receipt)
    except InvalidRequest as error:
        _log.warning("a receipt is left aside: %s", error.message)
        return None
