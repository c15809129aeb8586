"""The loop that drives an engine: admit, step, emit.

One core serves every role. The monolith submits plain sequences. A prefill worker submits
sequences with a sink, which end at their first token. A decode worker submits sequences with a
source, which begin where a prefill worker stopped. All methods but `step` may be called from any
thread: they leave a note in the inbox, and the loop reads it between two steps, so that no caller
ever waits for a forward pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from splitserve.engine.flights import Flights, slice_of, whole_blocks
from splitserve.engine.protocol import DrawnToken, Engine
from splitserve.engine.scheduler import Chunk, Scheduler
from splitserve.engine.sequence import Sequence, SequenceOutput, State, StepListener
from splitserve.engine.step_timing import StepTiming
from splitserve.errors import InvalidRequest, Overloaded, SplitserveError, Unavailable
from splitserve.kv.pool import PagePool

log = logging.getLogger(__name__)

PagesListener = Callable[[list[bytes], list[bytes]], None]
"""Called on the engine's thread as `listener(added_keys, removed_keys)`. Must not wait."""

_PAUSE_AFTER_FAULT_S = 0.1
_LOOK_EVERY_S = 0.0002
_LOOK_SELDOM_S = 0.001


@dataclass(frozen=True)
class CoreConfig:
    """Sizes of the loop. `max_queue` bounds sequences that are accepted and not finished."""

    max_batch: int = 64
    max_step_tokens: int = 512
    max_queue: int = 4096
    reuse_prefixes: bool = True


@dataclass(frozen=True)
class CoreStats:
    """A snapshot between two steps. `running` have their pages; `in_batch` are those of them that
    await neither KV nor a first token. `stuck_s` is how long the present step has been running.
    """

    running: int
    in_batch: int
    waiting: int
    queued_tokens: int
    total_pages: int
    free_pages: int
    steps: int
    failed_steps: int
    num_preemptions: int
    prefill_tokens_per_s: float
    stuck_s: float


