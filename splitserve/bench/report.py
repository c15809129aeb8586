"""Sums up the records of a replay: percentiles, throughput, goodput, as data and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from splitserve.bench.record import RequestRecord

MAX_ERRORS = 10


@dataclass(frozen=True)
class Distribution:
    """Of one quantity, in milliseconds. Percentiles are interpolated linearly, as numpy's are."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, samples_s: Sequence[float]) -> Distribution | None:
        """None where there is no sample."""
        if not samples_s:
            return None
        samples = np.asarray(samples_s) * 1000
        p50, p90, p99 = (float(p) for p in np.percentile(samples, [50, 90, 99]))
        return cls(len(samples), float(samples.mean()), p50, p90, p99, float(samples.max()))


@dataclass(frozen=True)
class Limits:
    """What makes a request good. None is no limit."""

    ttft_ms: float | None = None
    itl_ms: float | None = None
    """Of the request's own p99 inter-token latency."""

    def met_by(self, record: RequestRecord) -> bool:
        """Whether the request succeeded within the limits."""
        if record.error is not None:
            return False
        if self.ttft_ms is not None and record.ttft_s * 1000 > self.ttft_ms:
            return False
        itl = Distribution.of_seconds(record.itl_s)
        return self.itl_ms is None or itl is None or itl.p99 <= self.itl_ms


@dataclass(frozen=True)
class Goodput:
    """How much was served within the limits."""

    limits: Limits
    share: float
    """Of all requests sent; a failed one is never good."""
    requests_per_s: float


@dataclass(frozen=True)
class Report:
    """A replay in numbers. Latencies are of the requests that succeeded."""

    completed: int
    failed: int
    duration_s: float
    """From the first request sent to the last one ended."""
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Distribution | None
    itl_ms: Distribution | None
    tpot_ms: Distribution | None
    e2e_ms: Distribution | None
    goodput: Goodput
    errors: dict[str, int]
    """Messages of failed requests and how often each came, the most frequent first."""


def summarize(records: Sequence[RequestRecord], limits: Limits) -> Report:
    """The report of at least one record."""
    done = [record for record in records if record.error is None]
    duration_s = max(r.ended_s for r in records) - min(r.sent_s for r in records)
    output_tokens = sum(record.output_tokens for record in done)
    good = sum(limits.met_by(record) for record in records)
    errors = Counter(record.error for record in records if record.error is not None)
    return Report(
        completed=len(done),
        failed=len(records) - len(done),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=output_tokens,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=output_tokens / duration_s,
        ttft_ms=Distribution.of_seconds([record.ttft_s for record in done]),
        itl_ms=Distribution.of_seconds([gap for record in done for gap in record.itl_s]),
        tpot_ms=Distribution.of_seconds([r.tpot_s for r in done if r.tpot_s is not None]),
        e2e_ms=Distribution.of_seconds([record.e2e_s for record in done]),
        goodput=Goodput(limits, good / len(records), good / duration_s),
        errors=dict(errors.most_common(MAX_ERRORS)),
    )


def render(report: Report) -> str:
    """A table for people."""
    lines = [
        f"requests            {report.completed} completed, {report.failed} failed, "
        f"in {report.duration_s:.2f} s",
        f"throughput          {report.requests_per_s:.2f} requests/s, "
        f"{report.output_tokens_per_s:.1f} output tokens/s",
        f"tokens              {report.prompt_tokens} prompt, {report.output_tokens} output",
        "",
        f"{'milliseconds':<18}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
        *_rows(report),
        "",
        f"goodput             {report.goodput.share:.1%} of requests, "
        f"{report.goodput.requests_per_s:.2f} requests/s within {_limits(report.goodput.limits)}",
    ]
    lines += [f"failed              {count} x {error}" for error, count in report.errors.items()]
    return "\n".join(lines)


def _rows(report: Report) -> list[str]:
    named = {
        "TTFT": report.ttft_ms,
        "inter-token": report.itl_ms,
        "per output token": report.tpot_ms,
        "end to end": report.e2e_ms,
    }
    return [
        f"{name:<18}" + "".join(f"{x:>10.2f}" for x in (d.mean, d.p50, d.p90, d.p99, d.max))
        if d is not None
        else f"{name:<18}{'-':>10}"
        for name, d in named.items()
    ]


def _limits(limits: Limits) -> str:
    parts = []
    if limits.ttft_ms is not None:
        parts.append(f"TTFT <= {limits.ttft_ms:g} ms")
    if limits.itl_ms is not None:
        parts.append(f"p99 inter-token <= {limits.itl_ms:g} ms")
    return " and ".join(parts) or "no limits"
