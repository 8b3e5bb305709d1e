"""The chart's own serve config serves: the pods of the CPU demo as Ray nodes of this machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deploy.helm.chart import CHART, values_of
from deploy.helm.serving import READY_S, Served, ask, replicas_at, served, status_of, wait_until
from redis_server import missing

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"Redis: {missing()}"),
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """values-cpu-demo.yaml"""
    with served(values_of("values-cpu-demo.yaml"), {}, tmp_path_factory.mktemp("demo")) as it:
        yield it


def test_the_rendered_serve_config_serves_a_request(demo: Served) -> None:
    assert len(ask(demo)) > 20


def test_each_process_is_in_a_pod_of_its_pool_and_fills_it(demo: Served) -> None:
    pods = demo.pods
    deployment = {"ingress": "Ingress", "attention": "AttentionShard", "experts": "ExpertGroup"}
    for group in pods.cluster["workerGroupSpecs"]:
        for address in pods.groups[group["groupName"]]:
            expected = [deployment[group["labels"]["pool"]]] * int(group["rayStartParams"]["num-cpus"])
            assert replicas_at(pods, address) == expected
    assert replicas_at(pods, pods.head) == []


def test_probes_of_every_pod_are_answered(demo: Served) -> None:
    """Without Ray's token: the kubelet has none."""
    pods, url = demo.pods, demo.url
    for address, agent in pods.agents.items():
        ports = {"agent": f"{address}:{agent}", "dashboard": f"{address}:{pods.dashboard}", "http": url.split("//")[1]}
        group = next((name for name, addresses in pods.groups.items() if address in addresses), None)
        specs = {each["groupName"]: each for each in pods.cluster["workerGroupSpecs"]}
        spec = specs[group] if group else pods.cluster["headGroupSpec"]
        container = spec["template"]["spec"]["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[probe]["httpGet"]
            assert status_of(f"http://{ports[asked['port']]}{asked['path']}") == 200, (group, probe)


def test_a_pod_that_ends_is_drained_by_its_hook_and_nobody_notices(demo: Served) -> None:
    pods = demo.pods
    answer = ask(demo)
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
        answers.append(ask(demo))
    assert hook.returncode == 0
    assert hook.stdout is not None
    said = hook.stdout.read()
    assert "drain: 0 replicas are left" in said, said
    assert replicas_at(pods, leaving) == []
    wait_until(lambda: replicas_at(pods, spare) == ["ExpertGroup"], READY_S, "a group in the new pod")
    assert answers
    assert {*answers, ask(demo)} == {answer}
