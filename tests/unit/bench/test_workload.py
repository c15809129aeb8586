"""Workload files."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitserve.bench.workload import (
    WorkItem,
    cap,
    check_context,
    load_workload,
    prompt_ids,
    select,
)
from splitserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lines_become_items(tmp_path: Path):
    path = write(
        tmp_path / "w.jsonl",
        '{"id": 0, "prompt_tokens": 3, "output_tokens": 4, "arrival_s": 1.5}',
        "",
        '{"id": "b", "prompt_tokens": 5, "output_tokens": 6, "arrival_s": 2}',
    )
    assert load_workload(path) == [WorkItem("0", 3, 4, 1.5), WorkItem("b", 5, 6, 2.0)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"output_tokens": 1}', "prompt_tokens must be"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens must be"),
        ('{"prompt_tokens": 1, "output_tokens": true}', "output_tokens must be"),
        ('{"prompt_tokens": 1, "output_tokens": 1.5}', "output_tokens must be"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": -1}', "arrival_s must be"),
        ('{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": NaN}', "arrival_s must be"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str):
    path = write(tmp_path / "w.jsonl", '{"prompt_tokens": 1, "output_tokens": 1}', line)
    with pytest.raises(ConfigError, match=rf"w\.jsonl:2: {problem}"):
        load_workload(path)


def test_an_empty_file_and_half_recorded_arrivals_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no request"):
        load_workload(write(tmp_path / "empty.jsonl"))
    half = write(
        tmp_path / "half.jsonl",
        '{"prompt_tokens": 1, "output_tokens": 1}',
        '{"prompt_tokens": 1, "output_tokens": 1, "arrival_s": 0}',
    )
    with pytest.raises(ConfigError, match="every line or on none"):
        load_workload(half)


def test_selecting_and_capping():
    items = [WorkItem("a", 100, 10), WorkItem("b", 5, 500)]
    assert select(items, 1) == items[:1]
    assert select(items, None) == items
    with pytest.raises(ConfigError, match="only 2"):
        select(items, 3)
    assert cap(items, 50, 20) == [WorkItem("a", 50, 10), WorkItem("b", 5, 20)]
    assert cap(items, None, None) == items


def test_a_request_over_the_context_is_named():
    items = [WorkItem("a", 10, 10), WorkItem("b", 5, 500)]
    check_context(items, 505)
    with pytest.raises(ConfigError, match="request b needs 505 tokens"):
        check_context(items, 504)


def test_prompts_are_the_same_for_the_same_seed_only():
    first = prompt_ids(0, 50, 100, seed=1)
    assert first == prompt_ids(0, 50, 100, seed=1)
    assert first != prompt_ids(1, 50, 100, seed=1)
    assert first != prompt_ids(0, 50, 100, seed=2)
    assert len(first) == 50
    assert set(first) <= set(range(100))


@pytest.mark.parametrize(
    ("name", "count", "arrivals"),
    [
        ("chat", 1024, False),
        ("summarize", 1024, False),
        ("fixed-128-128", 1024, False),
        ("azure-conv", 3000, True),
    ],
)
def test_the_committed_workloads_load(name: str, count: int, arrivals: bool):
    items = load_workload(ROOT / "benchmarks" / "workloads" / f"{name}.jsonl")
    assert len(items) == count
    assert (items[0].arrival_s is not None) is arrivals
