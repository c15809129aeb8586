"""One request of an `LLM`: n sequences on the core, and their news as deltas."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from queue import SimpleQueue

from splitserve.detokenizer import IncrementalDetokenizer
from splitserve.engine.core import EngineCore
from splitserve.engine.protocol import DrawnToken, Logprob
from splitserve.engine.sequence import Sequence, SequenceOutput
from splitserve.outputs import ChoiceDelta, OutputDelta, PositionLogprobs, Timings, Usage
from splitserve.sampling import FinishReason, SamplingParams
from splitserve.tokenizer import Tokenizer

Inbox = SimpleQueue[SequenceOutput]


@dataclass(eq=False, kw_only=True)
class ChoiceSequence(Sequence):
    """A sequence that knows where its request listens."""

    inbox: Inbox


def dispatch(step: int, outputs: abc.Sequence[SequenceOutput]) -> None:
    """A `StepListener` that hands each output to its request."""
    for output in outputs:
        if isinstance(output.sequence, ChoiceSequence):
            output.sequence.inbox.put(output)


class Request:
    """Submits the first choice alone and the others after its first token, so that these find
    the prompt's KV instead of computing it n times.
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
        self._live: set[int] = set()
        self._submitted = 0
        self._num_tokens = 0
        self._first: Sequence | None = None
        self._began_ns = time.time_ns()

    def submit(self) -> None:
        """Queue the first choice."""
        self._submit_next()

    def abort(self) -> None:
        """End whatever is still running. Does nothing after the last delta."""
        for choice in self._live:
            self._core.abort(self._sequence_id(choice))
        self._live.clear()

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
            while self._submitted < self._params.n:
                self._submit_next()
            last = not self._live
            yield OutputDelta(
                request_id=self.id,
                choices=[delta],
                usage=self._usage() if last else None,
                timings=self._timings() if last else None,
                seed=seed,
            )
            seed = None

    def _submit_next(self) -> None:
        choice = self._submitted
        sequence = ChoiceSequence(
            id=self._sequence_id(choice),
            prompt=self.prompt,
            params=self._params,
            seed=self._params.seed or 0,
            choice=choice,
            inbox=self._inbox,
        )
        self._first = self._first or sequence
        self._core.submit(sequence)
        self._submitted += 1
        self._live.add(choice)

    def _take(self, output: SequenceOutput) -> ChoiceDelta:
        choice, tokens, reason = output.sequence.choice, output.tokens, output.finish_reason
        text, detokenizer = "", self._texts[choice]
        if detokenizer:
            delta = detokenizer.push([token.token_id for token in tokens])
            text, tokens = delta.text, tokens[: delta.num_tokens]
            if delta.stopped:
                if reason is None:
                    self._core.abort(self._sequence_id(choice))
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

    def _sequence_id(self, choice: int) -> str:
        return f"{self.id}/{choice}"

    def _usage(self) -> Usage:
        cached = self._first.num_cached if self._first else 0
        return Usage(len(self.prompt), cached, self._num_tokens)

    def _timings(self) -> Timings:
        first, now = self._first, time.time_ns()
        assert first is not None, "a request that has ended was submitted"
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
