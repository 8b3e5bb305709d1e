"""Each pod: what it needs, mounts, may do, and how it begins and ends."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from deploy.helm.chart import (
    EXAMPLES,
    cluster_config,
    containers_of,
    matches,
    overlaid,
    pod_templates,
    ray_pods,
    render,
    values_of,
)

ALL = ["", *EXAMPLES]
TLS = {
    "tls": {
        "ingress": {"existingSecret": "front", "clientCaSecret": "clients"},
        "cluster": {"existingSecret": "inside"},
    }
}


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


def test_every_image_has_a_version() -> None:
    for _, pod in pod_templates(render({"checkpoint": {"uri": "s3://bucket/model"}})):
        for container in containers_of(pod):
            assert re.search(r":[0-9][\w.-]*$", container["image"]), container["image"]
    digest = "sha256:" + "0" * 64
    assert (
        ray_pods(render({"image": {"digest": digest}}))["head"]["spec"]["containers"][0]["image"] == f"moeray@{digest}"
    )
