"""The chart's own serve config serves: the pods of the CPU demo as Ray nodes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from deploy.helm.chart import CHART, one, overlaid, render, values_of
from deploy.helm.ray_pods import RayPods, ray_pods
from redis_server import RedisServer, missing

from moeray.ingress.ports import free_ports

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"Redis: {missing()}"),
]
READY_S = 300.0
PASSWORD = "for-this-test"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RayPods, str]]:
    """(the pods of values-cpu-demo.yaml, URL of its ingress, ready)"""
    folder = tmp_path_factory.mktemp("demo")
    http, grpc = free_ports("127.0.0.1", 2)
    server = RedisServer(folder, maxmemory_policy="noeviction")
    # What a pod has for itself and one machine has once: addresses, ports, memory. The rest is the example's.
    here = {
        "redis": {"url": server.url},
        "networkPolicy": {"redis": [{"ipBlock": {"cidr": "127.0.0.0/8"}}]},
        "config": {
            "ingress": {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc},
            "kv_cache": {"host_directory": str(folder / "kv")},
        },
    }
    service = one(render(overlaid(values_of("values-cpu-demo.yaml"), here)), "RayService")
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("requirepass", PASSWORD)
        with ray_pods(service, {("moeray-redis", "redis-password"): PASSWORD}) as pods:
            url = f"http://127.0.0.1:{http}"
            wait_until(lambda: status_of(f"{url}/ready") == 200, READY_S, "an ingress that serves")
            yield pods, url
    finally:
        server.kill()


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.5)


def status_of(url: str) -> int:
    """HTTP status; 0: nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(url: str) -> str:
    """The answer to one question, greedily."""
    body = {
        "model": "moeray-tiny", "temperature": 0, "max_tokens": 32,
        "messages": [{"role": "user", "content": "What is an expert group?"}],
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        message = json.loads(answer.read())["choices"][0]["message"]
    return f"{message.get('reasoning') or ''}{message.get('content') or ''}"


def replicas_at(pods: RayPods, address: str) -> list[str]:
    """Serve's account of who runs on a pod."""
    request = urllib.request.Request(
        f"http://{pods.head}:{pods.dashboard}/api/serve/applications/",
        headers={"Authorization": f"Bearer {pods.token}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        deployments = json.loads(answer.read())["applications"]["moeray"]["deployments"]
    return [
        name
        for name, deployment in deployments.items()
        for replica in deployment["replicas"]
        if replica.get("node_ip") == address and replica["state"] == "RUNNING"
    ]


def test_the_rendered_serve_config_serves_a_request(demo: tuple[RayPods, str]) -> None:
    _, url = demo
    assert len(ask(url)) > 20


def test_each_process_is_in_a_pod_of_its_pool_and_fills_it(demo: tuple[RayPods, str]) -> None:
    pods, _ = demo
    deployment = {"ingress": "Ingress", "attention": "AttentionShard", "experts": "ExpertGroup"}
    for group in pods.cluster["workerGroupSpecs"]:
        for address in pods.groups[group["groupName"]]:
            expected = [deployment[group["labels"]["pool"]]] * int(group["rayStartParams"]["num-cpus"])
            assert replicas_at(pods, address) == expected
    assert replicas_at(pods, pods.head) == []


def test_probes_of_every_pod_are_answered(demo: tuple[RayPods, str]) -> None:
    """Without Ray's token: the kubelet has none."""
    pods, url = demo
    for address, agent in pods.agents.items():
        ports = {"agent": f"{address}:{agent}", "dashboard": f"{address}:{pods.dashboard}", "http": url.split("//")[1]}
        group = next((name for name, addresses in pods.groups.items() if address in addresses), None)
        specs = {each["groupName"]: each for each in pods.cluster["workerGroupSpecs"]}
        spec = specs[group] if group else pods.cluster["headGroupSpec"]
        container = spec["template"]["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert status_of(f"http://{ports[asked['port']]}{asked['path']}") == 200, (group, probe)


def test_a_pod_that_ends_is_drained_by_its_hook_and_nobody_notices(demo: tuple[RayPods, str]) -> None:
    pods, url = demo
    answer = ask(url)
    leaving = pods.groups["experts"][0]
    spare = pods.start_worker("experts")
    (spec,) = (each for each in pods.cluster["workerGroupSpecs"] if each["groupName"] == "experts")
    template = spec["template"]
    command = template["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    environment = pods.environment(template, leaving)
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = command[1].replace("/opt/moeray", str(CHART / "files"))

    hook = subprocess.Popen(
        [sys.executable, script, *command[2:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    answers = []
    while hook.poll() is None:
        answers.append(ask(url))
    assert hook.returncode == 0
    assert hook.stdout is not None
    said = hook.stdout.read()
    assert "drain: 0 replicas are left" in said, said
    assert replicas_at(pods, leaving) == []
    wait_until(lambda: replicas_at(pods, spare) == ["ExpertGroup"], READY_S, "a group in the new pod")
    assert answers
    assert {*answers, ask(url)} == {answer}
