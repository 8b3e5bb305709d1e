"""NetworkPolicies let through what is needed, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from deploy.helm.chart import EXAMPLES, cluster_config, overlaid, pod_templates, render, values_of
from deploy.helm.reach import Peer, reaches

STRANGER = Peer({"app": "stranger"})
ELSEWHERE = Peer({"app": "stranger"}, namespace="elsewhere")
OPERATOR = Peer({"app.kubernetes.io/name": "kuberay-operator"}, namespace="kuberay")
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
DNS = Peer({"k8s-app": "kube-dns"}, namespace="kube-system")
INTERNET, STATE_REDIS, API_SERVER = Peer(address="93.184.216.34"), Peer(address="10.20.0.7"), Peer(address="10.0.0.1")


def release(values: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Peer]]:
    """(policies, pods by what they are)"""
    manifests = render(values)
    peers = {}
    for name, template in pod_templates(manifests):
        ports = {
            port["name"]: port["containerPort"]
            for container in template["spec"]["containers"]
            for port in container.get("ports", [])
        }
        peers[name] = Peer(template["metadata"]["labels"], ports=ports)
    return [each for each in manifests if each["kind"] == "NetworkPolicy"], peers


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_pods_of_ray_reach_each_other_on_every_port(example: str) -> None:
    policies, pods = release(values_of(example))
    ray = [pod for name, pod in pods.items() if name not in ("redis", "uninstall", "test")]
    assert len(ray) >= 3
    for source in ray:
        for target in ray:
            assert reaches(policies, source, target, 10002)
            assert reaches(policies, source, target, 51234)


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_a_stranger_reaches_the_two_ports_of_the_ingress_at_most(example: str) -> None:
    values = values_of(example)
    policies, pods = release(values)
    open_ports = {"http": 8000, "grpc": 50051}
    for name, pod in pods.items():
        for port_name, port in {**pod.ports, "ray": 10002, "redis": 6379, "lease": 40000}.items():
            wanted = name == "ingress" and open_ports.get(port_name) == port
            assert reaches(policies, STRANGER, pod, port) is wanted, (name, port_name)
            if wanted and "clients" not in values.get("networkPolicy", {}):
                assert reaches(policies, ELSEWHERE, pod, port)
            elif not wanted:
                assert not reaches(policies, ELSEWHERE, pod, port), (name, port_name)


def test_who_may_be_a_client_can_be_narrowed() -> None:
    policies, pods = release(values_of("values-cpu-demo.yaml"))
    assert reaches(policies, STRANGER, pods["ingress"], 8000)
    assert not reaches(policies, ELSEWHERE, pods["ingress"], 8000)


def test_the_operator_reaches_the_heads_dashboard_and_nothing_else() -> None:
    policies, pods = release({})
    assert reaches(policies, OPERATOR, pods["head"], 8265)
    assert not reaches(policies, OPERATOR, pods["head"], 6379)
    assert not reaches(policies, OPERATOR, pods["attention"], 8265)
    assert not reaches(policies, ELSEWHERE, pods["head"], 8265)


def test_the_bundled_redis_is_reached_by_ray_and_by_kuberays_cleanup_alone() -> None:
    policies, pods = release({})
    cleanup = Peer({"ray.io/node-type": "redis-cleanup"})
    for name in ("head", "ingress", "attention", "experts"):
        assert reaches(policies, pods[name], pods["redis"], 6379)
    assert reaches(policies, cleanup, pods["redis"], 6379)
    assert not reaches(policies, STRANGER, pods["redis"], 6379)
    assert not reaches(policies, pods["redis"], INTERNET, 443)
    assert not reaches(policies, pods["redis"], pods["head"], 6379)


def test_a_redis_of_ones_own_is_reached_where_it_is_said_to_be() -> None:
    policies, pods = release(values_of("values-h200-pro.yaml"))
    assert "redis" not in pods
    assert reaches(policies, pods["attention"], STATE_REDIS, 6379)
    assert not reaches(policies, pods["attention"], STATE_REDIS, 5432)
    assert not reaches(policies, pods["attention"], Peer(address="10.30.0.7"), 6379)


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_dns_is_reached(protocol: str) -> None:
    policies, pods = release({})
    assert reaches(policies, pods["head"], DNS, 53, protocol)
    assert not reaches(policies, pods["head"], DNS, 8080, protocol)


def test_the_internet_is_reached_only_to_fetch_a_checkpoint() -> None:
    policies, pods = release({})
    assert not reaches(policies, pods["attention"], INTERNET, 443)
    for values in ({"checkpoint": {"uri": "s3://bucket/model"}}, {"config": {"model": "deepseek-ai/DeepSeek-V4"}}):
        policies, pods = release(values)
        assert reaches(policies, pods["attention"], INTERNET, 443)
        assert not reaches(policies, pods["attention"], INTERNET, 80)
        assert not reaches(policies, pods["attention"], API_SERVER, 443), "private addresses are not the internet"


def test_the_api_server_is_reached_by_the_autoscaler_alone() -> None:
    policies, pods = release({})
    assert not reaches(policies, pods["head"], API_SERVER, 443)
    policies, pods = release({"autoscaling": {"enabled": True}})
    assert reaches(policies, pods["head"], API_SERVER, 443)
    assert not reaches(policies, pods["attention"], API_SERVER, 443)


def test_the_uninstalling_job_reaches_the_api_server_and_nothing_else() -> None:
    policies, pods = release({})
    assert reaches(policies, pods["uninstall"], API_SERVER, 443)
    assert not reaches(policies, pods["uninstall"], pods["redis"], 6379)
    assert not reaches(policies, pods["uninstall"], pods["head"], 8265)


def test_metrics_are_scraped_where_monitors_are_asked_for() -> None:
    policies, pods = release({})
    assert not reaches(policies, PROMETHEUS, pods["head"], 8080)
    values = {"monitoring": {"podMonitor": True}, "workerGroups": {"attention": {"processesPerPod": 2}}}
    policies, pods = release(values)
    assert reaches(policies, PROMETHEUS, pods["head"], 8080)
    assert not reaches(policies, PROMETHEUS, pods["head"], 8265)
    for port in (9464, 9465):
        assert reaches(policies, PROMETHEUS, pods["attention"], port)
        assert not reaches(policies, STRANGER, pods["attention"], port)
    assert not reaches(policies, PROMETHEUS, pods["attention"], 9466)


def test_spans_go_where_they_are_said_to_go() -> None:
    collector = Peer(namespace="telemetry")
    peers = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "telemetry"}}}]
    policies, pods = release({})
    assert not reaches(policies, pods["ingress"], collector, 4317)
    policies, pods = release({"networkPolicy": {"otlp": peers}})
    assert reaches(policies, pods["ingress"], collector, 4317)


def test_ports_follow_the_configuration() -> None:
    values = overlaid(values_of("values-cpu-demo.yaml"), {"config": {"ingress": {"http_port": 9000}}})
    policies, pods = release(values)
    assert cluster_config(render(values))["ingress"]["http_port"] == 9000
    assert reaches(policies, STRANGER, pods["ingress"], 9000)
    assert not reaches(policies, STRANGER, pods["ingress"], 8000)


def test_two_releases_of_one_namespace_do_not_reach_each_other() -> None:
    policies, pods = release({})
    other = Peer({**pods["head"].labels, "moeray.io/release": "other"})
    assert not reaches(policies, other, pods["redis"], 6379)
    assert not reaches(policies, pods["head"], other, 6379)
