"""`cluster_tls`: a cluster that talks over TLS answers, heals and takes renewed files; strangers are not served."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from certificates import cluster_certificate, overwrite
from clusters import Cluster, cluster, kill
from streams import text_of, wait_until_healed

from moeray.config import ClusterTlsConfig

COPIES = {"num_groups": 2, "num_redundant": 16, "min_copies": 2, "regroup_s": 5}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ClusterTlsConfig:
    return cluster_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def encrypted(certificate: ClusterTlsConfig) -> Iterator[Cluster]:
    """Rows go over the network, as between nodes."""
    config = {
        "attention": {"num_shards": 1}, "experts": COPIES, "transport": {"channel": "off"},
        "cluster_tls": asdict(certificate),
    }  # fmt: skip
    with cluster(config) as running:
        yield running


def certificate_is_asked_for(address: tuple[str, int]) -> bool:
    """Whether TLS is spoken there, and nobody without a certificate is served."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(address, timeout=10) as plain, context.wrap_socket(plain) as connection:
        try:
            connection.sendall(b"x" * 100)
            return connection.recv(1) == b""
        except ssl.SSLError as error:
            return "CERTIFICATE_REQUIRED" in str(error)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_streams_go_on_over_renewed_certificates(
    encrypted: Cluster, certificate: ClusterTlsConfig, tmp_path: Path
) -> None:
    undisturbed = text_of(encrypted)
    (shard,) = encrypted.processes("attention_shard")
    assert set(shard["hop"]["links"]) == {"tls"}
    for process in (shard, *encrypted.processes("expert_group")):
        host, port = process["address"].rsplit(":", 1)
        assert certificate_is_asked_for((host, int(port)))

    before = encrypted.processes("expert_group")
    assert len(list(overwrite(certificate, cluster_certificate(tmp_path)))) == 3
    assert text_of(encrypted, lambda: kill(before[1]["pid"])) == undisturbed
    wait_until_healed(encrypted, generation=2, shards=1)
    assert before[1]["id"] not in {group["id"] for group in encrypted.processes("expert_group")}
    assert text_of(encrypted) == undisturbed
