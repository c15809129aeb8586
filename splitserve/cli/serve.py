"""`splitserve serve`: the four services in the foreground."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from splitserve.cli.options import add_precision_flags, not_negative, positive, positive_float
from splitserve.launcher import LocalSuite, StopSignals, SuiteConfig
from splitserve.launcher.suite import START_TIMEOUT_S

EPILOG = """
A setting that is not listed here is set through the environment: SPLITSERVE_MAX_QUEUE=64 is
--max-queue of every service that has it, as `python -m services.decode --help` lists them.
"""
_ENGINE_FLAGS = (
    *("dtype", "threads", "pool_bytes", "max_batch", "max_step_tokens"),
    *("max_context_tokens", "transport", "quantization", "kv_dtype", "gpu_memory_utilization"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="run the four services on this machine",
        description="Run router, prefill, decode and kvstore as processes until Ctrl-C.",
        epilog=EPILOG,
    )
    parser.add_argument("--model", default="", metavar="PATH", help="checkpoint to serve")
    parser.add_argument("--model-name", default="", help="name that clients ask for")
    parser.add_argument(
        "--engine", choices=("torch", "fake"), default="torch", help="fake is for tests"
    )
    parser.add_argument(
        "--prefill-workers",
        type=not_negative,
        default=1,
        metavar="N",
        help="0: decode workers compute prompts, too",
    )
    parser.add_argument("--decode-workers", type=positive, default=1, metavar="N")
    _add_network_flags(parser)
    _add_engine_flags(parser)
    parser.add_argument("--otlp-endpoint", metavar="URL", help="where traces go")
    parser.add_argument("--log-dir", type=Path, help="a file a process; default: all to stderr")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="warning"
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--drain-grace-s", type=float, default=5.0, help="time that open requests get at the end"
    )
    parser.add_argument("--start-timeout-s", type=positive_float, default=START_TIMEOUT_S)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serves until a signal. Raises what a service ended with."""
    config = _config(options)
    if options.log_dir:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    with StopSignals() as signals, LocalSuite(config, signals, options.log_dir) as suite:
        _start(suite, config, options.start_timeout_s)
        suite.wait()
    return 0


def _start(suite: LocalSuite, config: SuiteConfig, timeout_s: float) -> None:
    total = 2 + config.num_prefill + config.num_decode
    with tqdm(total=total, desc="starting", unit="service", leave=False, disable=None) as bar:
        suite.start(timeout_s, on_ready=lambda plan: bar.update())
    print(f"serving {config.served_name} on {suite.target}; Ctrl-C stops", flush=True)
    print(
        f"try: splitserve generate --target {suite.target} --prompt 'Once upon a time'",
        file=sys.stderr,
    )


def _config(options: argparse.Namespace) -> SuiteConfig:
    worker = [
        part
        for name in _ENGINE_FLAGS
        if (value := getattr(options, name)) is not None
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    if options.deterministic:
        worker.append("--deterministic")
    router = ["--api-keys-file", options.api_keys_file] if options.api_keys_file else []
    store = ["--arena-bytes", str(options.arena_bytes)] if options.arena_bytes else []
    return SuiteConfig(
        model=options.model,
        model_name=options.model_name,
        load_format=options.load_format,
        devices=tuple(options.device.split(",")) if options.device else (),
        engine=options.engine,
        tensor_parallel_size=options.tensor_parallel_size or 1,
        host=options.host,
        insecure=options.insecure,
        router_port=options.port,
        prefill_port=options.prefill_port,
        decode_port=options.decode_port,
        kvstore_port=options.kvstore_port,
        fixed_metrics_ports=not options.free_metrics_ports,
        num_prefill=options.prefill_workers,
        num_decode=options.decode_workers,
        otlp_endpoint=options.otlp_endpoint,
        log_level=options.log_level,
        log_format=options.log_format,
        drain_grace_s=options.drain_grace_s,
        flags={
            "router": tuple(router),
            "prefill": tuple(worker),
            "decode": tuple(worker),
            "kvstore": tuple(store),
        },
    )


def _add_network_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network (port 0 is a free one)")
    group.add_argument("--host", default="127.0.0.1", help="where the router listens")
    group.add_argument("--insecure", action="store_true", help="allow a --host off loopback")
    group.add_argument("--port", type=int, default=50051, help="router (default: %(default)s)")
    group.add_argument("--prefill-port", type=int, default=50052, metavar="PORT")
    group.add_argument("--decode-port", type=int, default=50053, metavar="PORT")
    group.add_argument("--kvstore-port", type=int, default=50054, metavar="PORT")
    group.add_argument("--free-metrics-ports", action="store_true", help="instead of 9091 to 9094")
    group.add_argument("--api-keys-file", metavar="FILE", help="lines of TENANT:KEY")


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights of the shape that config.json says",
    )
    group.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    group.add_argument(
        "--gpu-memory-utilization", metavar="X", help="share of a GPU's memory for a worker"
    )
    group.add_argument("--device", help="cpu, cuda, or cuda:0,cuda:1,… for the workers in turn")
    add_precision_flags(group)
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits in any batch and topology"
    )
    group.add_argument("--threads", type=int, metavar="N", help="of each rank")
    group.add_argument("--pool-bytes", type=positive, metavar="N", help="KV pool of each rank")
    group.add_argument("--max-batch", type=positive, metavar="N", help="sequences in one step")
    group.add_argument("--max-step-tokens", type=positive, metavar="N", help="tokens in one step")
    group.add_argument("--max-context-tokens", type=positive, metavar="N", help="longest context")
    group.add_argument("--arena-bytes", type=positive, metavar="N", help="memory of the KV store")
    group.add_argument(
        "--transport", choices=("auto", "device", "shm", "grpc"), help="of KV blocks"
    )
