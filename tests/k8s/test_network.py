"""Who reaches whom: services, ports, network policies and TLS."""

from __future__ import annotations

from itertools import product
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis

TIERS = {
    "router": (50051, 9091),
    "prefill": (50052, 9092),
    "decode": (50053, 9093),
    "kvstore": (50054, 9094),
}
HEADLESS = {"prefill", "decode", "router-headless"}
POD_INDEX = "apps.kubernetes.io/pod-index"


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", "the only operator that this test reads"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def _allowed(rendered: Any, side: str, name: str, peer: str, port: int) -> bool:
    """Whether a policy lets `name` talk to (Egress) or be reached by (Ingress) `peer`."""
    peers_key = "to" if side == "Egress" else "from"
    for policy in rendered.kind("NetworkPolicy"):
        spec = policy["spec"]
        if side not in spec["policyTypes"]:
            continue
        if not _matches(spec["podSelector"], rendered.labels(name)):
            continue
        for rule in spec.get(side.lower(), []):
            if port not in {p["port"] for p in rule["ports"]}:
                continue
            for allowed in rule.get(peers_key, []):
                if "namespaceSelector" in allowed:
                    continue  # other namespaces are looked at below
                if _matches(allowed["podSelector"], rendered.labels(peer)):
                    return True
    return False


def _expected_pairs(rendered: Any) -> set[tuple[str, str, int]]:
    pairs = {
        ("router", "prefill", 50052),
        ("router", "decode", 50053),
        ("router", "kvstore", 50054),
        ("prefill", "kvstore", 50054),
        ("decode", "kvstore", 50054),
        ("kvstore", "redis", 6379),
    }
    if "jaeger" in rendered.workloads:
        pairs |= {(tier, "jaeger", 4317) for tier in TIERS}
    return pairs


def test_only_the_pairs_of_the_design_may_talk(rendered: Any) -> None:
    ports = {50050, 6379, 4317, 16686} | {port for both in TIERS.values() for port in both}
    found = {
        (client, server, port)
        for client, server in product(rendered.workloads, repeat=2)
        for port in ports
        if _allowed(rendered, "Egress", client, server, port)
        and _allowed(rendered, "Ingress", server, client, port)
    }
    assert found == _expected_pairs(rendered)


