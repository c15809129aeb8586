"""A trace as a tree of text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from splitserve.obs import names
from splitserve.obs.collector import CollectedSpan

BAR_WIDTH = 32
LABEL_WIDTH = 60


def render_tree(spans: Sequence[CollectedSpan]) -> str:
    """Each span on a line: its place in the tree, service, bar, milliseconds, status, events.

    The bar shows when the span ran between the first start and the last end. A span whose parent
    is not among `spans` stands at the top.
    """
    if not spans:
        return "no spans"
    start_ns = min(span.start_ns for span in spans)
    total_ns = max(1, max(span.end_ns for span in spans) - start_ns)
    rows = list(_rows(spans))
    width = max(LABEL_WIDTH, *(len(label) for label, _ in rows))
    return "\n".join(
        f"{label:<{width}} {_bar(span, start_ns, total_ns)} {span.duration_ms:9.2f} ms"
        f"{_notes(span)}"
        for label, span in rows
    )


def _rows(spans: Sequence[CollectedSpan]) -> Iterator[tuple[str, CollectedSpan]]:
    known = {span.span_id for span in spans}
    children: dict[str | None, list[CollectedSpan]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_ns, span.end_ns)):
        children[span.parent_id if span.parent_id in known else None].append(span)

    def walk(span: CollectedSpan, lead: str, fork: str) -> Iterator[tuple[str, CollectedSpan]]:
        yield f"{lead}{fork}{_title(span)}", span
        below = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[fork]
        branches = children[span.span_id]
        for child in branches:
            yield from walk(child, below, "└─ " if child is branches[-1] else "├─ ")

    for root in children[None]:
        yield from walk(root, "", "")


def _title(span: CollectedSpan) -> str:
    name = span.name.rpartition(".")[2] if "/" in span.name else span.name
    arrow = " →" if span.kind == "CLIENT" else ""
    return f"{span.service}: {name}{arrow}"


def _bar(span: CollectedSpan, start_ns: int, total_ns: int) -> str:
    first = min(BAR_WIDTH - 1, (span.start_ns - start_ns) * BAR_WIDTH // total_ns)
    last = min(BAR_WIDTH, -(-(span.end_ns - start_ns) * BAR_WIDTH // total_ns))
    length = max(1, last - first)
    return f"│{' ' * first}{'█' * length}{' ' * (BAR_WIDTH - first - length)}│"


def _notes(span: CollectedSpan) -> str:
    notes = []
    code = span.attributes.get(names.RPC_STATUS_CODE)
    if span.status == "ERROR" or code not in (None, "OK"):
        notes.append(str(code or span.status_message or span.status))
    notes.extend(
        f"{event.name} +{(event.time_ns - span.start_ns) / 1e6:.1f} ms" for event in span.events
    )
    return f"  {', '.join(notes)}" if notes else ""
