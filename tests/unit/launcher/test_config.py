"""Command lines of the services."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve.errors import ConfigError
from splitserve.launcher.config import ServicePlan, SuiteConfig, free_ports, plan


def flag(service: ServicePlan, name: str) -> str:
    return service.command[service.command.index(name) + 1]


def test_every_service_knows_the_others():
    config = SuiteConfig(
        model="/m/tiny.gguf",
        router_port=1001,
        prefill_port=1002,
        decode_port=1003,
        kvstore_port=1004,
        num_prefill=2,
    )
    kvstore, first, second, decode, router = plan(config)
    assert [s.name for s in (kvstore, first, second, decode, router)] == [
        *("kvstore", "prefill", "prefill-1", "decode", "router"),
    ]
    assert kvstore.address == flag(first, "--kvstore") == flag(decode, "--kvstore")
    assert (first.address, decode.address) == ("127.0.0.1:1002", "127.0.0.1:1003")
    assert flag(router, "--prefill") == f"127.0.0.1:1002,{second.address}"
    assert flag(router, "--decode") == "127.0.0.1:1003"
    names = {flag(s, "--model-name") for s in (first, second, decode, router)}
    assert names == {"tiny"}
    assert all("--die-with-parent" in s.command for s in plan(config))


def test_only_the_router_leaves_loopback():
    config = SuiteConfig(engine="fake", host="0.0.0.0", insecure=True)
    hosts = {s.tier: flag(s, "--host") for s in plan(config)}
    assert hosts == {
        "kvstore": "127.0.0.1",
        "prefill": "127.0.0.1",
        "decode": "127.0.0.1",
        "router": "0.0.0.0",
    }
    assert [s.tier for s in plan(config) if "--insecure" in s.command] == ["router"]


def test_metrics_ports_are_free_ones_beyond_the_first_of_a_tier():
    fixed = plan(SuiteConfig(engine="fake", fixed_metrics_ports=True, num_decode=2))
    assert [s.name for s in fixed if "--metrics-port" in s.command] == ["decode-1"]
    free = plan(SuiteConfig(engine="fake"))
    assert all(flag(s, "--metrics-port") == "0" for s in free)


def test_flags_of_a_tier_come_last():
    config = SuiteConfig(engine="fake", flags={"decode": ("--max-batch", "3")})
    for service in plan(config):
        assert (service.command[-2:] == ("--max-batch", "3")) is (service.tier == "decode")


@pytest.mark.parametrize(
    ("model", "name"),
    [("/m/Llama-3.Q4.gguf", "Llama-3.Q4"), ("/m/llama.v1/", "llama.v1"), ("llama", "llama")],
)
def test_the_name_is_the_checkpoints(model: str, name: str):
    assert SuiteConfig(model=model).served_name == name
    assert SuiteConfig(model=model, model_name="mine").served_name == "mine"


def test_workers_take_the_devices_in_turn():
    config = SuiteConfig(engine="fake", num_decode=2, devices=("cuda:0", "cuda:1"))
    commands = {each.name: each.command for each in plan(config)}
    on = {name: c[c.index("--device") + 1] for name, c in commands.items() if "--device" in c}
    assert on == {"prefill": "cuda:0", "decode": "cuda:1", "decode-1": "cuda:0"}
    shares = {n: "--gpu-memory-utilization" in command for n, command in commands.items()}
    assert [shares[name] for name in ("prefill", "decode-1", "decode")] == [True, True, False]


def test_two_workers_of_one_gpu_share_its_memory():
    workers = plan(SuiteConfig(engine="fake", devices=("cuda",)))[1:3]
    assert [flag(each, "--gpu-memory-utilization") for each in workers] == ["0.450", "0.450"]


def test_the_router_of_random_weights_takes_token_ids(tmp_path: Path):
    shape = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64}
    shape |= {"intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    shape |= {"vocab_size": 200, "max_position_embeddings": 256, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = SuiteConfig(model=str(tmp_path), load_format="dummy")
    commands = {each.name: each.command for each in plan(config)}
    assert "--skip-tokenizer-init" in commands["router"]
    assert commands["router"][commands["router"].index("--vocab-size") + 1] == "200"
    assert "--model" not in commands["router"]
    assert commands["decode"][commands["decode"].index("--load-format") + 1] == "dummy"


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="model"):
        SuiteConfig()
    with pytest.raises(ConfigError, match="at least one"):
        SuiteConfig(engine="fake", num_decode=0)
    with pytest.raises(ConfigError, match="at least one"):
        SuiteConfig(engine="fake", num_prefill=-1)


def test_free_ports_differ():
    assert len(set(free_ports(20))) == 20
