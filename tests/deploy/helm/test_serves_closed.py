"""A release that is closed, as the chart's defaults and `tls` have it, serves those who may ask."""

from __future__ import annotations

import secrets
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import Authority
from deploy.helm.chart import one, overlaid, values_of
from deploy.helm.serving import Served, ask, served, status_of, wait_until
from redis_server import missing

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=f"Redis: {missing()}"),
]


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Served]:
    """The CPU demo with tenants and both kinds of TLS."""
    authority = Authority(tmp_path / "authority")
    inside, front = authority.sign("moeray"), authority.sign("front")
    secret_values = {
        ("inside", "tls.crt"): inside.cert.read_text(), ("inside", "tls.key"): inside.key.read_text(),
        ("inside", "ca.crt"): authority.file.read_text(),
        ("front", "tls.crt"): front.cert.read_text(), ("front", "tls.key"): front.key.read_text(),
        ("moeray-tenants", "cache-salt"): secrets.token_hex(32),
    }  # fmt: skip
    more = {
        "config": {"tenants": {"auth": "required"}},
        "tls": {"ingress": {"existingSecret": "front"}, "cluster": {"existingSecret": "inside"}},
    }
    values = overlaid(values_of("values-cpu-demo.yaml"), more)
    with served(values, secret_values, tmp_path, authority.file) as it:
        yield it


def test_a_closed_release_serves_tenants_made_in_its_pods_over_tls(closed: Served) -> None:
    """As the notes say: `moeray tenant create` with the cluster.yaml that every pod has."""
    pods = closed.pods
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(closed)
    assert status_of(closed.url.replace("https", "http")) != 200

    text = one(closed.manifests, "ConfigMap")["data"]["cluster.yaml"]
    file = pods.folder / "cluster.yaml"
    file.write_text(pods.placed(text))
    (spec,) = (each for each in pods.cluster["workerGroupSpecs"] if each["groupName"] == "ingress")
    done = subprocess.run(
        [sys.executable, "-m", "moeray.cli", "tenant", "create", "first", "-f", str(file)],
        env=pods.environment(spec["template"], pods.groups["ingress"][0]),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    key = done.stdout.strip()
    wait_until(lambda: answers(closed, key), 30, "an ingress that knows the key")
    assert len(ask(closed, key)) > 20


def answers(closed: Served, key: str) -> bool:
    """Whether this key is taken: an ingress learns of a new one within a second."""
    try:
        return bool(ask(closed, key))
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise
        return False
