"""What a pod may do, how it is probed, and how it ends."""

from __future__ import annotations

from typing import Any

TIERS = ("router", "prefill", "decode", "kvstore")
HEALTH_PORT = 50050
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def _containers(rendered: Any) -> list[tuple[str, Any]]:
    return [
        (f"{name}/{container['name']}", container)
        for name in rendered.workloads
        for container in (
            *rendered.pod(name).get("initContainers", []),
            *rendered.pod(name)["containers"],
        )
    ]


def test_the_tiers_are_there(rendered: Any) -> None:
    assert set(rendered.workloads) >= {*TIERS, "redis"}
    assert rendered.workloads["kvstore"]["kind"] == "DaemonSet"


def test_pods_run_as_nobody_special(rendered: Any) -> None:
    for name in rendered.workloads:
        pod = rendered.pod(name)
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] >= 100, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["serviceAccountName"] == "splitserve", name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
    assert rendered.one("ServiceAccount", "splitserve")["automountServiceAccountToken"] is False


def test_containers_are_locked_down(rendered: Any) -> None:
    for name, container in _containers(rendered):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False, name
        assert context["readOnlyRootFilesystem"] is True, name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert not {"privileged", "runAsUser", "runAsNonRoot"} & set(context), name


def test_containers_have_requests_and_limits(rendered: Any) -> None:
    for name, container in _containers(rendered):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]), name
        assert {"cpu", "memory"} <= set(resources["limits"]), name
        assert _bytes(resources["requests"]["memory"]) <= _bytes(resources["limits"]["memory"])


def test_written_paths_are_volumes(rendered: Any) -> None:
    """With a read-only root, what a container writes must be mounted, and mounts must exist."""
    for name in rendered.workloads:
        volumes = {volume["name"] for volume in rendered.pod(name)["volumes"]}
        for container in rendered.pod(name)["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name
    for name in TIERS:
        assert "/tmp" in {m["mountPath"] for m in rendered.server(name)["volumeMounts"]}


def test_only_the_shm_component_touches_the_node(cpu_smoke: Any, base: Any, gpu: Any) -> None:
    def host_paths(rendered: Any) -> set[tuple[str, str]]:
        return {
            (name, volume["hostPath"]["path"])
            for name in rendered.workloads
            for volume in rendered.pod(name)["volumes"]
            if "hostPath" in volume
        }

    assert host_paths(base) == host_paths(cpu_smoke) == set()
    assert host_paths(gpu) == {(n, "/run/splitserve") for n in ("prefill", "decode", "kvstore")}
    enforced = "pod-security.kubernetes.io/enforce"
    assert cpu_smoke.one("Namespace", "splitserve")["metadata"]["labels"][enforced] == "restricted"


def test_shared_memory_is_offered_where_the_socket_can_be_reached(rendered: Any) -> None:
    environment = rendered.environment("kvstore")
    if "overlays/gpu" not in rendered.name:
        assert environment["SPLITSERVE_SHARED_MEMORY"] == "false"
        return
    assert environment["SPLITSERVE_SHARED_MEMORY"] == "true"
    socket = environment["SPLITSERVE_HANDLE_SOCKET"]
    for name in ("kvstore", "prefill", "decode"):
        (mount,) = [m for m in rendered.server(name)["volumeMounts"] if m["name"] == "handles"]
        assert socket.startswith(mount["mountPath"] + "/")
        assert mount.get("readOnly", False) is (name != "kvstore")
        assert rendered.pod(name)["securityContext"]["runAsUser"] == 10001, "one user, one socket"


def test_probes_are_grpc_and_name_their_service(rendered: Any) -> None:
    for name in TIERS:
        server = rendered.server(name)
        assert server["readinessProbe"]["grpc"] == {"port": HEALTH_PORT, "service": "readiness"}
        assert server["livenessProbe"]["grpc"] == {"port": HEALTH_PORT, "service": "liveness"}
        assert server["startupProbe"]["grpc"] == {"port": HEALTH_PORT, "service": "liveness"}
        assert rendered.environment(name)["SPLITSERVE_HEALTH_PORT"] == str(HEALTH_PORT)
        startup = server["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 300, "a model must load"


def test_a_pod_has_time_to_drain(rendered: Any) -> None:
    for name in TIERS:
        grace_s = rendered.environment(name)["SPLITSERVE_DRAIN_GRACE_S"]
        assert rendered.pod(name)["terminationGracePeriodSeconds"] >= float(grace_s) + 15
        assert "lifecycle" not in rendered.server(name), "SIGTERM drains by itself"


def test_disruption_budgets_let_one_go_at_a_time(rendered: Any) -> None:
    budgets = {b["metadata"]["name"]: b["spec"] for b in rendered.kind("PodDisruptionBudget")}
    assert set(budgets) == {"router", "prefill", "decode"}
    for name, budget in budgets.items():
        assert budget["maxUnavailable"] == 1
        assert budget["selector"]["matchLabels"].items() <= rendered.labels(name).items()


def test_memory_limits_hold_what_the_settings_ask_for(overlay: Any, gpu: Any) -> None:
    def limit(name: str) -> int:
        return _bytes(overlay.server(name)["resources"]["limits"]["memory"])

    arena = int(overlay.environment("kvstore")["SPLITSERVE_ARENA_BYTES"])
    assert arena * 1.1 < limit("kvstore")
    for name in ("prefill", "decode"):
        pool = int(overlay.environment(name)["SPLITSERVE_POOL_BYTES"])
        in_use = arena if overlay is gpu else pool  # the pool is on the GPU, the arena is mapped
        assert in_use + 2**30 < limit(name)


def test_directory_keeps_nothing_on_disk(rendered: Any) -> None:
    args = rendered.server("redis")["args"]
    settings = dict(zip(args[::2], args[1::2], strict=True))
    assert settings["--save"] == ""
    assert settings["--appendonly"] == "no"
    assert int(settings["--maxmemory"].removesuffix("mb")) * 2**20 < _bytes(
        rendered.server("redis")["resources"]["limits"]["memory"]
    )


def test_gpu_workers_get_one_gpu_each_on_gpu_nodes(gpu: Any) -> None:
    for name in ("prefill", "decode"):
        resources = gpu.server(name)["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        assert resources["requests"]["nvidia.com/gpu"] == "1"
        assert gpu.environment(name)["SPLITSERVE_DEVICE"] == "cuda"
        update = gpu.workloads[name]["spec"]["strategy"]["rollingUpdate"]
        assert update == {"maxUnavailable": 1, "maxSurge": 0}
    for name in ("prefill", "decode", "kvstore"):
        assert gpu.pod(name)["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert "nvidia.com/gpu" in {t["key"] for t in gpu.pod(name)["tolerations"]}
    assert "nodeSelector" not in gpu.pod("router")


def test_the_autoscaler_owns_the_routers_replicas(gpu: Any, cpu_smoke: Any) -> None:
    target = gpu.one("HorizontalPodAutoscaler", "router")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "router"}
    assert "replicas" not in gpu.workloads["router"]["spec"]
    assert cpu_smoke.workloads["router"]["spec"]["replicas"] == 1
