"""Who may talk to whom, between real processes; and that no format that carries code is read."""

from __future__ import annotations

import ast
import asyncio
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme

import services
import splitserve
from splitserve.engine.fake import expected_tokens
from splitserve.rpc.channel import open_channel
from splitserve.rpc.tls import TlsConfig
from splitserve.v1 import inference_pb2_grpc

from ..suite import Service, Suite
from .front_door import PROMPT, ids_of, tokens

TIERS = ("router", "prefill", "decode", "kvstore")


@pytest.fixture
def tls(tmp_path: Path) -> TlsConfig:
    """One certificate for all; each service shows it and trusts its authority only."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    cert, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(ca)
    return TlsConfig(str(cert), str(key), str(ca))


@dataclass(frozen=True)
class SecureService:
    """A process that speaks TLS on its port, and plaintext where probes ask for its health."""

    tier: str
    address: str
    probed: Service


class SecureSuite:
    """Starts services with TLS. They are stopped with the suite that they are part of."""

    def __init__(self, suite: Suite, tls: TlsConfig) -> None:
        self._suite = suite
        files = {"--tls-cert": tls.cert_file, "--tls-key": tls.key_file, "--tls-ca": tls.ca_file}
        self._flags = [part for pair in files.items() for part in pair]

    async def start(self, tier: str, *flags: str) -> SecureService:
        port, probes, metrics = (self._suite.free_port() for _ in range(3))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"services.{tier}", "--port", str(port)),
            *("--health-port", str(probes), "--metrics-port", str(metrics)),
            *self._flags,
            *flags,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        probed = Service(tier, probes, metrics, process)
        self._suite.services.append(probed)
        await probed.wait_health()
        return SecureService(tier, f"127.0.0.1:{port}", probed)


async def test_mutual_tls_between_all_four_services(suite: Suite, tls: TlsConfig) -> None:
    secure = SecureSuite(suite, tls)
    store = await secure.start("kvstore", "--arena-bytes", str(1 << 24))
    worker = ("--engine", "fake", "--kvstore", store.address)
    prefill, decode = await asyncio.gather(
        secure.start("prefill", *worker), secure.start("decode", *worker)
    )
    router = await secure.start(
        "router",
        *("--prefill", prefill.address, "--decode", decode.address),
        *("--skip-tokenizer-init", "--model-name", "fake"),
    )
    async with open_channel(router.address, tls=tls) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        messages = [message async for message in stub.Generate(tokens(), timeout=10)]
        assert ids_of(messages) == expected_tokens(PROMPT, 4)
    moved = (await decode.probed.metrics())["splitserve_kv_transfer_bytes_total"]
    assert moved > 0, "the prompt went through the store"
    authority = await asyncio.to_thread(Path(tls.ca_file).read_bytes)
    for service in (router, prefill, decode, store):
        assert await refused(grpc.aio.insecure_channel(service.address)), service.tier
        trusting = grpc.ssl_channel_credentials(root_certificates=authority)
        assert await refused(grpc.aio.secure_channel(service.address, trusting)), service.tier


async def refused(channel: grpc.aio.Channel) -> bool:
    """Whether a caller with no certificate gets no answer."""
    async with channel:
        try:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


@pytest.mark.parametrize("tier", TIERS)
async def test_plaintext_off_loopback_must_be_asked_for(tier: str) -> None:
    needed = {"router": ["--skip-tokenizer-init"], "kvstore": []}.get(tier, ["--engine", "fake"])
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{tier}", "--host", "0.0.0.0", *needed),
        *("--port", "0", "--metrics-port", "0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2
    assert stdout == b""
    [line] = stderr.decode().splitlines()
    assert "--insecure" in line
    assert "--tls-cert" in line


CODE_CARRIERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
CODE_RUNNERS = {"eval", "exec", "compile", "__import__"}
CODE_LOADERS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("torch", "jit")}


def sources() -> Iterator[Path]:
    for package in (splitserve, services):
        for folder in package.__path__:
            yield from Path(folder).rglob("*.py")


def carries_code(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ({alias.name.split(".")[0] for alias in names} & CODE_CARRIERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in CODE_CARRIERS:
                yield module
            case ast.Call(func=ast.Name(id=name)) if name in CODE_RUNNERS:
                yield name
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                if (module, name) in CODE_LOADERS:
                    yield f"{module}.{name}"


def test_no_format_that_carries_code_is_read() -> None:
    found = {
        (path.name, what)
        for path in sources()
        for what in carries_code(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set()


def test_the_search_finds_what_it_looks_for() -> None:
    bad = "import pickle\nfrom yaml import load\nx = eval('1')\ntorch.load(f)\n"
    assert set(carries_code(ast.parse(bad))) == {"pickle", "yaml", "eval", "torch.load"}
