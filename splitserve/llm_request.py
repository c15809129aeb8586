"""One request of an `LLM`: n sequences on the core, and their news as deltas."""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from dataclasses import dataclass
from queue import SimpleQueue

from splitserve.detokenizer import IncrementalDetokenizer
from splitserve.engine.core import EngineCore
from splitserve.engine.protocol import DrawnToken, Logprob
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.errors import SplitserveError
from splitserve.outputs import ChoiceDelta, OutputDelta, PositionLogprobs, Timings, Usage
from splitserve.sampling import FinishReason, SamplingParams
from splitserve.tokenizer import Tokenizer

Inbox = SimpleQueue[SequenceOutput]


@dataclass(eq=False, kw_only=True)
class ChoiceSequence(Sequence):
    """A sequence that knows whose it is."""

    request: Request


def dispatch(step: int, outputs: abc.Sequence[SequenceOutput]) -> None:
    """A `StepListener` that hands each output to its request."""
    for output in outputs:
        if isinstance(output.sequence, ChoiceSequence):
            output.sequence.request.hear(output)


class Request:
    """Submits the first choice alone and the others as soon as its first token is drawn, so that
    these find the prompt's KV instead of computing it n times.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        core: EngineCore,
        tokenizer: Tokenizer | None,
    ) -> None:
        """`params` must have its seed and max_tokens decided."""
        self.id = request_id
        self.prompt = prompt
        self._params = params
        self._core = core
        self._inbox: Inbox = SimpleQueue()
        self._texts = [
            IncrementalDetokenizer(tokenizer, params.stop) if tokenizer else None
            for _ in range(params.n)
        ]
        self._live = set(range(params.n))
        self._num_tokens = 0
        self._sequences = [self._sequence(choice) for choice in range(params.n)]
        self._unsubmitted = deque(self._sequences)
        self._submitting = threading.Lock()
        self._began_ns = time.time_ns()

    def submit(self) -> None:
        """Queue the first choice."""
        self._core.submit(self._unsubmitted.popleft())

    def abort(self) -> None:
        """End whatever is still running. Does nothing after the last delta."""
        with self._submitting:
            self._unsubmitted.clear()
        for choice in self._live:
            self._core.abort(self._sequences[choice].id)
        self._live.clear()

    def hear(self, output: SequenceOutput) -> None:
        """Take an output of one choice. Called on the engine's thread."""
        if not output.error:
            self._submit_others()
        self._inbox.put(output)

    def deltas(self) -> abc.Iterator[OutputDelta]:
        """What is new, as it comes, until every choice has ended. Raises a choice's error."""
        seed = self._params.seed
        while self._live:
            output = self._inbox.get()
            if output.error:
                raise output.error
            if output.sequence.choice not in self._live:
                continue
            delta = self._take(output)
            last = not self._live
            yield OutputDelta(
                request_id=self.id,
                choices=[delta],
                usage=self._usage() if last else None,
                timings=self._timings() if last else None,
                seed=seed,
            )
            seed = None

    def _submit_others(self) -> None:
        with self._submitting:
            while self._unsubmitted:
                sequence = self._unsubmitted.popleft()
                try:
                    self._core.submit(sequence)
                except SplitserveError as error:
                    self._inbox.put(SequenceOutput(sequence, 0, (), error=error))

    def _sequence(self, choice: int) -> ChoiceSequence:
        return ChoiceSequence(
            id=f"{self.id}/{choice}",
            prompt=self.prompt,
            params=self._params,
            seed=self._params.seed or 0,
            choice=choice,
            request=self,
        )

    def _take(self, output: SequenceOutput) -> ChoiceDelta:
        choice, tokens, reason = output.sequence.choice, output.tokens, output.finish_reason
        text, detokenizer = "", self._texts[choice]
        if detokenizer:
            delta = detokenizer.push([token.token_id for token in tokens])
            text, tokens = delta.text, tokens[: delta.num_tokens]
            if delta.stopped:
                if reason is None:
                    self._core.abort(output.sequence.id)
                reason = FinishReason.STOP
            elif reason:
                text += detokenizer.finish()
        if reason:
            self._live.discard(choice)
        self._num_tokens += len(tokens)
        return ChoiceDelta(
            index=choice,
            first_token_index=output.first_token_index,
            token_ids=[token.token_id for token in tokens],
            logprobs=_logprobs(tokens) if self._params.logprobs is not None else None,
            text=text,
            finish_reason=reason.value if reason else None,
        )

    def _usage(self) -> Usage:
        return Usage(len(self.prompt), self._sequences[0].num_cached, self._num_tokens)

    def _timings(self) -> Timings:
        first, now = self._sequences[0], time.time_ns()
        return Timings(
            time_to_first_token_ms=(first.first_token_ns - self._began_ns) / 1e6,
            total_ms=(now - self._began_ns) / 1e6,
            queue_ms=(first.scheduled_ns - self._began_ns) / 1e6,
            prefill_ms=(first.first_token_ns - first.scheduled_ns) / 1e6,
            decode_ms=(now - first.first_token_ns) / 1e6,
        )


def _logprobs(tokens: abc.Sequence[DrawnToken]) -> list[PositionLogprobs]:
    return [
        PositionLogprobs(Logprob(token.token_id, token.logprob or 0.0), token.top)
        for token in tokens
    ]
