"""What the objects say to each other: selectors, ports, files, numbers, secrets."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from deploy.helm.chart import (
    EXAMPLES,
    NAMESPACE,
    RELEASE,
    cluster_config,
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


def containers_of(template: dict[str, Any]) -> list[dict[str, Any]]:
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("example", ALL)
def test_the_serve_config_is_taken_by_ray_serve_and_by_our_own_loader(example: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    manifests = render(values_of(example))
    deployed = ServeDeploySchema.model_validate(serve_config(manifests))
    (application,) = deployed.applications
    assert (application.name, application.import_path) == ("moeray", "moeray.app:build")
    assert application.external_scaler_enabled
    parse_config(cluster_config(manifests))


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
def test_every_container_says_what_it_needs_and_may_take(example: str) -> None:
    for name, pod in pod_templates(render(values_of(example))):
        for container in containers_of(pod):
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), (name, container["name"])
            assert "memory" in resources["limits"], (name, container["name"])


@pytest.mark.parametrize("example", ALL)
def test_every_pod_passes_the_restricted_standard(example: str) -> None:
    for name, pod in pod_templates(render(values_of(example))):
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        assert {next(iter(set(volume) - {"name"})) for volume in spec.get("volumes", [])} <= {
            "configMap", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"
        }  # fmt: skip
        for container in containers_of(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True


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


@pytest.mark.parametrize("example", ALL)
def test_every_mount_has_its_volume_and_every_volume_a_mount(example: str) -> None:
    for name, pod in pod_templates(render(overlaid(values_of(example), {"tenants": {"fileKey": "tenants.yaml"}}))):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        volumes |= {"data"} if name == "redis" else set()
        mounted = {mount["name"] for container in containers_of(pod) for mount in container.get("volumeMounts", [])}
        assert mounted == volumes, name


@pytest.mark.parametrize(
    ("checkpoint", "volume"),
    [
        (
            {"source": "claim", "claim": "weights"},
            {"persistentVolumeClaim": {"claimName": "weights", "readOnly": True}},
        ),
        (
            {"source": "hostPath", "hostPath": "/mnt/weights"},
            {"hostPath": {"path": "/mnt/weights", "type": "Directory"}},
        ),
        ({"uri": "gs://bucket/model"}, {"emptyDir": {"sizeLimit": "1Ti"}}),
        ({"uri": "s3://bucket/model", "claim": "cache"}, {"persistentVolumeClaim": {"claimName": "cache"}}),
    ],
)
def test_the_model_is_the_directory_where_the_checkpoint_is(checkpoint: dict[str, str], volume: dict[str, Any]) -> None:
    manifests = render({"checkpoint": checkpoint})
    assert cluster_config(manifests)["model"] == "/checkpoint"
    for name, pod in ray_pods(manifests).items():
        assert {"name": "checkpoint", **volume} in pod["spec"]["volumes"], name
        fetching = [each for each in pod["spec"].get("initContainers", []) if each["name"] == "fetch-checkpoint"]
        assert bool(fetching) is ("uri" in checkpoint)
        (mount,) = (each for each in pod["spec"]["containers"][0]["volumeMounts"] if each["name"] == "checkpoint")
        assert mount["mountPath"] == "/checkpoint"
        assert mount["readOnly"] is True


@pytest.mark.parametrize("example", ALL)
def test_a_pod_is_left_longer_than_what_runs_in_it_is_left_to_end(example: str) -> None:
    from moeray.app import DRAIN_S, INGRESS_STOP_S

    manifests = render(overlaid(values_of(example), {"config": {"ingress": {"drain_s": 44.5}}}))
    for name, pod in ray_pods(manifests).items():
        if name == "head":
            continue
        drain_s = math.ceil(44.5 + INGRESS_STOP_S) if name == "ingress" else int(DRAIN_S)
        command = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[-1] == str(drain_s), name
        assert pod["spec"]["terminationGracePeriodSeconds"] >= drain_s + 30


@pytest.mark.parametrize("example", ALL)
def test_every_pod_has_probes_of_its_own_and_the_ingress_is_ready_when_it_serves(example: str) -> None:
    for name, pod in ray_pods(render(values_of(example))).items():
        container = pod["spec"]["containers"][0]
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] in ports, (name, probe)
        assert container["livenessProbe"]["httpGet"]["path"] == "/api/local_raylet_healthz"
        assert (container["readinessProbe"]["httpGet"]["path"] == "/ready") is (name == "ingress")


def test_probes_of_an_ingress_that_asks_for_certificates_need_none() -> None:
    ingress = ray_pods(render(TLS))["ingress"]["spec"]["containers"][0]
    assert ingress["readinessProbe"]["tcpSocket"] == {"port": "http"}
    plain = ray_pods(render({"tls": {"ingress": {"existingSecret": "front"}}}))["ingress"]["spec"]["containers"][0]
    assert plain["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"


def test_two_expert_pods_never_share_a_node_unless_it_is_allowed() -> None:
    rule = ray_pods(render({}))["experts"]["spec"]["affinity"]["podAntiAffinity"]
    (term,) = rule["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    assert matches(term["labelSelector"], ray_pods(render({}))["experts"]["metadata"]["labels"])
    assert not matches(term["labelSelector"], ray_pods(render({}))["attention"]["metadata"]["labels"])
    demo = ray_pods(render(values_of("values-cpu-demo.yaml")))["experts"]["spec"]["affinity"]["podAntiAffinity"]
    assert set(demo) == {"preferredDuringSchedulingIgnoredDuringExecution"}


def test_the_heads_ports_bear_the_names_that_kuberay_looks_for() -> None:
    """Of them it makes the head's Service and the one of Serve, and without `serve` it fails."""
    ports = {port["name"]: port for port in ray_pods(render({}))["head"]["spec"]["containers"][0]["ports"]}
    assert {"gcs-server", "dashboard", "serve", "metrics"} <= set(ports)


def test_labels_of_pods_do_not_change_with_the_version_of_the_chart() -> None:
    for name, pod in pod_templates(render({})):
        if name not in ("test", "uninstall"):
            assert all(key.startswith("moeray.io/") for key in pod["metadata"]["labels"]), name


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
    (endpoint,) = pod_monitor["podMetricsEndpoints"]
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


def test_every_image_has_a_version() -> None:
    for _, pod in pod_templates(render({"checkpoint": {"uri": "s3://bucket/model"}})):
        for container in containers_of(pod):
            assert re.search(r":[0-9][\w.-]*$", container["image"]), container["image"]
    digest = "sha256:" + "0" * 64
    assert (
        ray_pods(render({"image": {"digest": digest}}))["head"]["spec"]["containers"][0]["image"] == f"moeray@{digest}"
    )
