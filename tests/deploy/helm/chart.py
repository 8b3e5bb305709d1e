"""The chart rendered by Helm's own engine, and how to find one's way in what it gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[3] / "helm" / "moeray"
EXAMPLES = sorted(path.name for path in CHART.glob("values-*.yaml"))
RELEASE, NAMESPACE = "moeray", "serving"
HOW = "make test-deploy installs requirements/deploy.lock"

Manifest = dict[str, Any]


def values_of(example: str) -> dict[str, Any]:
    """A values file of the chart's; "" is the defaults."""
    values: dict[str, Any] = yaml.safe_load((CHART / example).read_text()) if example else {}
    return values


def overlaid(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """As Helm lays one values file over another."""
    result = copy.deepcopy(dict(base))
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = overlaid(result[key], value) if both else copy.deepcopy(value)
    return result


def render(values: Mapping[str, Any], release: str = RELEASE) -> list[Manifest]:
    """Every object of a release, in no particular order.

    Raises:
        helm_python.HelmError: what Helm says of values or templates.
    """
    return [
        document
        for path, text in sources(values, release).items()
        if not path.endswith(".txt")
        for document in yaml.safe_load_all(text)
        if document
    ]


def sources(values: Mapping[str, Any], release: str = RELEASE) -> dict[str, str]:
    """Template path -> rendered text."""
    helm = pytest.importorskip("helm_python", reason=f"helm-python-sdk is not installed: {HOW}")
    with helm.Chart.load(str(CHART)) as chart:
        found: dict[str, str] = chart.render(dict(values), name=release, namespace=NAMESPACE)
        return found


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only object of this kind (and name)."""
    found = [each for each in manifests if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}"
    return found[0]


def serve_config(manifests: list[Manifest]) -> dict[str, Any]:
    """What KubeRay gives Ray Serve."""
    config: dict[str, Any] = yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])
    return config


def cluster_config(manifests: list[Manifest]) -> dict[str, Any]:
    """The mapping of cluster.yaml that moeray.app.build is given."""
    arguments: dict[str, Any] = serve_config(manifests)["applications"][0]["args"]
    return arguments


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(what it is, template) of every pod that comes of a release: "head", a worker group's name, "redis", "test"."""
    for each in manifests:
        if each["kind"] == "RayService":
            cluster = each["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]
            yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])
        elif each["kind"] == "StatefulSet":
            yield "redis", each["spec"]["template"]
        elif each["kind"] == "Job":
            yield "uninstall", each["spec"]["template"]
        elif each["kind"] == "Pod":
            yield "test", each


def ray_pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Templates of the head and of the worker groups."""
    return {name: pod for name, pod in pod_templates(manifests) if name not in ("redis", "uninstall", "test")}


def matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Kubernetes' label selector, as far as the chart writes them: matchLabels alone; an empty one matches all."""
    selector = selector or {}
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def containers_of(template: dict[str, Any]) -> list[dict[str, Any]]:
    """Of one pod, with those that run before."""
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]