class EngineCore:
    """Owns the scheduler and the pool, and is the only caller of `Engine.step`."""

    def __init__(
        self,
        engine: Engine,
        config: CoreConfig,
        listener: StepListener,
        pages_listener: PagesListener | None = None,
    ) -> None:
        self._engine = engine
        self._config = config
        self._listener = listener
        self._pages_listener = pages_listener
        self._pool = PagePool(engine.spec.num_pages, reuse=config.reuse_prefixes)
        self._scheduler = Scheduler(
            engine.spec,
            self._pool,
            max_batch=config.max_batch,
            max_step_tokens=config.max_step_tokens,
        )
        self._news = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._flights = Flights(engine)
        self._live: dict[str, Sequence] = {}
        self._ids: set[str] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._steps = 0
        self._failed_steps = 0
        self._timing = StepTiming(config.max_step_tokens)
        self._step_began = 0.0
        self._queued_tokens = 0

    # -- from any thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Run the loop on a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the present step and wait for it. Sequences end with an error."""
        with self._news:
            self._stopping = True
            self._news.notify()
        if self._thread:
            self._thread.join()
        self._land(0)
        self._read_inbox()
        self._emit([self._end_by_stop(s) for s in list(self._live.values()) if s.is_live])

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises `Overloaded` if the queue is full or the pool could never hold it, `InvalidRequest`
        if its id is live, and `Unavailable` once the core is stopping.
        """
        self._check_fits(sequence)
        with self._news:
            if self._stopping:
                raise Unavailable("the engine has been stopped")
            if len(self._ids) >= self._config.max_queue:
                raise Overloaded(f"{len(self._ids)} sequences are queued; come back", 1.0)
            if sequence.id in self._ids:
                raise InvalidRequest.single("request_id", f"{sequence.id!r} is in use")
            self._ids.add(sequence.id)
        self._note(lambda: self._add(sequence))

    def first_token(self, sequence_id: str, token_id: int) -> None:
        """Give an awaiting sequence the token that a prefill worker drew."""

        def apply(sequence: Sequence) -> None:
            if sequence.await_first_token and sequence.state is not State.FINISHED:
                self._scheduler.first_token(sequence, token_id)

        self._note_for(sequence_id, apply)

    def loaded(self, sequence_id: str, num_blocks: int) -> None:
        """Answer a `KvSource.load`: its first `num_blocks` blocks are filled."""

        def apply(sequence: Sequence) -> None:
            self._scheduler.loaded(sequence, num_blocks)
            self._forget_if_done(sequence)

        self._note_for(sequence_id, apply)

    def abort(self, sequence_id: str) -> None:
        """End a sequence without output. One that is unknown or has ended is left alone."""

        def apply(sequence: Sequence) -> None:
            if sequence.state is not State.FINISHED:
                self._scheduler.remove(sequence)
            self._forget_if_done(sequence)

        self._note_for(sequence_id, apply)

    def release(self, sequence_id: str) -> None:
        """A prefill's hand-over is done with its pages."""

        def apply(sequence: Sequence) -> None:
            self._scheduler.release(sequence)
            self._forget_if_done(sequence)

        self._note_for(sequence_id, apply)

    def stats(self) -> CoreStats:
        """Count what is there. Values may be a step old, never torn in a way that matters."""
        began = self._step_began
        scheduler = self._scheduler
        return CoreStats(
            running=len(scheduler.running) + len(scheduler.ready) + len(scheduler.loading),
            in_batch=len(scheduler.running) + len(scheduler.ready),
            waiting=len(scheduler.waiting) + len(self._inbox),
            queued_tokens=self._queued_tokens,
            total_pages=self._pool.num_pages,
            free_pages=self._pool.num_free,
            steps=self._steps,
            failed_steps=self._failed_steps,
            num_preemptions=scheduler.num_preemptions,
            prefill_tokens_per_s=self._timing.prefill_tokens_per_s,
            stuck_s=time.monotonic() - began if began else 0.0,
        )

    # -- the loop ------------------------------------------------------------------------------

    def step(self) -> bool:
        """Admit, launch, emit. False if there was nothing to compute and nothing to read.

        On an `AsyncEngine` the step that is emitted is the one before the one launched: the device
        has work while the host reads tokens, tells of them and plans. While sequences await their
        KV it is launched as late as may be, for those whose KV is there by then. With nothing to
        launch it waits for the step in flight, and shortly before that is over for news: who has
        come while a prompt was computed is launched behind it, not after it.
        """
        landing = bool(self._flights)
        decided_s = self._wait_for_joiners()
        self._read_inbox()
        self._scheduler.admit()
        self._queued_tokens = self._scheduler.queued_tokens
        if self._scheduler.may_preempt:
            self._land(0)
            decided_s = time.monotonic()
        chunks = self._scheduler.plan()
        if chunks:
            self._take_off(chunks, decided_s)
        elif self._hears_before_landing():
            return True
        self._land(self._flights.most_ahead if chunks else 0)
        self._publish()
        return bool(chunks) or landing

    def _run(self) -> None:
        while not self._stopping:
            try:
                if not self.step():
                    self._wait_for_news()
            except Exception:
                self._failed_steps += 1
                log.exception("the engine loop failed outside a forward pass")
                self._wait_for_news(timeout_s=_PAUSE_AFTER_FAULT_S)

    def _wait_for_news(self, timeout_s: float | None = None) -> None:
        with self._news:
            self._news.wait_for(lambda: self._inbox or self._stopping, timeout_s)

    def _wait_for_joiners(self) -> float:
        """Until the next step should be launched, if somebody may join it. The time of that."""
        now = time.monotonic()
        if not self._flights or not self._scheduler.may_be_joined:
            return now
        until = self._timing.launch_at(self._flights.oldest)
        if now >= until:
            return now
        while now < until and not (self._stopping or self._flights.oldest.launched.done()):
            with self._news:
                self._news.wait_for(lambda: self._stopping, min(until - now, _LOOK_SELDOM_S))
            now = time.monotonic()
        return min(now, until)

    def _hears_before_landing(self) -> bool:
        """Whether there is news, when the step in flight is about to be over and is not."""
        while self._flights and not self._flights.oldest.launched.done():
            if self._goes_on():
                return bool(self._inbox)
            with self._news:
                self._news.wait_for(self._goes_on, _LOOK_EVERY_S)
        return False

    def _goes_on(self) -> bool:
        if self._stopping or not self._inbox:
            return self._stopping
        return time.monotonic() >= self._timing.launch_at(self._flights.oldest)

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _take_off(self, chunks: list[Chunk], decided_s: float) -> None:
        if not self._flights:
            self._step_began = time.monotonic()
        slices = [slice_of(chunk) for chunk in chunks]
        for chunk in chunks:
            self._scheduler.launched(chunk)
        try:
            self._flights.take_off(chunks, slices)
            self._timing.launched(decided_s)
        except Exception:
            self._end_step(self._fail(chunks))

    def _land(self, most_in_flight: int) -> None:
        """Read and emit the oldest steps until no more than so many are in flight."""
        while len(self._flights) > most_in_flight:
            flight = self._flights.next_down()
            try:
                drawn = flight.launched.tokens()
            except Exception:
                self._timing.failed()
                self._end_step(self._fail(flight.chunks))
                continue
            self._timing.landed(flight)
            self._end_step(self._book(flight.chunks, drawn))

    def _book(self, chunks: list[Chunk], drawn: list[list[DrawnToken]]) -> list[SequenceOutput]:
        # Whatever goes wrong with one of them, none is left in flight.
        for chunk in chunks:
            self._scheduler.landed(chunk)
        outputs = []
        for chunk, tokens in zip(chunks, drawn, strict=True):
            output = self._book_one(chunk, tokens)
            if output:
                outputs.append(output)
            else:
                self._forget_if_done(chunk.sequence)
        return outputs

    def _book_one(self, chunk: Chunk, tokens: list[DrawnToken]) -> SequenceOutput | None:
        sequence = chunk.sequence
        try:
            if sequence.sink:
                sequence.sink.blocks_done(*whole_blocks(chunk, self._block))
            return self._scheduler.apply(chunk, tokens)
        except Exception:
            log.exception("a step of sequence %s could not be booked", sequence.id)
            return self._fail_one(sequence) if sequence.is_live else None

    def _end_step(self, outputs: list[SequenceOutput]) -> None:
        self._step_began = time.monotonic() if self._flights else 0.0
        self._steps += 1
        self._emit(outputs)

    def _fail(self, chunks: list[Chunk]) -> list[SequenceOutput]:
        self._failed_steps += 1
        log.exception("a forward pass over %d sequences failed", len(chunks))
        for chunk in chunks:
            self._scheduler.landed(chunk)
            self._forget_if_done(chunk.sequence)
        return [self._fail_one(c.sequence) for c in chunks if c.sequence.is_live]

    def _fail_one(self, sequence: Sequence) -> SequenceOutput:
        self._scheduler.remove(sequence)
        error = SplitserveError("the forward pass failed; the worker's log says why")
        return SequenceOutput(sequence, len(sequence.output), (), error=error)

    def _end_by_stop(self, sequence: Sequence) -> SequenceOutput:
        self._scheduler.remove(sequence)
        error = Unavailable("the engine was stopped before the sequence had ended")
        return SequenceOutput(sequence, len(sequence.output), (), error=error)

    def _emit(self, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            self._forget_if_done(output.sequence)
        if outputs:
            self._listener(self._steps, outputs)

    def _publish(self) -> None:
        added, removed = self._pool.drain_changes()
        if self._pages_listener and (added or removed):
            self._pages_listener(added, removed)

    # -- bookkeeping ---------------------------------------------------------------------------

    @property
    def _block(self) -> int:
        return self._engine.spec.block_tokens

    def _note(self, apply: Callable[[], None]) -> None:
        with self._news:
            self._inbox.append(apply)
            self._news.notify()

    def _note_for(self, sequence_id: str, apply: Callable[[Sequence], None]) -> None:
        def lookup() -> None:
            sequence = self._live.get(sequence_id)
            if sequence:
                apply(sequence)

        self._note(lookup)

    def _add(self, sequence: Sequence) -> None:
        self._live[sequence.id] = sequence
        self._scheduler.add(sequence)

    def _forget_if_done(self, sequence: Sequence) -> None:
        if sequence.state is State.FINISHED and not sequence.is_held:
            self._live.pop(sequence.id, None)
            with self._news:
                self._ids.discard(sequence.id)

    def _check_fits(self, sequence: Sequence) -> None:
        spec, length = self._engine.spec, len(sequence.prompt)
        most = 0 if sequence.prefill_choices else sequence.params.max_tokens
        longest = spec.max_context_tokens if most is None else length + most
        needed = self._scheduler.pages_for(min(longest, spec.max_context_tokens))
        if needed > spec.num_pages:
            raise Overloaded(
                f"the sequence may need {needed} pages and the pool has {spec.num_pages}; "
                "lower max_tokens or give the worker a larger pool"
            )
