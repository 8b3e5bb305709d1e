"""`helm upgrade` from the releases before: their values are taken, and nothing is asked of Kubernetes that it refuses.

A folder of `releases` is what an earlier chart had: its values files, and what it rendered of some of them (without the
data of ConfigMaps). It is written once, when the next version begins, and never changed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.helm.chart import CHART, Manifest, matches, one, pod_templates, render

RELEASES = Path(__file__).parent / "releases"
OBJECTS = sorted(RELEASES.glob("*/objects/*.yaml"))
VALUES = sorted(RELEASES.glob("*/values/*.yaml"))
KEPT = {"RayService", "StatefulSet", "Service", "PersistentVolumeClaim", "ServiceAccount"}
"""Kinds whose loss in an upgrade loses data, streams or the addresses that clients have."""
STATEFUL_SET = ("replicas", "template", "updateStrategy", "revisionHistoryLimit", "minReadySeconds", "ordinals",
                "persistentVolumeClaimRetentionPolicy")  # fmt: skip
"""What of a StatefulSet's spec may be changed (Kubernetes' API refuses the rest)."""


def name_of(path: Path) -> str:
    return f"{path.parents[1].name}/{path.name}"


def before_and_now(path: Path) -> tuple[list[Manifest], list[Manifest]]:
    """What an earlier chart rendered of a values file, and what this one does of the same."""
    before = [each for each in yaml.safe_load_all(path.read_text()) if each]
    values = RELEASES / path.parents[1].name / "values" / path.name
    return before, render(yaml.safe_load(values.read_text()) if values.exists() else {})


def by_name(manifests: list[Manifest]) -> dict[tuple[str, str], Manifest]:
    return {(each["kind"], each["metadata"]["name"]): each for each in manifests if not is_hook(each)}


def is_hook(manifest: Manifest) -> bool:
    """Helm makes those anew each time."""
    return "helm.sh/hook" in manifest["metadata"].get("annotations", {})


def unchangeable(manifest: Manifest) -> Any:
    """What Kubernetes would refuse to change of an object."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "StatefulSet":
        for claim in spec.get("volumeClaimTemplates", ()):
            labels = claim["metadata"].get("labels", {})
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels), "they change with each chart"
        return {key: value for key, value in spec.items() if key not in STATEFUL_SET}
    if manifest["kind"] in ("Job", "Pod", "PersistentVolumeClaim"):
        return spec
    return manifest.get("value") if manifest["kind"] == "PriorityClass" else None


@pytest.mark.parametrize("path", VALUES, ids=name_of)
def test_the_values_of_an_earlier_release_are_taken(path: Path) -> None:
    assert one(render(yaml.safe_load(path.read_text())), "RayService")


@pytest.mark.parametrize("path", OBJECTS, ids=name_of)
def test_nothing_is_changed_that_kubernetes_refuses_to_change(path: Path) -> None:
    before, now = (by_name(manifests) for manifests in before_and_now(path))
    assert {key for key in before.keys() - now.keys() if key[0] in KEPT} == set()
    for key in before.keys() & now.keys():
        assert before[key]["apiVersion"] == now[key]["apiVersion"], key
        assert unchangeable(before[key]) == unchangeable(now[key]), key


@pytest.mark.parametrize("path", OBJECTS, ids=name_of)
def test_services_and_budgets_of_before_find_the_pods_of_now_and_the_other_way_round(path: Path) -> None:
    """While KubeRay replaces the cluster there are pods of both."""
    both = before_and_now(path)
    for manifests, pods in (both, both[::-1]):
        labels = [pod["metadata"].get("labels", {}) for name, pod in pod_templates(pods) if name != "test"]
        for each in manifests:
            if each["kind"] == "Service":
                assert any(matches({"matchLabels": each["spec"]["selector"]}, found) for found in labels), each
            elif each["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
                selector = each["spec"].get("selector") or each["spec"].get("podSelector")
                assert any(matches(selector, found) for found in labels), each["metadata"]["name"]


def test_an_upgrade_that_changes_no_pod_replaces_no_cluster() -> None:
    """KubeRay starts a second cluster beside the first when `rayClusterConfig` changes; a new chart alone must not."""
    before, now = before_and_now(RELEASES / "0.1.0" / "objects" / "values-cpu-demo.yaml")
    was, is_now = (one(manifests, "RayService")["spec"]["rayClusterConfig"] for manifests in (before, now))
    assert was == is_now


def test_every_release_before_this_one_is_here() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    major, minor, _ = (int(part) for part in version.split("."))
    assert (major, minor) != (0, 1), "0.1.0 is in releases: this chart is later"
    assert {path.name for path in RELEASES.iterdir()} == {f"0.{each}.0" for each in range(1, minor)}


def test_a_change_that_kubernetes_refuses_would_be_found() -> None:
    """Else the tests above could not fail."""
    redis = one(render({}), "StatefulSet")
    changed = copy.deepcopy(redis)
    changed["spec"]["serviceName"] = "other"
    assert unchangeable(redis) != unchangeable(changed)
    changed = copy.deepcopy(redis)
    changed["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    assert unchangeable(redis) == unchangeable(changed)
