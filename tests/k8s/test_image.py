"""The Dockerfile copies what exists, and every image is pinned.

No image is built here: that needs a container engine.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A version with at least three numbers, or a digest: a tag that is not moved to other contents.
PINNED = re.compile(r"^[^:@]+:\d+\.\d+\.\d+[\w.-]*$|^[^@]+@sha256:[0-9a-f]{64}$")


@pytest.fixture(scope="module")
def instructions(root: Path) -> list[tuple[str, str]]:
    """Instruction and argument of each line, continuations joined."""
    text = re.sub(r"\\\n\s*", "", (root / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def _copied(instructions: list[tuple[str, str]]) -> list[str]:
    return [
        path
        for name, argument in instructions
        if name == "COPY" and not argument.startswith("--from")
        for path in argument.split()[:-1]
    ]


def test_copied_paths_exist_and_are_let_in(root: Path, instructions: Any) -> None:
    let_in = {
        line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    for path in _copied(instructions):
        assert (root / path).exists(), path
        assert path in let_in, f".dockerignore keeps {path} out"


def test_every_package_of_the_wheel_is_copied(root: Path, instructions: Any) -> None:
    copied = _copied(instructions)
    for package in ("splitserve", "services", "kernels/splitserve_kernels"):
        assert (root / package).is_dir()
        assert package.split("/")[0] in copied


def test_the_image_runs_as_nobody_special(instructions: Any) -> None:
    assert ("USER", "10001:10001") in instructions
    assert ("ENTRYPOINT", '["python", "-m"]') in instructions


def test_final_stage_has_no_build_tools_by_default(instructions: Any) -> None:
    last = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    final = instructions[last:]
    assert ("ARG", 'RUNTIME_PACKAGES=""') in final
    assert not any("pip install" in argument for _, argument in final)


def test_the_base_image_is_pinned(instructions: Any) -> None:
    defaults = dict(a.split("=", 1) for n, a in instructions if n == "ARG" and "=" in a)
    assert PINNED.match(defaults["BASE"])
    for name, argument in instructions:
        if name == "FROM":
            assert argument.split()[0] == "${BASE}"


def test_every_image_of_the_manifests_is_pinned(overlay: Any) -> None:
    for name in overlay.workloads:
        pod = overlay.pod(name)
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert PINNED.match(container["image"]), container["image"]


def test_the_model_is_fetched_with_flags_that_exist(cpu_smoke: Any, root: Path) -> None:
    (fetch,) = cpu_smoke.pod("prefill")["initContainers"]
    python, script = fetch["command"]
    assert python == "python"
    flags = {argument for argument in fetch["args"] if argument.startswith("-")}
    done = subprocess.run(
        [sys.executable, str(root / script), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert all(flag in done.stdout for flag in flags)


def test_the_model_is_where_the_services_look(cpu_smoke: Any) -> None:
    for name in ("router", "prefill", "decode"):
        (fetch,) = cpu_smoke.pod(name)["initContainers"]
        folder = fetch["args"][fetch["args"].index("--directory") + 1]
        model = cpu_smoke.environment(name)["SPLITSERVE_MODEL"]
        assert Path(str(model)).parent == Path(folder)
        mounts = {m["mountPath"]: m for m in cpu_smoke.server(name)["volumeMounts"]}
        assert mounts[folder]["readOnly"] is True
