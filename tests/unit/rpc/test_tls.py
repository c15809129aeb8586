from __future__ import annotations

from pathlib import Path

import grpc
import pytest
import trustme

from splitserve.errors import ConfigError
from splitserve.rpc.channel import open_channel
from splitserve.rpc.server import RpcServer
from splitserve.rpc.tls import TlsConfig, is_loopback, split_address

SOON_S = 5.0


def _issue(ca: trustme.CA, folder: Path, name: str, trust: trustme.CA | None = None) -> TlsConfig:
    folder.mkdir(exist_ok=True)
    certificate = ca.issue_cert(name)
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for index, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(folder / "cert.pem", append=index > 0)
    (trust or ca).cert_pem.write_to_path(folder / "ca.pem")
    return TlsConfig(*(str(folder / f"{part}.pem") for part in ("cert", "key", "ca")))


async def _call(address: str, tls: TlsConfig | None) -> grpc.StatusCode:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with open_channel(address, tls=tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        try:
            await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=SOON_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


async def test_both_ends_show_and_check_certificates(ca: trustme.CA, tmp_path: Path) -> None:
    stranger = trustme.CA()
    server_tls = _issue(ca, tmp_path / "server", "127.0.0.1")
    server = RpcServer("secure", "127.0.0.1:0", tls=server_tls)
    address = f"127.0.0.1:{await server.start([])}"
    try:
        good = _issue(ca, tmp_path / "client", "client.test")
        assert await _call(address, good) is grpc.StatusCode.OK
        unsigned = _issue(stranger, tmp_path / "stranger", "client.test", trust=ca)
        assert await _call(address, unsigned) is grpc.StatusCode.UNAVAILABLE
        distrusting = _issue(ca, tmp_path / "distrusting", "client.test", trust=stranger)
        assert await _call(address, distrusting) is grpc.StatusCode.UNAVAILABLE
        assert await _call(address, None) is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop()


async def test_server_of_another_name_is_not_trusted(ca: trustme.CA, tmp_path: Path) -> None:
    server = RpcServer("other", "127.0.0.1:0", tls=_issue(ca, tmp_path / "server", "other.test"))
    address = f"127.0.0.1:{await server.start([])}"
    client = _issue(ca, tmp_path / "client", "client.test")
    assert await _call(address, client) is grpc.StatusCode.UNAVAILABLE
    await server.stop()


async def test_client_without_a_certificate_is_refused(ca: trustme.CA, tmp_path: Path) -> None:
    server = RpcServer("secure", "127.0.0.1:0", tls=_issue(ca, tmp_path / "server", "127.0.0.1"))
    address = f"127.0.0.1:{await server.start([])}"
    trusting = grpc.ssl_channel_credentials(root_certificates=ca.cert_pem.bytes())
    async with grpc.aio.secure_channel(address, trusting) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=SOON_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop()


async def test_unreadable_file_is_named(ca: trustme.CA, tmp_path: Path) -> None:
    tls = TlsConfig("/none/cert.pem", "/none/key.pem", "/none/ca.pem")
    with pytest.raises(ConfigError, match=r"tls_ca: cannot read '/none/ca.pem'"):
        open_channel("127.0.0.1:1", tls=tls)
    server = RpcServer("secure", "127.0.0.1:0", tls=tls)
    with pytest.raises(ConfigError, match="tls_key"):
        await server.start([])


async def test_files_that_are_no_certificates_are_refused(tmp_path: Path) -> None:
    for part in ("cert", "key", "ca"):
        (tmp_path / f"{part}.pem").write_text("not a certificate")
    tls = TlsConfig(*(str(tmp_path / f"{part}.pem") for part in ("cert", "key", "ca")))
    server = RpcServer("secure", "127.0.0.1:0", tls=tls)
    with pytest.raises(ConfigError):
        await server.start([])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "localhost.example.org", "", "127.1"]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_addresses() -> None:
    assert split_address("127.0.0.1:5") == ("127.0.0.1", 5)
    assert split_address("[::1]:65535") == ("::1", 65535)
