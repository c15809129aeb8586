"""A worker of several nodes: its ranks find each other, and nobody else finds them."""

from __future__ import annotations

from typing import Any

from splitserve.parallel.rendezvous import ParallelSettings, read_parallel_config

POD_INDEX = "apps.kubernetes.io/pod-index"


def _settings(rendered: Any, node: int) -> ParallelSettings:
    environment = rendered.environment("decode")
    return ParallelSettings(
        tensor_parallel_size=int(environment["SPLITSERVE_TENSOR_PARALLEL_SIZE"]),
        nnodes=int(environment["SPLITSERVE_NNODES"]),
        node_rank=node,
        master_addr=environment["SPLITSERVE_MASTER_ADDR"],
        master_port=int(environment["SPLITSERVE_MASTER_PORT"]),
    )


def test_the_pods_are_the_nodes_of_one_group(gpu_two_nodes: Any) -> None:
    spec = gpu_two_nodes.workloads["decode"]["spec"]
    assert gpu_two_nodes.workloads["decode"]["kind"] == "StatefulSet"
    nodes = [
        read_parallel_config(_settings(gpu_two_nodes, node), {}) for node in range(spec["replicas"])
    ]
    assert [rank for node in nodes for rank in node.node_ranks] == list(range(nodes[0].size))
    gpus = gpu_two_nodes.server("decode")["resources"]["limits"]["nvidia.com/gpu"]
    assert all(node.local_size == int(gpus) for node in nodes)
    (variable,) = [
        each
        for each in gpu_two_nodes.server("decode")["env"]
        if each["name"] == "SPLITSERVE_NODE_RANK"
    ]
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == f"metadata.labels['{POD_INDEX}']"


def test_the_pods_start_and_change_together_on_different_nodes(gpu_two_nodes: Any) -> None:
    spec = gpu_two_nodes.workloads["decode"]["spec"]
    assert spec["podManagementPolicy"] == "Parallel"
    assert spec["updateStrategy"] == {"type": "OnDelete"}
    assert "strategy" not in spec
    affinity = gpu_two_nodes.pod("decode")["affinity"]["podAntiAffinity"]
    (rule,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    labels = gpu_two_nodes.labels("decode")
    assert rule["labelSelector"]["matchLabels"].items() <= labels.items()


def test_rank_0_is_found_before_it_is_ready(gpu_two_nodes: Any) -> None:
    name = gpu_two_nodes.workloads["decode"]["spec"]["serviceName"]
    service = gpu_two_nodes.one("Service", name)["spec"]
    assert service["publishNotReadyAddresses"] is True
    assert service["clusterIP"] == "None"
    address = gpu_two_nodes.environment("decode")["SPLITSERVE_MASTER_ADDR"]
    assert address == f"decode-0.{name}"


def test_routers_find_rank_0_alone(gpu_two_nodes: Any) -> None:
    selector = gpu_two_nodes.one("Service", "decode")["spec"]["selector"]
    assert selector[POD_INDEX] == "0"


def test_only_ranks_of_the_worker_reach_its_ranks(gpu_two_nodes: Any) -> None:
    policy = gpu_two_nodes.one("NetworkPolicy", "decode-ranks")["spec"]
    own = {"matchLabels": {"app.kubernetes.io/name": "splitserve-decode"}}
    assert policy["podSelector"] == own
    for side, peers in (("ingress", "from"), ("egress", "to")):
        (rule,) = policy[side]
        assert rule[peers] == [{"podSelector": own}]
        assert rule["ports"] == [{"protocol": "TCP", "port": 1024, "endPort": 65535}]


def test_nccl_has_shared_memory(gpu_two_nodes: Any) -> None:
    mounts = {m["mountPath"]: m["name"] for m in gpu_two_nodes.server("decode")["volumeMounts"]}
    volumes = {v["name"]: v for v in gpu_two_nodes.pod("decode")["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
