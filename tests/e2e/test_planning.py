"""`moeray plan --calibrate` on a running cluster: what it counts is what happened, and its numbers plan."""

from __future__ import annotations

import json
from pathlib import Path

from clusters import Cluster

from moeray.planning import read_efficiency

PLANS = Path(__file__).parents[2] / "docs" / "plans"
TINY = str(PLANS / "moeray-tiny.yaml")


def test_the_running_cluster_is_measured_and_its_numbers_plan(shared_cluster: Cluster, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    done = shared_cluster.moeray(
        "plan", "-f", TINY, "--calibrate", str(found), "--batches", "1,2,4", "--json", timeout_s=400
    )
    assert done.returncode == 0, done.stderr
    measured = [each["measured"] for each in json.loads(done.stdout)]
    assert all(each["topology"]["attention"] == each["topology"]["groups"] == 2 for each in measured)
    tokens = [each["tokens"] for each in measured]
    assert tokens == sorted(tokens) and 0.5 <= tokens[0] <= 2.5 and 2 <= tokens[-1] <= 6  # the router's share of each
    for each in measured:
        assert 0 < each["expert"] < each["call"] < each["step"] and each["context"] > 0
    assert read_efficiency(found).layer_us > 0
    planned = shared_cluster.moeray("plan", "-f", TINY, "--efficiency", str(found))
    assert planned.returncode == 0 and "expert parallelism" in planned.stdout


def test_a_plan_of_another_model_is_not_compared_with_this_cluster(shared_cluster: Cluster) -> None:
    done = shared_cluster.moeray("plan", "-f", str(PLANS / "v4-flash.yaml"), "--measure")
    assert done.returncode == 2 and "43 layers with experts, the cluster's model" in done.stderr
