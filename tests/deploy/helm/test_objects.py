"""What the objects say to each other: selectors, ports, files, numbers, secrets."""

from __future__ import annotations

import re
from typing import Any

import pytest
from deploy.helm.chart import (
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    cluster_config,
    containers_of,
    matches,
    one,
    overlaid,
    pod_templates,
    ray_pods,
    render,
    serve_config,
    sources,
    values_of,
)

from moeray.config import parse_config

ALL = ["", *EXAMPLES]
TLS = {
    "tls": {
        "ingress": {"existingSecret": "front", "clientCaSecret": "clients"},
        "cluster": {"existingSecret": "inside"},
    }
}


@pytest.mark.parametrize("example", ALL)
def test_the_serve_config_is_taken_by_ray_serve_and_by_our_own_loader(example: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    manifests = render(values_of(example))
    deployed = ServeDeploySchema.model_validate(serve_config(manifests))
    (application,) = deployed.applications
    assert (application.name, application.import_path) == ("moeray", "moeray.app:build")
    assert application.external_scaler_enabled
    parse_config(cluster_config(manifests))


def test_a_cluster_whose_numbers_follow_the_load_has_moerays_policy() -> None:
    from ray.serve.schema import ServeDeploySchema

    from moeray.app import autoscaling_policy

    manifests = render(overlaid("", {"config": {"autoscaling": {"attention": {"most": 8}}}}))
    (application,) = ServeDeploySchema.model_validate(serve_config(manifests)).applications
    assert not application.external_scaler_enabled and application.autoscaling_policy is not None
    config = parse_config(cluster_config(manifests))
    assert parse_config(application.autoscaling_policy["policy_kwargs"]["config"]) == config
    wanted = autoscaling_policy(config)
    assert wanted is not None and application.autoscaling_policy["policy_function"] == wanted["policy_function"]


@pytest.mark.parametrize("example", ALL)
def test_processes_fill_the_pods_of_their_pool(example: str) -> None:
    manifests = render(values_of(example))
    config = parse_config(cluster_config(manifests))
    wanted = {
        "ingress": (config.ingress.num_replicas, config.ingress),
        "attention": (config.attention.num_shards, config.attention),
        "experts": (config.experts.num_groups, config.experts),
        "engram": (config.engram.num_servers, config.engram),
    }
    groups = one(manifests, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for pool, (count, asks) in wanted.items():
        here = [group for group in groups if group["labels"]["pool"] == pool]
        assert sum(group["replicas"] * int(group["rayStartParams"]["num-cpus"]) for group in here) == count
        if not here:
            continue
        assert asks.label_selector == {"pool": pool}
        assert asks.num_cpus == 1
        for group in here:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            gpus = int(limits.get("nvidia.com/gpu", 0))
            assert gpus == int(group["rayStartParams"]["num-cpus"]) * getattr(asks, "num_gpus", 0)


def test_nothing_that_asks_for_a_cpu_runs_beside_the_gcs() -> None:
    head = one(render({}), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("example", ALL)
def test_every_service_selects_pods_that_have_its_ports(example: str) -> None:
    manifests = render(values_of(example))
    services = [each for each in manifests if each["kind"] == "Service"]
    assert services
    for service in services:
        selected = {
            name: pod
            for name, pod in pod_templates(manifests)
            if matches({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
        }
        assert set(selected) == ({"redis"} if service["metadata"]["name"].endswith("-redis") else {"ingress"})
        for pod in selected.values():
            named = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= named


@pytest.mark.parametrize("example", ALL)
def test_every_worker_group_has_a_disruption_budget_of_its_own(example: str) -> None:
    manifests = render(values_of(example))
    budgets = [each["spec"]["selector"] for each in manifests if each["kind"] == "PodDisruptionBudget"]
    pods = ray_pods(manifests)
    held = [
        [name for name, pod in pods.items() if matches(selector, pod["metadata"]["labels"])] for selector in budgets
    ]
    assert sorted(held) == sorted([name] for name in pods if name != "head")


@pytest.mark.parametrize("example", ALL)
def test_no_secret_is_written_down(example: str) -> None:
    manifests = render(overlaid(values_of(example), {"kvRedis": {"existingSecret": "kv"}}))
    assert "Secret" not in {each["kind"] for each in manifests}
    for _, pod in pod_templates(manifests):
        for container in containers_of(pod):
            for variable in container.get("env", []):
                if re.search("PASSWORD|TOKEN|KEY|SECRET", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable
    password = one(manifests, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert set(password["valueFrom"]["secretKeyRef"]) == {"name", "key"}


@pytest.mark.parametrize("more", [{}, TLS, {"tenants": {"fileKey": "tenants.yaml"}}], ids=["plain", "TLS", "tenants"])
def test_every_file_that_the_configuration_names_is_mounted_where_it_is_read(more: dict[str, Any]) -> None:
    manifests = render(more)
    config, pods = cluster_config(manifests), ray_pods(manifests)
    read_by_ingress = [*config["ingress"].get("tls", {}).values(), *(
        value for key, value in config["tenants"].items() if key in ("file", "secret_file")
    )]  # fmt: skip
    mounts = {
        name: [mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]]
        for name, pod in pods.items()
    }
    for path in read_by_ingress:
        with_it = {name for name, paths in mounts.items() if any(path.startswith(f"{each}/") for each in paths)}
        assert with_it == {"ingress"}, f"{path} is the business of the ingress alone"
    for path in config.get("cluster_tls", {}).values():
        assert all(any(path.startswith(f"{each}/") for each in paths) for paths in mounts.values()), path


def test_routes_lead_to_ports_of_the_service() -> None:
    manifests = render(values_of("values-h200-pro.yaml"))
    service = one(manifests, "Service")
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    for kind, port in (("HTTPRoute", "http"), ("GRPCRoute", "grpc")):
        (rule,) = one(manifests, kind)["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": service["metadata"]["name"], "port": ports[port]}]


def test_monitors_select_what_they_scrape() -> None:
    manifests = render({"monitoring": {"podMonitor": True, "serviceMonitor": True}})
    pod_monitor, service_monitor = one(manifests, "PodMonitor")["spec"], one(manifests, "ServiceMonitor")["spec"]
    endpoint = pod_monitor["podMetricsEndpoints"][0]
    for pod in ray_pods(manifests).values():
        assert matches(pod_monitor["selector"], pod["metadata"]["labels"])
        assert endpoint["port"] in {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    scraped = [
        each["metadata"]["name"]
        for each in manifests
        if each["kind"] == "Service"
        and matches(service_monitor["selector"], each["metadata"]["labels"])
        and service_monitor["endpoints"][0]["port"] in {port["name"] for port in each["spec"]["ports"]}
    ]
    assert scraped == [RELEASE]
    assert service_monitor["endpoints"][0]["authorization"]["credentials"]["key"] == "api-key"


def test_a_certificate_bears_the_names_that_are_asked_for() -> None:
    issuer = {"enabled": True, "issuerRef": {"name": "own"}}
    manifests = render({"tls": {"ingress": {"certManager": issuer}, "cluster": {"certManager": issuer}}})
    inside, front = (one(manifests, "Certificate", f"{RELEASE}-{which}")["spec"] for which in ("cluster", "ingress"))
    assert inside["dnsNames"] == ["moeray"]
    assert set(inside["usages"]) == {"server auth", "client auth"}
    assert f"{RELEASE}.{NAMESPACE}.svc" in front["dnsNames"]
    mounted = {v["secret"]["secretName"] for v in ray_pods(manifests)["ingress"]["spec"]["volumes"] if "secret" in v}
    assert {inside["secretName"], front["secretName"]} <= mounted


def test_the_autoscaler_moves_between_the_bounds_and_stays_still_without_it() -> None:
    bounds = {"workerGroups": {"attention": {"minReplicas": 1, "maxReplicas": 5}}}
    for on, expected in ((True, (1, 2, 5)), (False, (2, 2, 2))):
        manifests = render({**bounds, "autoscaling": {"enabled": on}})
        cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
        (group,) = (each for each in cluster["workerGroupSpecs"] if each["groupName"] == "attention")
        assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == expected
        assert cluster["enableInTreeAutoscaling"] is on
        assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is on
    head = ray_pods(render({"autoscaling": {"enabled": True}}))["head"]["spec"]
    cluster = one(render({"autoscaling": {"enabled": True}}), "RayService")["spec"]["rayClusterConfig"]
    mounted = {mount["name"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in head["volumes"]}, "its root file system is read-only, too"
    assert one(manifests, "RayService")["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_groups_of_one_pool_add_up_and_one_can_be_left_out() -> None:
    more = {"workerGroups": {"spot": {"pool": "experts", "replicas": 3, "processesPerPod": 2}}}
    assert cluster_config(render(more))["experts"]["num_groups"] == 2 + 6
    without = {"workerGroups": {"experts": {"enabled": False}}}
    manifests = render(without)
    assert cluster_config(manifests)["experts"]["num_groups"] == 0
    assert "experts" not in ray_pods(manifests)


def test_notes_tell_of_the_first_call_and_of_the_secrets() -> None:
    (notes,) = (text for path, text in sources({}).items() if path.endswith("NOTES.txt"))
    assert "/v1/chat/completions" in notes
    assert "moeray-redis" in notes
    assert "moeray tenant create" in notes
    assert "uninstall" not in notes
    (notes,) = (t for path, t in sources({"uninstallHook": {"enabled": False}}).items() if path.endswith("NOTES.txt"))
    assert notes.index("delete rayservice/moeray") < notes.index("uninstall moeray")
    (notes,) = (t for path, t in sources(values_of("values-h200-pro.yaml")).items() if path.endswith("NOTES.txt"))
    assert "--cacert" in notes
    assert "uninstall" not in notes


@pytest.mark.parametrize("example", ALL)
def test_uninstalling_waits_for_ray_where_redis_goes_with_the_release(example: str) -> None:
    manifests = render(values_of(example))
    bundled = "StatefulSet" in {each["kind"] for each in manifests}
    jobs = [each for each in manifests if each["kind"] == "Job"]
    assert len(jobs) == int(bundled)
    for job in jobs:
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"
        service = one(manifests, "RayService")["metadata"]
        (rule,) = one(manifests, "Role")["rules"]
        assert rule == {
            "apiGroups": ["ray.io"], "resources": ["rayservices"], "resourceNames": [service["name"]],
            "verbs": ["get", "delete"],
        }  # fmt: skip
        (subject,) = one(manifests, "RoleBinding")["subjects"]
        pod = job["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == subject["name"]
        assert pod["containers"][0]["args"][:2] == [service["namespace"], service["name"]]
