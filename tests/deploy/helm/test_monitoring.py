"""Alerts and dashboards: they ask for metrics that there are, and the alerts ring when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.helm.chart import CHART, one, ray_pods, render

from moeray.config import AutoscalingConfig
from moeray.telemetry import FAMILIES, known_series

ROOT = CHART.parents[1]
RUNBOOK = ROOT / "docs" / "runbooks" / "alerts.md"
CASES = Path(__file__).parent / "alert_cases.yaml"
ON = {"monitoring": {"podMonitor": True, "prometheusRule": True, "dashboards": {"enabled": True}}}
METRIC = re.compile(r"\b((?:moeray|process|python|vllm)_\w+)\b(?!\s*=)")
BY = re.compile(r"(?:by|without|on|group_left)\s*\(([^)]*)\)")
SELECTED = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
BESIDE = {"namespace", "moeray_io_release", "pod", "instance", "le"}
"""Labels that Prometheus or the PodMonitor adds."""


def rules(values: dict[str, Any] = ON) -> list[dict[str, Any]]:
    groups = one(render(values), "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    """Of every alert and every panel."""
    panels = [
        target["expr"]
        for text in one(render(ON), "ConfigMap", "moeray-dashboards")["data"].values()
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", ())
    ]
    return [*(rule["expr"] for rule in rules()), *panels]


def test_every_metric_and_label_that_is_asked_for_exists() -> None:
    names, series = known_series(), {name: each for each in FAMILIES for name in each.series}
    asked = set()
    for query in queries():
        metrics = set(METRIC.findall(BY.sub("", query)))
        assert metrics, query
        asked |= metrics
        assert {each for each in metrics if each.startswith("moeray_")} <= names, query
        labels = {label.strip() for found in BY.findall(query) for label in found.split(",") if label.strip()}
        labels |= set(SELECTED.findall(query))
        known = {label for each in metrics & names for label in series[each].labels}
        assert labels <= known | BESIDE, query
    assert len(asked) > 30


def test_a_metric_or_label_that_is_not_there_would_be_found() -> None:
    assert METRIC.findall('sum by (code) (rate(moeray_typo_total{namespace="x"}[5m])) / moeray_generation') == [
        "moeray_typo_total", "moeray_generation",
    ]  # fmt: skip
    assert SELECTED.findall('m{a="1", b=~"2"}') == ["a", "b"]


def test_the_cluster_s_numbers_are_not_added_up_over_ingresses() -> None:
    shared = {each.name for each in FAMILIES if "role" not in each.labels or each.name == "moeray_losses_total"}
    shared = {
        each
        for each in shared
        if re.match(r"moeray_(generation|members|pool|expert_copies_|experts_lost|model|losses|scaling)", each)
    }
    assert len(shared) >= 10
    for query in queries():
        for name in shared & set(METRIC.findall(query)):
            assert re.match(r"(max|min|count)\b", query.strip("( ")), f"{name}: {query}"


def test_every_alert_links_to_its_section_of_the_runbook() -> None:
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", RUNBOOK.read_text(), re.MULTILINE)}
    links = {rule["alert"]: rule["annotations"]["runbook_url"] for rule in rules()}
    assert links == {alert: f"docs/runbooks/alerts.md#{alert.lower()}" for alert in links}
    assert {alert.lower() for alert in links} == headings
    elsewhere = {"monitoring": ON["monitoring"] | {"runbooks": "https://wiki.example/moeray"}}
    assert all(
        rule["annotations"]["runbook_url"].startswith("https://wiki.example/moeray/alerts.md#")
        for rule in rules(elsewhere)
    )


def test_goals_are_those_of_the_configuration() -> None:
    def goals(config: dict[str, Any]) -> dict[str, float]:
        found = {rule["alert"]: rule["expr"] for rule in rules(ON | {"config": config})}
        return {name: float(found[name].rpartition(">")[2]) for name in ("MoerayFirstTokenLate", "MoerayTokensLate")}

    ours = AutoscalingConfig()
    assert goals({}) == {"MoerayFirstTokenLate": ours.ttft_p95_s, "MoerayTokensLate": ours.tpot_p95_s}
    assert goals({"autoscaling": {"ttft_p95_s": 7, "tpot_p95_s": 0.25}}) == {
        "MoerayFirstTokenLate": 7, "MoerayTokensLate": 0.25,
    }  # fmt: skip
    assert "__" not in json.dumps(rules())


def test_your_own_rules_come_beside_ours_or_alone() -> None:
    own = [{"name": "own", "rules": [{"alert": "Mine", "expr": "up == 0"}]}]
    both = {"monitoring": ON["monitoring"] | {"rules": own}}
    alone = {"monitoring": ON["monitoring"] | {"rules": own, "alerts": False}}
    assert len(rules(both)) == len(rules()) + 1
    assert [rule["alert"] for rule in rules(alone)] == ["Mine"]


@pytest.mark.parametrize("service_monitor", [False, True])
def test_every_process_of_a_pod_has_a_port_that_is_read_once(service_monitor: bool) -> None:
    groups = {"attention": {"processesPerPod": 3}}
    values = {"workerGroups": groups, "monitoring": {"podMonitor": True, "serviceMonitor": service_monitor}}
    manifests = render(values)
    endpoints = one(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"]
    ours = {each["port"]: each for each in endpoints if each["port"].startswith("moeray-")}
    assert set(ours) == {"moeray-0", "moeray-1", "moeray-2"}
    for name, pod in ray_pods(manifests).items():
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        count = {"head": 0, "attention": 3}.get(name, 1)
        assert {port: number for port, number in ports.items() if port.startswith("moeray-")} == {
            f"moeray-{place}": 9464 + place for place in range(count)
        }
    for endpoint in ours.values():
        dropped = [each for each in endpoint.get("relabelings", ()) if each["action"] == "drop"]
        assert [each["regex"] for each in dropped] == (["ingress"] if service_monitor else [])


def test_without_monitors_no_process_listens_beyond_loopback() -> None:
    off, on = render({}), render(ON)
    assert "telemetry" not in yaml.safe_load(one(off, "RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]
    shown = yaml.safe_load(one(on, "RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]["telemetry"]
    assert shown == {"metrics_host": "0.0.0.0"}
    ports = [port for pod in ray_pods(off).values() for port in pod["spec"]["containers"][0]["ports"]]
    assert not any(port["name"].startswith("moeray-") for port in ports)


def test_the_dashboards_are_what_their_script_writes() -> None:
    checked = subprocess.run(
        [sys.executable, CHART.parent / "dashboards.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert checked.returncode == 0, checked.stdout
    for text in one(render(ON), "ConfigMap", "moeray-dashboards")["data"].values():
        board = json.loads(text)
        numbers = [panel["id"] for panel in board["panels"]]
        assert len(set(numbers)) == len(numbers) > 10
        for panel in board["panels"]:
            assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_alerts_ring_when_they_should_and_not_before(tmp_path: Path) -> None:
    """By Prometheus' own evaluation: a case of alert_cases.yaml is numbers over time, and what rings at a minute."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (of Prometheus) is not installed: whether alerts ring is not tested")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(one(render(ON), "PrometheusRule")["spec"]))
    cases = yaml.safe_load(CASES.read_text())
    asked = {each["alertname"] for case in cases["tests"] for each in case["alert_rule_test"]}
    assert asked == {rule["alert"] for rule in rules()}, "a case for each alert"
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(cases | {"rule_files": ["rules.yaml"]}))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "cases.yaml"]):
        done = subprocess.run(
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_panels_are_promql(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (of Prometheus) is not installed: panels' queries are not parsed")
    asked = [
        {"record": f"panel:{n}", "expr": query.replace("$__rate_interval", "5m")} for n, query in enumerate(queries())
    ]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    done = subprocess.run(
        [promtool, "check", "rules", "rules.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
