"""Who may talk to whom: mutual TLS, or plaintext on loopback."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from splitserve.errors import ConfigError
from splitserve.rpc.options import Options


@dataclass(frozen=True)
class TlsConfig:
    """PEM files for both roles of a process: it shows `cert_file` and trusts only `ca_file`.

    A server is known by `server_name`, or by the host that was dialled if that is None. Where
    addresses come and go no certificate can list them.
    """

    cert_file: str
    key_file: str
    ca_file: str
    server_name: str | None = None

    def server_credentials(self) -> grpc.ServerCredentials:
        """Asks every client for a certificate of `ca_file`. Raises ConfigError."""
        return grpc.ssl_server_credentials(
            [(_read("tls_key", self.key_file), _read("tls_cert", self.cert_file))],
            root_certificates=_read("tls_ca", self.ca_file),
            require_client_auth=True,
        )

    def channel_options(self) -> Options:
        """Channel arguments that go with the credentials."""
        if self.server_name is None:
            return []
        return [("grpc.ssl_target_name_override", self.server_name)]

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Shows `cert_file` and checks the server's name against its own. Raises ConfigError."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read("tls_ca", self.ca_file),
            private_key=_read("tls_key", self.key_file),
            certificate_chain=_read("tls_cert", self.cert_file),
        )


def check_bind(host: str, tls: TlsConfig | None, insecure: bool) -> None:
    """Raises ConfigError if `host` is off loopback and neither TLS nor `insecure` is set."""
    if tls is None and not insecure and not is_loopback(host):
        raise ConfigError(
            f"bind: {host} is reachable from other machines and TLS is not set up; "
            "set --tls-cert, --tls-key and --tls-ca, or --insecure, or bind to 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`. A name other than localhost is not resolved."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` in two. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    unbracketed = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bare_v6 = ":" in host and unbracketed == host
    if not colon or not unbracketed or bare_v6 or not port.isascii() or not port.isdigit():
        raise ConfigError(f"bind: {address!r} is not HOST:PORT; an IPv6 host goes in brackets")
    if int(port) > 65535:
        raise ConfigError(f"bind: port {port} is over 65535")
    return unbracketed, int(port)


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {path!r}: {error.strerror}") from error
