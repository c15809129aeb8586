"""Decides what the next step computes.

Sequences join and leave at every step. Those that decode go first, one token each; what is left
of the step's token budget goes to prompts, in order of arrival, in chunks that end on block
boundaries (so that a block is always the work of one step). When the pool is full, the youngest
sequence gives its pages back and is computed again later; it misses nothing, since a sequence is
its tokens. The scheduler never touches a tensor.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from typing import NamedTuple

from splitserve.engine.batch_slots import BatchSlots
from splitserve.engine.protocol import DrawnToken, EngineSpec
from splitserve.engine.sequence import PageLoad, Sequence, SequenceOutput, State
from splitserve.errors import ConfigError
from splitserve.kv.keys import chain_keys, child_key, root_key
from splitserve.kv.pool import PagePool, PoolFull


class Chunk(NamedTuple):
    """The next tokens of a sequence, to be computed in this step. After the last ones that there
    are a token can be drawn.
    """

    sequence: Sequence
    start: int
    end: int
    is_last: bool

    @property
    def size(self) -> int:
        """How many tokens."""
        return self.end - self.start

    @classmethod
    def next_of(cls, sequence: Sequence, size: int) -> Chunk:
        """The first ones that are not computed."""
        start = sequence.num_computed
        return cls(sequence, start, start + size, start + size == sequence.num_tokens)


_LOOK_PAST = 256
"""Bounds how many that lack a place in the batch are passed over at each step."""


def check_step(max_batch: int, max_step_tokens: int, block_tokens: int) -> None:
    """Raises `ConfigError` for sizes with which prompts could starve."""
    least = max_batch + block_tokens
    if max_step_tokens < least:
        raise ConfigError(
            f"max_step_tokens {max_step_tokens} must be at least max_batch {max_batch} "
            f"+ block_tokens {block_tokens} = {least}"
        )


class Scheduler:
    """Queues, pages and the plan of each step. Used from one thread."""

    def __init__(
        self, spec: EngineSpec, pool: PagePool, *, max_batch: int, max_step_tokens: int
    ) -> None:
        check_step(max_batch, max_step_tokens, spec.block_tokens)
        self._spec = spec
        self._pool = pool
        self._max_batch = max_batch
        self._max_step_tokens = max_step_tokens
        self.waiting: deque[Sequence] = deque()
        self.loading: dict[str, Sequence] = {}
        self.ready: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._slots = BatchSlots(max_batch)
        self.num_preemptions = 0

    @property
    def queued_tokens(self) -> int:
        """Tokens that are known and not computed, decode's own next ones aside."""
        waiting = sum(s.num_uncomputed for s in self.waiting if not s.await_first_token)
        return waiting + sum(s.num_uncomputed - 1 for s in self.running)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens`."""
        return -(-num_tokens // self._spec.block_tokens)

    # -- verbs of the loop ---------------------------------------------------------------------

    def admit(self) -> None:
        """Fill the batch: first with sequences whose KV has come, then with waiting ones, oldest
        first, while there are pages. One that must wait for its KV or first token takes pages but
        no place in the batch, so that a queue elsewhere never idles this engine, nor has to wait
        behind those who lack nothing but a place.

        A call admits no more prompts than fill a step: the device need not wait until all are
        placed.
        """
        while self.ready and len(self.running) < self._max_batch:
            self._run(self.ready.popleft())
        admitted = 0
        passed: list[Sequence] = []
        while self.waiting and admitted < self._max_step_tokens and len(passed) < _LOOK_PAST:
            full = len(self.running) + len(self.ready) >= self._max_batch
            first = self.waiting[0]
            if full and not first.await_first_token:
                passed.append(self.waiting.popleft())
            elif self._place(first):
                self._start(self.waiting.popleft())
                admitted += first.num_uncomputed if first.state is State.RUNNING else 0
            else:
                break
        self.waiting.extendleft(reversed(passed))

    @property
    def may_preempt(self) -> bool:
        """Whether the next plan may take pages from a sequence. No step may be in flight then:
        whose pages are taken must not be at work.
        """
        free = self._pool.num_free
        if free >= len(self.running):
            return False
        return free < sum(len(s.pages) < self.pages_for(s.num_tokens) for s in self.running)

    def plan(self) -> list[Chunk]:
        """Choose this step's chunks; every one has its pages."""
        self._slots.close_ranks(self.running)
        budget = self._max_step_tokens
        chunks: list[Chunk] = []
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            end = sequence.num_tokens
            uncomputed = end - sequence.num_computed
            if uncomputed > 1:
                prompts.append(sequence)
            elif uncomputed < 1 or sequence.state is not State.RUNNING:
                continue
            elif not sequence.draws_its_last and self._grow(sequence, end):
                chunks.append(Chunk(sequence, end - 1, end, is_last=True))
        budget -= len(chunks)
        for sequence in prompts:
            if sequence.state is State.RUNNING:
                size = self._chunk_size(sequence, budget)
                if size == 0:
                    break
                chunks.append(Chunk.next_of(sequence, size))
                budget -= size
        return chunks

    @property
    def may_be_joined(self) -> bool:
        """Whether somebody awaits KV or a first token and would have a place in the batch."""
        return bool(self.loading) and len(self.running) < self._max_batch

    def launched(self, chunk: Chunk) -> None:
        """Book a chunk that is being computed: the next plan goes on from there."""
        sequence = chunk.sequence
        sequence.num_computed = chunk.end
        sequence.came_from = -1
        sequence.num_in_flight += 1
        sequence.num_pending += chunk.is_last

    def landed(self, chunk: Chunk) -> None:
        """The step is over, for better or worse. A sequence that had ended before gives up its
        pages here.
        """
        sequence = chunk.sequence
        sequence.num_in_flight -= 1
        sequence.num_pending -= chunk.is_last
        if sequence.state is State.FINISHED and not sequence.is_held:
            self._free(sequence)

    def apply(self, chunk: Chunk, drawn: Seq[DrawnToken]) -> SequenceOutput | None:
        """Book a landed chunk's drawn tokens; return what is news to the user."""
        sequence = chunk.sequence
        if sequence.state is State.FINISHED:
            return None
        self._register(sequence, chunk.end)
        if not drawn:
            return None
        if not sequence.first_token_ns:
            sequence.first_token_ns = time.time_ns()
        if sequence.prefill_choices:
            return self._finish_prefill(sequence, drawn)
        return self._append(sequence, drawn[0])

    # -- news from outside ---------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def loaded(self, sequence: Sequence, num_blocks: int) -> None:
        """The source is done with the pages; the first `num_blocks` it was given are filled."""
        sequence.loading = False
        if sequence.state is State.FINISHED:
            if not sequence.is_held:
                self._free(sequence)
            return
        tokens = sequence.num_computed + num_blocks * self._spec.block_tokens
        sequence.num_computed = max(sequence.num_computed, min(tokens, len(sequence.prompt)))
        sequence.num_cached = sequence.num_computed
        self._register(sequence, sequence.num_computed)
        self._run_if_ready(sequence)

    def first_token(self, sequence: Sequence, token_id: int) -> None:
        """A prefill worker has drawn the sequence's first token."""
        sequence.await_first_token = False
        sequence.output.append(token_id)
        sequence.first_token_ns = time.time_ns()
        if sequence.state is State.LOADING:
            self._run_if_ready(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it stands; its pages go as soon as nobody fills them."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is State.LOADING:
            del self.loading[sequence.id]
        elif sequence.state is State.READY:
            self.ready.remove(sequence)
        elif sequence.state is State.RUNNING:
            self._leave(sequence)
        sequence.state = State.FINISHED
        if not sequence.is_held:
            self._free(sequence)

    def release(self, sequence: Sequence) -> None:
        """The sink is done with the pages of a finished prefill."""
        sequence.exporting = False
        if sequence.state is State.FINISHED and not sequence.is_held:
            self._free(sequence)

    # -- placing -------------------------------------------------------------------------------

    def _place(self, sequence: Sequence) -> bool:
        """Hold cached pages and allocate the rest for all tokens known, or do nothing.

        One page for each running sequence is left alone, so that a newcomer does not preempt
        those who are at work.
        """
        block = self._spec.block_tokens
        tokens = sequence.tokens(0, sequence.num_tokens)
        root = root_key(self._spec.fingerprint, sequence.cache_salt)
        sequence.keys = chain_keys(root, tokens, block)[: len(tokens) // block]
        reusable = len(tokens) if sequence.await_first_token else len(tokens) - 1
        cached = self._pool.match(sequence.keys[: reusable // block])
        # A token drawn elsewhere joins before the first step and needs its place by then.
        known = len(tokens) + (1 if sequence.await_first_token else 0)
        missing = self.pages_for(known) - len(cached)
        reserve = len(self.running) if self.running else 0
        if missing + reserve > self._pool.num_free:
            self._pool.free(cached)
            return False
        sequence.pages = cached + self._pool.allocate(missing)
        sequence.num_computed = len(cached) * block
        sequence.num_registered = len(cached)
        if not sequence.num_preemptions:
            sequence.num_cached = sequence.num_computed
        return True

    def _start(self, sequence: Sequence) -> None:
        if not sequence.scheduled_ns:
            sequence.scheduled_ns = time.time_ns()
        sequence.state = State.LOADING
        self.loading[sequence.id] = sequence
        source, sequence.source = sequence.source, None
        loads = self._loads(sequence) if source else []
        if source and loads:
            sequence.loading = True
            source.load(sequence, loads)
        else:
            self._run_if_ready(sequence)

    def _loads(self, sequence: Sequence) -> list[PageLoad]:
        """The blocks a source may fill: all of the prompt if its first token comes from
        elsewhere; else full ones, and never the last token, which must be computed to draw.
        """
        block, length = self._spec.block_tokens, len(sequence.prompt)
        drawn_elsewhere = sequence.await_first_token or bool(sequence.output)
        first = sequence.num_computed // block
        full = (length if drawn_elsewhere else length - 1) // block
        loads = [
            PageLoad(i, sequence.keys[i], sequence.pages[i], block) for i in range(first, full)
        ]
        tail = length % block
        if drawn_elsewhere and tail and sequence.num_computed <= full * block:
            parent = sequence.keys[full - 1] if full else self._root(sequence)
            key = child_key(parent, sequence.prompt[length - tail :])
            loads.append(PageLoad(full, key, sequence.pages[full], tail))
        return loads

    def _run_if_ready(self, sequence: Sequence) -> None:
        if sequence.loading or sequence.await_first_token:
            return
        del self.loading[sequence.id]
        if len(self.running) < self._max_batch:
            self._run(sequence)
        else:
            sequence.state = State.READY
            self.ready.append(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.state = State.RUNNING
        self._slots.take(sequence)
        self.running.append(sequence)
        if sequence.sink:
            sequence.exporting = True
            block = self._spec.block_tokens
            keys = chain_keys(self._root(sequence), sequence.prompt, block)
            sequence.sink.begin(keys, tuple(sequence.pages), sequence.num_computed // block)

    def _leave(self, sequence: Sequence) -> None:
        """Give up the place in the batch."""
        self.running.remove(sequence)
        self._slots.leave(sequence)

    def _root(self, sequence: Sequence) -> bytes:
        return root_key(self._spec.fingerprint, sequence.cache_salt)

    # -- growing and preempting ----------------------------------------------------------------

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make sure so many tokens have pages; False if the sequence was preempted for lack."""
        while len(sequence.pages) * self._spec.block_tokens < num_tokens:
            try:
                sequence.pages += self._pool.allocate(1)
            except PoolFull:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        self._free(sequence)
        sequence.num_computed = 0
        sequence.state = State.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        wanted = sequence.num_uncomputed
        if wanted <= budget:
            return wanted
        return max(0, budget - (sequence.num_computed + budget) % self._spec.block_tokens)

    # -- booking -------------------------------------------------------------------------------

    def _register(self, sequence: Sequence, num_computed: int) -> None:
        """Offer every block that is full and computed by now for reuse."""
        block = self._spec.block_tokens
        full = num_computed // block
        if full <= sequence.num_registered:
            return
        for index in range(sequence.num_registered, full):
            if index >= len(sequence.keys):
                parent = sequence.keys[-1] if sequence.keys else self._root(sequence)
                tokens = sequence.tokens(index * block, (index + 1) * block)
                sequence.keys.append(child_key(parent, tokens))
            self._pool.register(sequence.pages[index], sequence.keys[index])
        sequence.num_registered = full

    def _append(self, sequence: Sequence, token: DrawnToken) -> SequenceOutput:
        sequence.output.append(token.token_id)
        length = len(sequence.output)
        reason = sequence.params.finish_after(token.token_id, length, self._spec.eos_token_ids)
        if reason:
            self.remove(sequence)
        return SequenceOutput(sequence, length - 1, (token,), finish_reason=reason)

    def _finish_prefill(self, sequence: Sequence, drawn: Seq[DrawnToken]) -> SequenceOutput:
        reasons = tuple(
            sequence.params.finish_after(t.token_id, 1, self._spec.eos_token_ids) for t in drawn
        )
        self._leave(sequence)
        sequence.state = State.FINISHED
        if not sequence.is_held:
            self._free(sequence)
        return SequenceOutput(sequence, 0, tuple(drawn), prefill_done=True, finish_reasons=reasons)

    def _free(self, sequence: Sequence) -> None:
        pages, sequence.pages = sequence.pages, []
        self._pool.free(pages)
        sequence.num_registered = 0