def test_all_else_is_denied(rendered: Any) -> None:
    deny = rendered.one("NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_who_comes_from_other_namespaces(rendered: Any) -> None:
    found = {
        (policy["metadata"]["name"], str(peer["namespaceSelector"]), port["port"])
        for policy in rendered.kind("NetworkPolicy")
        for rule in policy["spec"].get("ingress", [])
        for peer in rule["from"]
        if "namespaceSelector" in peer
        for port in rule["ports"]
    }
    monitoring = "{'matchLabels': {'kubernetes.io/metadata.name': 'monitoring'}}"
    assert found == {("metrics", monitoring, "metrics"), ("router", "{}", 50051)}
    (peer,) = rendered.one("NetworkPolicy", "router")["spec"]["ingress"][0]["from"]
    assert peer["podSelector"] == {"matchLabels": {"splitserve/client": "true"}}


def test_everyone_may_ask_dns(rendered: Any) -> None:
    spec = rendered.one("NetworkPolicy", "dns")["spec"]
    assert spec["podSelector"] == {}
    (rule,) = spec["egress"]
    assert {(p["protocol"], p["port"]) for p in rule["ports"]} == {("UDP", 53), ("TCP", 53)}


def test_only_the_smoke_overlay_may_fetch_from_the_world(cpu_smoke: Any, gpu: Any) -> None:
    def open_rules(rendered: Any) -> set[str]:
        return {
            policy["metadata"]["name"]
            for policy in rendered.kind("NetworkPolicy")
            for rule in policy["spec"].get("egress", [])
            if "to" not in rule
        }

    assert open_rules(cpu_smoke) == {"fetch-model"}
    assert open_rules(gpu) == set()


def test_services_reach_pods(rendered: Any) -> None:
    for service in rendered.kind("Service"):
        # The cluster adds this label, to pods of a StatefulSet.
        selector = {k: v for k, v in service["spec"]["selector"].items() if k != POD_INDEX}
        chosen = [n for n in rendered.workloads if selector.items() <= rendered.labels(n).items()]
        assert len(chosen) == 1, service["metadata"]["name"]
        by_name = {p["name"]: p["containerPort"] for p in rendered.server(chosen[0])["ports"]}
        for port in service["spec"].get("ports", []):
            assert by_name[port["targetPort"]] == port["port"]


def test_ports_are_the_suites(rendered: Any) -> None:
    for name, (grpc_port, metrics_port) in TIERS.items():
        ports = {p["name"]: p["containerPort"] for p in rendered.server(name)["ports"]}
        assert ports == {"grpc": grpc_port, "metrics": metrics_port, "health": 50050}
        annotations = rendered.workloads[name]["spec"]["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert annotations["prometheus.io/port"] == str(metrics_port)


def test_services_are_headless_where_grpc_balances(rendered: Any) -> None:
    headless = {
        service["metadata"]["name"]
        for service in rendered.kind("Service")
        if service["spec"].get("clusterIP") == "None"
    }
    names_for_ranks = {"decode-ranks"} if "two-nodes" in rendered.name else set()
    assert headless == HEADLESS | names_for_ranks
    environment = rendered.environment("router")
    for variable in ("SPLITSERVE_PREFILL", "SPLITSERVE_DECODE"):
        target = urlsplit(environment[variable])
        assert target.scheme == "dns"
        host, port = target.path.lstrip("/").split(":")
        assert host in HEADLESS
        assert rendered.one("Service", host)["spec"]["ports"][0]["port"] == int(port)


def test_workers_use_the_store_of_their_node(rendered: Any) -> None:
    assert rendered.one("Service", "kvstore")["spec"]["internalTrafficPolicy"] == "Local"
    for name in ("prefill", "decode"):
        assert rendered.environment(name)["SPLITSERVE_KVSTORE"] == "kvstore:50054"


def test_a_store_advertises_its_pods_address(rendered: Any) -> None:
    variables = rendered.server("kvstore")["env"]
    names = [variable["name"] for variable in variables]
    # $(POD_IP) is only filled in from a variable that stands before.
    assert names.index("POD_IP") < names.index("SPLITSERVE_ADVERTISE_ADDRESS")
    pod_ip = variables[names.index("POD_IP")]
    assert pod_ip["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert rendered.environment("kvstore")["SPLITSERVE_ADVERTISE_ADDRESS"] == "$(POD_IP):50054"


def test_an_overlay_is_mutual_tls_or_says_that_it_is_not(cpu_smoke: Any, gpu: Any) -> None:
    tls = {"SPLITSERVE_TLS_CERT", "SPLITSERVE_TLS_KEY", "SPLITSERVE_TLS_CA"}
    for name in TIERS:
        assert cpu_smoke.environment(name)["SPLITSERVE_INSECURE"] == "true"
        assert not tls & set(cpu_smoke.environment(name))
        environment = gpu.environment(name)
        assert "SPLITSERVE_INSECURE" not in environment
        assert environment["SPLITSERVE_TLS_SERVER_NAME"] == "splitserve"
        assert tls <= set(environment)
        for variable in tls:
            assert str(environment[variable]).startswith("/etc/splitserve/tls/")


def test_tls_reaches_redis(gpu: Any) -> None:
    args = gpu.server("redis")["args"]
    settings = dict(zip(args[::2], args[1::2], strict=True))
    assert settings["--port"] == "0"
    assert settings["--tls-port"] == "6379"
    assert settings["--tls-auth-clients"] == "yes"
    url = gpu.environment("kvstore")["SPLITSERVE_REDIS_URL"]
    assert urlsplit(url).scheme == "rediss"
    assert set(parse_qs(urlsplit(url).query)) == {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
    understood = redis.Redis.from_url(url).connection_pool.connection_kwargs
    assert understood["host"] == "redis"
    assert understood["ssl_certfile"] == "/etc/splitserve/tls/tls.crt"


def test_secrets_are_mounted_where_the_settings_point(gpu: Any) -> None:
    for name in (*TIERS, "redis"):
        mounts = {m["name"]: m for m in gpu.server(name)["volumeMounts"]}
        assert mounts["tls"]["mountPath"] == "/etc/splitserve/tls"
        assert mounts["tls"]["readOnly"] is True
        (volume,) = [v for v in gpu.pod(name)["volumes"] if v["name"] == "tls"]
        assert volume["secret"] == {"secretName": "splitserve-tls", "defaultMode": 0o440}
    keys = gpu.environment("router")["SPLITSERVE_API_KEYS_FILE"]
    mounts = {m["name"]: m["mountPath"] for m in gpu.server("router")["volumeMounts"]}
    assert keys == mounts["api-keys"] + "/api-keys"
