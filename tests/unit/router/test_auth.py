"""Keys, tenants and the salts that keep their caches apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.router.auth import ANONYMOUS, ApiKeys, OpenAccess, cache_salt
from splitserve.errors import ConfigError, Unauthenticated


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# comment\n\nred: key:with:colons \nblue:k2\n")
    keys = ApiKeys.from_file(path)
    assert keys.tenant("Bearer key:with:colons") == "red"
    assert keys.tenant("bearer  k2 ") == "blue"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer k", "Basic k2", "k2"])
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        ApiKeys([("k2", "blue")]).tenant(header)


@pytest.mark.parametrize("text", ["", "# only\n", "nocolon\n", ":key\n", "tenant:\n"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match="api_keys_file"):
        ApiKeys.from_file(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        ApiKeys.from_file(tmp_path / "none")


def test_keys_are_not_kept() -> None:
    keys = ApiKeys([("very-secret", "blue")])
    assert "very-secret" not in repr(vars(keys))


def test_open_access() -> None:
    assert OpenAccess().tenant(None) == ANONYMOUS


def test_salts() -> None:
    assert cache_salt("a", shared=False) != cache_salt("b", shared=False)
    assert cache_salt("a", shared=True) == cache_salt("b", shared=True)
    assert cache_salt("", shared=False) != cache_salt("", shared=True)
    # Routers of one deployment must agree on it, also over their restarts.
    assert cache_salt("a", shared=False) == cache_salt("a", shared=False)
    assert len(cache_salt("a", shared=False)) == 32
