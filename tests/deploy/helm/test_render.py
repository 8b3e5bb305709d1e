"""Whatever values: what is rendered is what Kubernetes and the custom resources know, and what it was before."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.helm.chart import CHART, EXAMPLES, overlaid, render, values_of
from deploy.helm.schemas import WITHOUT_SCHEMA, errors_of

GOLDEN = Path(__file__).parent / "golden"
KUBERNETES = ("1.29", "1.33", "1.36")
ALL_CRDS = {
    "monitoring": {
        "podMonitor": True, "serviceMonitor": True, "prometheusRule": True, "labels": {"release": "prometheus"},
        "rules": [{"name": "own", "rules": [{"alert": "NoIngress", "expr": "up == 0", "for": "5m"}]}],
    },
    "gateway": {
        "enabled": True, "parentRefs": [{"name": "internal"}], "httpHosts": ["a.example"], "grpcHosts": ["b.example"]
    },
    "tls": {
        "ingress": {"clientCaSecret": "clients", "certManager": {"enabled": True, "issuerRef": {"name": "company"}}},
        "cluster": {"certManager": {"enabled": True, "issuerRef": {"name": "moeray"}}},
    },
    "autoscaling": {"enabled": True},
}  # fmt: skip
"""Everything that needs custom resources of others, asked for."""
NO_CRDS: dict[str, Any] = {
    "monitoring": {"podMonitor": False, "serviceMonitor": False, "prometheusRule": False},
    "gateway": {"enabled": False},
    "tls": {"ingress": {"certManager": {"enabled": False}}, "cluster": {"certManager": {"enabled": False}}},
}


def laid_over(example: str, more: dict[str, Any]) -> dict[str, Any]:
    """NCCL and cluster_tls exclude each other: examples with GPUs keep their own."""
    values = overlaid(values_of(example), more)
    if values.get("config", {}).get("transport", {}).get("backend") == "nccl":
        values["tls"].pop("cluster", None)
    return values


@pytest.mark.parametrize("kubernetes", KUBERNETES)
@pytest.mark.parametrize("crds", [NO_CRDS, ALL_CRDS], ids=["no CRDs", "all CRDs"])
@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_every_object_is_what_its_schema_says(example: str, crds: dict[str, Any], kubernetes: str) -> None:
    manifests = render(laid_over(example, crds))
    wrong = {f"{each['kind']} {each['metadata']['name']}": errors_of(each, kubernetes) for each in manifests}
    assert {name: errors for name, errors in wrong.items() if errors} == {}


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_what_needs_others_custom_resources_comes_only_when_asked_for(example: str) -> None:
    foreign = ("monitoring.coreos.com", "gateway.networking.k8s.io", "cert-manager.io")
    without, with_all = (
        {(each["apiVersion"].split("/")[0], each["kind"]) for each in render(laid_over(example, crds))}
        for crds in (NO_CRDS, ALL_CRDS)
    )
    assert {kind for group, kind in without if group in foreign} == set()
    assert {kind for group, kind in with_all if group in foreign} == {
        "PodMonitor", "ServiceMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute", "Certificate"
    }  # fmt: skip


def test_the_schemas_refuse_what_they_do_not_know() -> None:
    """Else the test above could not fail."""
    (service,) = (each for each in render({}) if each["kind"] == "RayService")
    assert errors_of(service, KUBERNETES[0]) == []
    worker = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    worker["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    worker["replicas"] = "two"
    assert len(errors_of(service, KUBERNETES[0])) == 2
    budget = next(each for each in render({}) if each["kind"] == "PodDisruptionBudget")
    budget["spec"]["maxUnavailabel"] = 1
    assert errors_of(budget, KUBERNETES[0]) != []
    assert {("cert-manager.io/v1", "Certificate")} == WITHOUT_SCHEMA, "name what is not checked in docs/kubernetes.md"


@pytest.mark.parametrize("example", ["", *EXAMPLES])
def test_what_is_rendered_is_what_was_agreed(example: str) -> None:
    """MOERAY_WRITE_GOLDEN=1 writes the files anew; read their difference before you commit it."""
    manifests = sorted(render(values_of(example)), key=lambda each: (each["kind"], each["metadata"]["name"]))
    for each in manifests:
        if each["metadata"]["name"].endswith("-dashboards"):  # what their script writes, thousands of lines
            each["data"] = sorted(each["data"])
    text = yaml.safe_dump_all(manifests, sort_keys=True, width=120)
    path = GOLDEN / (example or "values.yaml")
    if os.environ.get("MOERAY_WRITE_GOLDEN"):
        path.write_text(text)
    difference = difflib.unified_diff(path.read_text().splitlines(), text.splitlines(), str(path), "now", lineterm="")
    assert list(difference) == []


def test_the_chart_passes_helms_lint() -> None:
    helm = pytest.importorskip("helm_python")
    messages = helm.lint(str(CHART), strict=True)["messages"]
    assert [each for each in messages if "icon" not in each["error"]] == []


def test_the_same_values_render_the_same_text() -> None:
    first, second = (json.dumps(render(values_of(EXAMPLES[0])), sort_keys=True) for _ in range(2))
    assert first == second


def test_readme_and_schema_say_what_values_and_config_say() -> None:
    done = subprocess.run(
        [sys.executable, CHART.parent / "document.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
