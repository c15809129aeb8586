"""docs/operations.md names only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitserve.obs import names


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "operations.md").read_text()


def _section(page: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_metrics_exist(page: str) -> None:
    quoted = re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)(?:\{.*?\})?`", _section(page, "Scaling"))
    stems = {name.removesuffix("_total") for name in quoted}
    assert len(stems) > 5
    assert stems <= {value for key, value in vars(names).items() if key.isupper()}


def test_components_and_overlays_are_all_listed(page: str, root: Path) -> None:
    table = {
        name
        for row in _section(page, "The parts").splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`([\w-]+)`", row.split("|")[1])
    }
    folders = {path.name for kind in ("components", "overlays") for path in _folders(root, kind)}
    assert table == folders


def test_paths_exist(page: str, root: Path) -> None:
    for path in set(re.findall(r"\bk8s/[\w/.-]+\w|\btests/[\w/]+\w", page)):
        assert (root / path).exists(), path


def _folders(root: Path, kind: str) -> list[Path]:
    return [path for path in (root / "k8s" / kind).iterdir() if path.is_dir()]
