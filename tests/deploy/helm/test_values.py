"""Bad values are refused, in words that name the key; what Terraform's module gives is taken."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from deploy.helm.chart import EXAMPLES, cluster_config, one, ray_pods, render, values_of

from moeray.config import parse_config
from moeray.planning import Efficiency, load_plan, plan, task_of
from moeray.planning.report import values as planned_values

LOCALS = Path(__file__).parents[3] / "terraform/modules/moeray/locals.tf"
PLANS = Path(__file__).parents[3] / "docs" / "plans"
GPU = {"resources": {"limits": {"nvidia.com/gpu": "8"}}}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"workergroups": {}}, "additional properties 'workergroups' not allowed"),
    ({"workerGroups": {"experts": {"replicaz": 2}}}, "/workerGroups/experts.*'replicaz' not allowed"),
    ({"workerGroups": {"more": {"replicas": 2}}}, "/workerGroups/more.*missing property 'pool'"),
    ({"workerGroups": {"Experts": {"pool": "experts", "replicas": 1}}}, "Experts"),
    (
        {"workerGroups": {"experts": {"pool": "decode"}}},
        "/workerGroups/experts/pool.*'ingress', 'attention', 'experts'",
    ),
    ({"workerGroups": {"experts": {"replicas": -1}}}, "/workerGroups/experts/replicas.*minimum"),
    ({"workerGroups": {"experts": {"minReplicas": 3}}}, "experts: minReplicas 3, replicas 2, maxReplicas 2"),
    ({"workerGroups": {"ingress": {"processesPerPod": 2}}}, "workerGroups.ingress.processesPerPod"),
    ({"workerGroups": {"experts": {"device": "gpu"}}}, r"workerGroups.experts: 0 GPUs \(resources.limits"),
    ({"workerGroups": {"experts": {**GPU, "processesPerPod": 3}}}, "8 GPUs .* not the same for each of 3 process"),
    ({"workerGroups": {"more": {"pool": "experts", "replicas": 1, **GPU}}}, "experts have different GPUs per process"),
    ({"workerGroups": {"experts": {"shmSize": "many"}}}, "/workerGroups/experts/shmSize"),
    ({"config": {"attention": {"num_shard": 2}}}, "/config/attention.*'num_shard' not allowed"),
    ({"config": {"experts": {"num_groups": "2"}}}, "/config/experts/num_groups.*want integer"),
    ({"config": {"transport": {"backend": "tcp"}}}, "/config/transport/backend.*'gloo', 'nccl', 'local'"),
    ({"config": {"attention": {"num_shards": 3}}}, "config.attention.num_shards: 3 processes do not fit .* room for 2"),
    ({"redis": {"url": "redis://user:word@host:6379"}}, "/redis/url"),
    ({"redis": {"url": "http://host"}}, "/redis/url"),
    ({"redis": {"password": "word"}}, "/redis.*'password' not allowed"),
    ({"redis": {"existingSecret": ""}}, "/redis/existingSecret"),
    (
        {"redis": {"url": "rediss://host:6379/0"}, "networkPolicy": {"redis": []}},
        "networkPolicy.redis: where is the Redis of redis.url",
    ),
    ({"checkpoint": {"uri": "https://host/model"}}, "/checkpoint/uri"),
    ({"checkpoint": {"source": "claim"}}, "checkpoint.claim: name the PersistentVolumeClaim"),
    ({"checkpoint": {"source": "fetch"}}, "checkpoint.uri: where is it to be fetched from"),
    ({"checkpoint": {"source": "s3"}}, "/checkpoint/source.*'none', 'claim', 'hostPath', 'fetch'"),
    ({"serviceAccount": {"name": "default"}}, "/serviceAccount/name"),
    ({"service": {"type": "External"}}, "/service/type.*'ClusterIP', 'NodePort', 'LoadBalancer'"),
    ({"upgrade": {"strategy": "Rolling"}}, "/upgrade/strategy"),
    ({"rayAuth": {"mode": "off"}}, "/rayAuth/mode.*'token', 'disabled'"),
    ({"gateway": {"enabled": True}}, "gateway: parentRefs, httpHosts and grpcHosts are all needed"),
    (
        {"gateway": {"enabled": True, "parentRefs": [{"name": "g"}], "httpHosts": ["a", "b"], "grpcHosts": ["b"]}},
        "gateway: b cannot be a host of both httpHosts and grpcHosts",
    ),
    ({"tls": {"ingress": {"certManager": {"enabled": True}}}}, "tls.ingress.certManager.issuerRef: who signs"),
    ({"tls": {"ingress": {"clientCaSecret": "clients"}}}, "tls.ingress.clientCaSecret: needs a certificate"),
    ({"monitoring": {"prometheusRule": True, "alerts": False}}, "monitoring.prometheusRule: there is nothing in it"),
    ({"monitoring": {"interval": "often"}}, "/monitoring/interval"),
    ({"priorityClasses": {"create": {"high": "very"}}}, "/priorityClasses/create/high.*want integer"),
    ({"image": {"digest": "sha256:short"}}, "/image/digest"),
    ({"fullnameOverride": "x" * 41}, "/fullnameOverride"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_bad_values_are_refused_by_the_name_of_their_key(values: dict[str, Any], message: str) -> None:
    helm = pytest.importorskip("helm_python")
    with pytest.raises(helm.HelmError) as refused:
        render(values)
    assert re.search(message, str(refused.value)), refused.value


def test_what_terraforms_module_gives_is_taken_and_is_all_that_it_gives() -> None:
    scheduling = {
        "nodeSelector": {"moeray.io/pool": "experts"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}],
        "resources": {"limits": {"nvidia.com/gpu": "8", "vpc.amazonaws.com/efa": "32"}},
    }
    given = {
        "serviceAccount": {"name": "moeray"},
        "workerGroups": {"experts": scheduling},
        "redis": {"url": "rediss://master.redis.internal:6379", "existingSecret": "moeray-redis"},
        "checkpoint": {"uri": "s3://checkpoints/deepseek-v4"},
    }
    text = LOCALS.read_text()
    assert set(re.findall(r"\b(serviceAccount|workerGroups|redis|checkpoint) += \{", text)) == set(given)
    assert set(re.findall(r"(\w+) += pool\.", text)) == {"nodeSelector", "tolerations", "limits"}
    assert set(re.findall(r"(\w+) += var\.redis\.", text)) | {"existingSecret"} == {"url", "existingSecret"}

    manifests = render(given)
    experts = ray_pods(manifests)["experts"]["spec"]
    assert experts["nodeSelector"] == scheduling["nodeSelector"]
    assert experts["tolerations"] == scheduling["tolerations"]
    assert experts["containers"][0]["image"].startswith("moeray-gpu:")
    assert experts["containers"][0]["resources"]["limits"].items() >= scheduling["resources"]["limits"].items()
    assert experts["serviceAccountName"] == "moeray"
    assert cluster_config(manifests)["redis"]["url"] == given["redis"]["url"]
    assert cluster_config(manifests)["experts"]["num_gpus"] == 8
    state = one(manifests, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert state["redisAddress"] == given["redis"]["url"]
    assert not [each for each in manifests if each["kind"] == "StatefulSet"]


def test_what_config_says_wins_over_what_the_chart_derives() -> None:
    config = cluster_config(render({"config": {"attention": {"num_shards": 1, "num_cpus": 0.5}, "pin_cores": True}}))
    assert (config["attention"]["num_shards"], config["attention"]["num_cpus"], config["pin_cores"]) == (1, 0.5, True)


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_shard_beside_expert_groups_is_one_process_on_one_device(example: str) -> None:
    """What vLLM's own parallelism needs is refused when such a shard starts: see moeray.vllm_hooks.engine_args."""
    config = parse_config(cluster_config(render(values_of(example))))
    if config.num_remote_groups:
        parallel = [name for name in config.attention.engine_args if "parallel" in name]
        assert not parallel and config.attention.num_gpus <= 1 and config.experts.num_gpus <= 1


@pytest.mark.parametrize("name", ["v4-flash", "v3-fp8", "v4-pro-two-kinds", "engram-100b"])
def test_what_the_planner_recommends_is_what_the_chart_starts(name: str) -> None:
    task = task_of(load_plan(PLANS / f"{name}.yaml"), Efficiency())
    found = plan(task)
    assert found.best is not None
    config = parse_config(cluster_config(render(planned_values(task, found))))
    topology = found.best.topology
    assert config.num_remote_groups == topology.groups
    assert config.attention.num_shards == (topology.attention if topology.kind == "split" else 1)
    assert config.attention.num_gpus == topology.tensor


def test_large_numbers_stay_whole() -> None:
    config = cluster_config(render({"config": {"kv_cache": {"host_bytes": 274877906944}}}))
    assert config["kv_cache"]["host_bytes"] == 274877906944
    assert isinstance(config["kv_cache"]["host_bytes"], int)
