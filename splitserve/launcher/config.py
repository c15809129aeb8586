"""What a suite on one machine consists of, as the command lines of its processes."""

from __future__ import annotations

import contextlib
import itertools
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field

from splitserve.engine.factory import GPU_MEMORY_UTILIZATION
from splitserve.engine.threads import share_of_cores
from splitserve.errors import ConfigError
from splitserve.model_name import default_model_name
from splitserve.weights.checkpoint import read_config

# The arithmetic model of tests has a vocabulary of its own, and no checkpoint to read it from.
FAKE_VOCAB_SIZE = 1000
FAKE_CONTEXT_TOKENS = 4096
FAKE_MODEL_NAME = "fake"

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class SuiteConfig:
    """Port 0 is a free one; further workers of a tier always take free ones.

    `flags` go to the services of a tier (router, prefill, decode, kvstore), as their `--help`
    lists them.
    """

    model: str = ""
    model_name: str = ""
    load_format: str = "auto"
    """dummy: random weights of the shape that the model's config.json says; token ids only."""
    engine: str = "torch"
    tensor_parallel_size: int = 1
    """Ranks of each worker, processes of this machine."""
    host: str = LOOPBACK
    """Where the router listens; the others always on loopback."""
    insecure: bool = False
    """Let the router listen in plaintext off loopback."""
    router_port: int = 0
    prefill_port: int = 0
    decode_port: int = 0
    kvstore_port: int = 0
    fixed_metrics_ports: bool = False
    """Metrics of each tier's first process on 9091 to 9094, or else on free ports."""
    devices: tuple[str, ...] = ()
    """Workers take these in turn, prefill workers first; without any, what their settings say."""
    num_prefill: int = 1
    """0: decode workers compute prompts, too."""
    num_decode: int = 1
    otlp_endpoint: str | None = None
    log_level: str = "info"
    log_format: str = "text"
    drain_grace_s: float = 5.0
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine == "torch" and not self.model:
            raise ConfigError("model: name a checkpoint, a Hugging Face directory or a .gguf file")
        if self.tensor_parallel_size > 1 and self.engine != "torch":
            raise ConfigError(
                f"tensor_parallel_size {self.tensor_parallel_size}: the fake engine has no ranks"
            )
        if self.num_prefill < 0 or self.num_decode < 1:
            raise ConfigError("workers: decode needs at least one, prefill none or more")

    @property
    def served_name(self) -> str:
        """The name that clients ask for."""
        if self.model_name:
            return self.model_name
        if self.engine == "fake":
            return FAKE_MODEL_NAME
        return default_model_name(self.model)


@dataclass(frozen=True)
class ServicePlan:
    """One process: what it is called, where it listens, how it is started."""

    name: str
    tier: str
    address: str
    command: tuple[str, ...]


def plan(config: SuiteConfig) -> list[ServicePlan]:
    """Every process in the order of dependence: store, workers, router."""
    spare = iter(free_ports(2 + config.num_prefill + config.num_decode))

    def address(port: int) -> str:
        return f"{LOOPBACK}:{port or next(spare)}"

    kvstore = address(config.kvstore_port)
    prefills = [address(config.prefill_port if i == 0 else 0) for i in range(config.num_prefill)]
    decodes = [address(config.decode_port if i == 0 else 0) for i in range(config.num_decode)]
    router = address(config.router_port)
    worker = ("--kvstore", kvstore, *_engine_flags(config))
    # Decoding is bound by memory, so that half of the cores serve it almost as well as all, and
    # its steps are not held up by a prompt that is computed beside it.
    threads = max(1, share_of_cores() // config.tensor_parallel_size)
    decode = (*worker, "--threads", str(threads))
    on = itertools.cycle(_devices(config))
    targets = ("--prefill", ",".join(prefills) or "none", "--decode", ",".join(decodes))
    return [
        _service(config, "kvstore", 0, kvstore, ()),
        *(
            _service(config, "prefill", i, at, (*worker, *next(on)))
            for i, at in enumerate(prefills)
        ),
        *(_service(config, "decode", i, at, (*decode, *next(on))) for i, at in enumerate(decodes)),
        _service(config, "router", 0, router, (*targets, *_router_flags(config))),
    ]


def _devices(config: SuiteConfig) -> list[tuple[str, ...]]:
    """Flags of the workers in turn. Those that share a GPU share its memory."""
    if not config.devices:
        return [()]
    workers = config.num_prefill + config.num_decode
    taken = Counter(itertools.islice(itertools.cycle(config.devices), workers))
    flags = list[tuple[str, ...]]()
    for device in config.devices:
        own: tuple[str, ...] = ("--device", device)
        if device != "cpu" and taken[device] > 1:
            own += ("--gpu-memory-utilization", f"{GPU_MEMORY_UTILIZATION / taken[device]:.3f}")
        flags.append(own)
    return flags


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _service(
    config: SuiteConfig, tier: str, index: int, address: str, flags: tuple[str, ...]
) -> ServicePlan:
    command = [
        *(sys.executable, "-m", f"services.{tier}", "--die-with-parent"),
        *("--host", config.host if tier == "router" else LOOPBACK),
        *("--port", address.rpartition(":")[2]),
        *("--log-level", config.log_level, "--log-format", config.log_format),
        *("--drain-grace-s", str(config.drain_grace_s)),
    ]
    if index or not config.fixed_metrics_ports:
        command += ["--metrics-port", "0"]
    if config.insecure and tier == "router":
        command.append("--insecure")
    if config.otlp_endpoint:
        command += ["--otlp-endpoint", config.otlp_endpoint]
    name = tier if index == 0 else f"{tier}-{index}"
    # What a user passes comes last, so that it wins.
    return ServicePlan(name, tier, address, (*command, *flags, *config.flags.get(tier, ())))


def _engine_flags(config: SuiteConfig) -> tuple[str, ...]:
    flags = (
        *("--engine", config.engine, "--model-name", config.served_name),
        *("--tensor-parallel-size", str(config.tensor_parallel_size)),
    )
    if not config.model:
        return flags
    return (*flags, "--model", config.model, "--load-format", config.load_format)


def _router_flags(config: SuiteConfig) -> tuple[str, ...]:
    name = ("--model-name", config.served_name)
    if config.engine == "torch" and config.load_format == "auto":
        return (*name, "--model", config.model)
    vocab, context = FAKE_VOCAB_SIZE, FAKE_CONTEXT_TOKENS
    if config.engine == "torch":
        shape = read_config(config.model)
        vocab, context = shape.vocab_size, shape.max_context_tokens
    limits = ("--vocab-size", str(vocab), "--max-context-tokens", str(context))
    return (*name, "--skip-tokenizer-init", *limits)
