"""API keys: who may call, and as which tenant."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from splitserve.errors import ConfigError, Unauthenticated

ANONYMOUS = ""
_SCHEME = "bearer "
_SALT_LABEL = b"splitserve-cache-salt-1"


class ApiKeys:
    """Maps a key to its tenant. Keeps only SHA-256 hashes of the keys."""

    def __init__(self, tenant_of_key: Iterable[tuple[str, str]]) -> None:
        """Takes pairs of a key and its tenant."""
        self._entries = [(_hash(key), tenant) for key, tenant in tenant_of_key]

    @classmethod
    def from_file(cls, path: Path) -> ApiKeys:
        """Reads lines `TENANT:KEY`; empty lines and `#` comments are skipped.

        Raises ConfigError if the file cannot be read or a line is not of that form.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api_keys_file: cannot read {path}: {error}") from error
        pairs = []
        for number, raw in enumerate(lines, start=1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            tenant, colon, key = line.partition(":")
            if not colon or not tenant.strip() or not key.strip():
                raise ConfigError(f"api_keys_file: {path}:{number} is not TENANT:KEY")
            pairs.append((key.strip(), tenant.strip()))
        if not pairs:
            raise ConfigError(f"api_keys_file: {path} holds no key")
        return cls(pairs)

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an `authorization` header. Raises Unauthenticated.

        Compares with every entry in constant time, so that timing tells nothing of a key.
        """
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthenticated("send the metadata `authorization: Bearer KEY`")
        presented = _hash(authorization[len(_SCHEME) :].strip())
        found: str | None = None
        for digest, tenant in self._entries:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthenticated("the API key is not known here")
        return found


class OpenAccess:
    """Lets everybody in as one tenant."""

    def tenant(self, authorization: str | None) -> str:
        """The anonymous tenant, whatever was sent."""
        return ANONYMOUS


def cache_salt(tenant: str, *, shared: bool) -> bytes:
    """What keeps a tenant's KV blocks apart from others'. Equal on every router.

    With `shared` all tenants have the same one and so share what is cached.
    """
    return hmac.digest(_SALT_LABEL, b"" if shared else b"tenant\0" + tenant.encode(), "sha256")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
