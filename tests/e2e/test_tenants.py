"""Tenants and TLS as an operator sets them up: by cluster.yaml and the `moeray` command alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from certificates import Authority, cluster_certificate
from clusters import Cluster, cluster, wait_for

QUESTION = "What is an expert group?"


def moeray(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moeray.cli", *arguments]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False)


def test_a_tenant_from_its_key_to_its_usage(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    signed = authority.sign("moeray")
    config = {
        "attention": {"num_shards": 1},
        "experts": {"num_groups": 0},
        "ingress": {"tls": {"cert_file": str(signed.cert), "key_file": str(signed.key)}},
        "tenants": {"auth": "required", "file": str(tmp_path / "tenants.yaml"), "usage_dir": str(tmp_path / "usage")},
        "cluster_tls": asdict(cluster_certificate(tmp_path / "cluster")),
    }
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    created = moeray("tenant", "create", "search", "--requests-per-minute", "3", "-f", str(file))
    assert created.returncode == 0, created.stderr

    with cluster(config) as running:
        assert running.http.startswith("https://")

        def chat(*arguments: str, key: str = created.stdout.strip()) -> subprocess.CompletedProcess[str]:
            env = {"MOERAY_STATE_DIR": running.env["MOERAY_STATE_DIR"], "MOERAY_API_KEY": key}
            return moeray("chat", "--ca-file", str(authority.file), *arguments, QUESTION, **env)

        for arguments in ((), ("--http",)):
            answer = chat(*arguments)
            assert answer.returncode == 0 and "owns a slice" in answer.stdout, answer.stderr
            nobody = chat(*arguments, key="")
            assert nobody.returncode == 1 and "API key is needed" in nobody.stderr
        assert chat().returncode == 0
        assert "requests_per_minute" in chat().stderr

        assert moeray("tenant", "revoke", "search", "--all", "-f", str(file)).returncode == 0
        wait_for(lambda: "revoked" in chat().stderr, 60, "the revoked key is refused")
        _assert_logs_hold_no_key(running, created.stdout.strip())

    used = json.loads(moeray("usage", "--json", "-f", str(file)).stdout)
    row = used["rows"]["search"]
    assert (row["requests"], row["failed"], used["lost"], used["torn"]) == (3, 0, 0, 0)
    assert row["completion_tokens"] == 3 * 19


def _assert_logs_hold_no_key(running: Cluster, key: str) -> None:
    secret = key.rsplit("-", 1)[1].encode()
    session = Path("/tmp/ray/session_latest/logs").resolve()
    for folder in (session, Path(running.env["MOERAY_STATE_DIR"])):
        logs = [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
        assert not logs


@pytest.mark.parametrize("key", ["auth", "file"])
def test_up_without_readable_tenants_says_what_to_do(tmp_path: Path, key: str) -> None:
    tenants = {"auth": "required", "file": str(tmp_path / "none.yaml")}
    if key == "auth":
        tenants["auth"] = "maybe"
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    refused = moeray("up", "-f", str(file), MOERAY_STATE_DIR=str(tmp_path / "state"))
    assert refused.returncode in (1, 2) and "Traceback" not in refused.stderr
    assert ("moeray tenant create" if key == "file" else "tenants.auth") in refused.stderr
