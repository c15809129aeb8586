"""Flags that several subcommands share."""

from __future__ import annotations

import argparse
import os
from typing import Any, get_args

from splitserve.client import DEFAULT_TIMEOUT_S, Client
from splitserve.engine.factory import Quantization
from splitserve.errors import ConfigError
from splitserve.rpc.tls import TlsConfig, split_address
from splitserve.sampling import SamplingParams

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
API_KEY_VARIABLE = "SPLITSERVE_API_KEY"


def positive(text: str) -> int:
    """A type for argparse: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def not_negative(text: str) -> int:
    """A type for argparse: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def positive_float(text: str) -> float:
    """A type for argparse: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def add_precision_flags(group: argparse._ArgumentGroup) -> None:
    """How weights, keys and values are kept, and over how many ranks. None where not given."""
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="of plain weights, while they are loaded",
    )
    group.add_argument("--kv-dtype", choices=("auto", "fp8", "int8"), help="of keys and values")
    group.add_argument(
        "--tensor-parallel-size", type=positive, metavar="N", help="ranks that share the model"
    )


def precision(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_precision_flags` was given, by the names that `LLM` has for it."""
    names = ("quantization", "kv_dtype", "tensor_parallel_size")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """How to reach a running suite, without --target itself."""
    group = parser.add_argument_group("connection")
    group.add_argument("--api-key", help=f"key to send; default: ${API_KEY_VARIABLE}")
    group.add_argument("--tls-cert", help="PEM file of this client's certificate")
    group.add_argument("--tls-key", help="PEM file of its private key")
    group.add_argument("--tls-ca", help="PEM file of the CA that signed the server's certificate")
    group.add_argument(
        "--timeout",
        type=positive_float,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="deadline of each request (default: %(default)s)",
    )


def api_key(options: argparse.Namespace) -> str | None:
    """The key to send, if any."""
    key: str | None = options.api_key or os.environ.get(API_KEY_VARIABLE) or None
    return key


def tls_config(options: argparse.Namespace) -> TlsConfig | None:
    """TLS as the flags say, None for plaintext. Raises ConfigError for half of it."""
    files = (options.tls_cert, options.tls_key, options.tls_ca)
    if not any(files):
        return None
    if not all(files):
        raise ConfigError("TLS needs all of --tls-cert, --tls-key and --tls-ca")
    return TlsConfig(*files)


def open_client(options: argparse.Namespace) -> Client:
    """A client for --target. Raises ConfigError for a target that is no address."""
    check_target(options.target)
    return Client(options.target, api_key=api_key(options), tls=tls_config(options))


def check_target(target: str) -> None:
    """Raises ConfigError unless `target` is HOST:PORT or has a gRPC scheme such as dns:///."""
    if "://" not in target and not target.startswith("unix:"):
        try:
            split_address(target)
        except ConfigError:
            raise ConfigError(f"--target {target!r} is not HOST:PORT") from None


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Every field of `SamplingParams`, by its name."""
    group = parser.add_argument_group("sampling")
    numbers = {
        "temperature": "0 is greedy (default: 1)",
        "top_p": "smallest set of tokens whose probabilities reach this sum",
        "min_p": "drop tokens less likely than this share of the most likely one",
        "repetition_penalty": "of every token in prompt and output; 1 is off",
        "presence_penalty": "of every token in the output; 0 is off",
        "frequency_penalty": "for each time a token is in the output; 0 is off",
    }
    for name, text in numbers.items():
        group.add_argument(_flag(name), type=float, metavar="X", help=text)
    counts = {
        "top_k": "this many most likely tokens; 0 keeps all",
        "seed": "of the draws; default: a random one",
        "max_tokens": "most output tokens",
        "min_tokens": "fewest output tokens before the end",
        "logprobs": "log-probabilities of this many most likely tokens",
        "n": "how many outputs",
    }
    for name, text in counts.items():
        group.add_argument(_flag(name), type=int, metavar="N", help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before it; repeatable")
    group.add_argument(
        "--stop-token-ids", action="append", type=int, metavar="ID", help="end with it; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end")


def sampling_params(options: argparse.Namespace) -> SamplingParams:
    """What the flags say, defaults elsewhere."""
    names = SamplingParams.__dataclass_fields__
    given = {name: getattr(options, name) for name in names}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
