"""Who has a certificate of the cluster's authority is let in, and nobody else; replaced files count at once."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import cluster_certificate, overwrite

from moeray.config import ClusterTlsConfig, ConfigError, parse_config
from moeray.mutual_tls import CertificateError, ClusterCertificate

Dial = Callable[[socket.socket], ssl.SSLSocket]


@pytest.fixture
def config(tmp_path: Path) -> ClusterTlsConfig:
    return cluster_certificate(tmp_path / "ours")


def is_let_in(server: ClusterCertificate, dial: Dial) -> bool:
    """Whether a byte comes back over a connection that `dial` encrypts."""
    theirs, ours = socket.socketpair()
    for each in (theirs, ours):
        each.settimeout(10)

    def serve() -> None:
        try:
            with server.accepting(theirs) as connection:
                connection.do_handshake()
                connection.sendall(connection.recv(1))
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours, dial(ours) as connection:
            connection.sendall(b"x")
            return connection.recv(1) == b"x"
    except OSError:
        return False
    finally:
        thread.join()


def test_members_of_one_cluster_are_let_in_wherever_they_are(config: ClusterTlsConfig) -> None:
    assert is_let_in(ClusterCertificate(config), ClusterCertificate(config).dialled)


def test_who_has_no_certificate_of_the_authority_is_not(config: ClusterTlsConfig, tmp_path: Path) -> None:
    server = ClusterCertificate(config)
    other = cluster_certificate(tmp_path / "theirs")
    trusting = replace(other, ca_file=config.ca_file)
    assert not is_let_in(server, ClusterCertificate(other).dialled)
    assert not is_let_in(server, ClusterCertificate(trusting).dialled), "it trusts us, and we do not know it"
    anonymous = ssl.create_default_context(cafile=config.ca_file)
    assert not is_let_in(server, lambda plain: anonymous.wrap_socket(plain, server_hostname="moeray"))
    anonymous.maximum_version = ssl.TLSVersion.TLSv1_2
    assert not is_let_in(server, lambda plain: anonymous.wrap_socket(plain, server_hostname="moeray"))


def test_a_server_of_another_cluster_or_name_is_not_spoken_to(config: ClusterTlsConfig, tmp_path: Path) -> None:
    own = ClusterCertificate(config)
    other = cluster_certificate(tmp_path / "theirs")
    assert not is_let_in(ClusterCertificate(replace(other, ca_file=config.ca_file)), own.dialled)
    assert not is_let_in(own, ClusterCertificate(replace(config, name="another")).dialled)


def test_replaced_files_count_at_the_next_handshake(config: ClusterTlsConfig, tmp_path: Path) -> None:
    server = ClusterCertificate(config)
    before = ClusterCertificate(copied(config, tmp_path / "before"))
    after = cluster_certificate(tmp_path / "after")
    for key in overwrite(config, after):
        if key != "ca_file":
            assert is_let_in(server, before.dialled), "a key without its certificate: those from before count"
    assert is_let_in(server, ClusterCertificate(after).dialled)
    assert not is_let_in(server, before.dialled)


def copied(config: ClusterTlsConfig, folder: Path) -> ClusterTlsConfig:
    folder.mkdir()
    files = {key: shutil.copy(getattr(config, key), folder / key) for key in ("cert_file", "key_file", "ca_file")}
    return replace(config, **{key: str(path) for key, path in files.items()})


@pytest.mark.parametrize("key", ["cert_file", "key_file", "ca_file"])
def test_a_file_that_cannot_be_used_is_named(config: ClusterTlsConfig, tmp_path: Path, key: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    other = cluster_certificate(tmp_path / "theirs")
    for path in (bad, tmp_path / "missing", Path(other.key_file)):
        with pytest.raises(CertificateError, match=r"cluster_tls\.\w+_file /"):
            ClusterCertificate(replace(config, **{key: str(path)}))


def test_the_three_files_belong_together_and_nccl_has_no_encryption(config: ClusterTlsConfig) -> None:
    assert ClusterCertificate.of(ClusterTlsConfig()) is None
    with pytest.raises(ConfigError, match=r"cluster_tls\.ca_file: cert_file, key_file and ca_file belong together"):
        parse_config({"cluster_tls": {"cert_file": "a", "key_file": "b"}})
    files = {"cert_file": "a", "key_file": "b", "ca_file": "c"}
    assert parse_config({"cluster_tls": files}).cluster_tls == ClusterTlsConfig("a", "b", "c", "moeray")
    with pytest.raises(ConfigError, match="NCCL has no encryption"):
        parse_config({"cluster_tls": files, "transport": {"backend": "nccl"}})
