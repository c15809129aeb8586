"""Every document is valid, strictly, for every Kubernetes version that we know the schema of."""

from __future__ import annotations

import functools
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

VERSIONS = sorted(set(utils.all_versions()), key=lambda v: [int(part) for part in v.split(".")])


@pytest.fixture(autouse=True, scope="module")
def _schemas_read_once() -> Any:
    # The library parses megabytes of schema again for each document.
    patch = pytest.MonkeyPatch()
    patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
    yield
    patch.undo()


def test_the_versions_we_support_are_known() -> None:
    assert VERSIONS[0].startswith("1.25")
    assert len(VERSIONS) >= 11


@pytest.mark.parametrize("version", VERSIONS)
def test_valid(rendered: Any, version: str) -> None:
    assert rendered.documents
    for document in rendered.documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_check_is_strict(base: Any) -> None:
    misspelt = dict(base.one("Service", "prefill"))
    misspelt["spec"] = {**misspelt["spec"], "clusterIPP": "None"}
    with pytest.raises(kubernetes_validate.ValidationError, match="clusterIPP"):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


def test_every_name_is_used_once(rendered: Any) -> None:
    names = [(d["kind"], d["metadata"]["name"]) for d in rendered.documents]
    assert len(names) == len(set(names))


def test_everything_is_in_our_namespace_and_labelled(rendered: Any) -> None:
    for document in rendered.documents:
        metadata = document["metadata"]
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "splitserve"
        if document["kind"] != "Namespace":
            assert metadata["namespace"] == "splitserve"


def test_no_file_is_left_out_of_its_kustomization(root: Any) -> None:
    for folder in {path.parent for path in (root / "k8s").rglob("*.yaml")}:
        kustomization = folder / "kustomization.yaml"
        entries = yaml.safe_load(kustomization.read_text())
        named = set(entries.get("resources", []))
        named |= {patch["path"] for patch in entries.get("patches", []) if "path" in patch}
        here = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert here == {name for name in named if "/" not in name}, folder
