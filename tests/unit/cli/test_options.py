"""Flags as objects."""

from __future__ import annotations

import argparse

import pytest

from splitserve.cli.options import (
    add_client_flags,
    add_sampling_flags,
    api_key,
    check_target,
    sampling_params,
    tls_config,
)
from splitserve.errors import ConfigError
from splitserve.rpc.tls import TlsConfig
from splitserve.sampling import SamplingParams


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    add_client_flags(parser)
    return parser.parse_args(arguments)


def test_no_flag_is_every_default():
    assert sampling_params(parse()) == SamplingParams()


def test_every_field_has_its_flag():
    given = parse(
        *("--temperature", "0", "--top-p", "0.5", "--top-k", "7", "--min-p", "0.25"),
        *("--repetition-penalty", "1.5", "--presence-penalty", "-1", "--frequency-penalty", "2"),
        *("--seed", "9", "--stop", "a", "--stop", "b", "--stop-token-ids", "3"),
        *("--max-tokens", "11", "--min-tokens", "2", "--ignore-eos", "--logprobs", "0"),
        *("--n", "4"),
    )
    assert sampling_params(given) == SamplingParams(
        temperature=0.0,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=2.0,
        seed=9,
        stop=("a", "b"),
        stop_token_ids=(3,),
        max_tokens=11,
        min_tokens=2,
        ignore_eos=True,
        logprobs=0,
        n=4,
    )


def test_tls_is_all_or_nothing():
    assert tls_config(parse()) is None
    whole = parse("--tls-cert", "c", "--tls-key", "k", "--tls-ca", "a")
    assert tls_config(whole) == TlsConfig("c", "k", "a")
    with pytest.raises(ConfigError):
        tls_config(parse("--tls-cert", "c"))


def test_the_key_comes_from_the_flag_or_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SPLITSERVE_API_KEY", raising=False)
    assert api_key(parse()) is None
    monkeypatch.setenv("SPLITSERVE_API_KEY", "from-environment")
    assert api_key(parse()) == "from-environment"
    assert api_key(parse("--api-key", "from-flag")) == "from-flag"


@pytest.mark.parametrize("good", ["127.0.0.1:1", "[::1]:80", "router:50051", "dns:///r:1"])
def test_addresses_that_are_taken(good: str):
    check_target(good)


@pytest.mark.parametrize("bad", ["", "router", "router:", ":1", "router:x", "router:70000"])
def test_addresses_that_are_refused(bad: str):
    with pytest.raises(ConfigError, match="--target"):
        check_target(bad)
