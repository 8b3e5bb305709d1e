"""What an attacker on the network sees and reaches, where the cluster has certificates."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from certificates import cluster_certificate
from test_transport import SMALL, assert_equals_oracle, serve
from transport_peers import Peer, eventually, spec_of, spread, use_links

from moeray.config import ClusterTlsConfig
from moeray.transport import PeerLost, TransportError, connect

SLOTS = (4, 4)
WORD = 0x3C5A  # bfloat16, about 0.0133


@pytest.fixture(autouse=True)
def _tls() -> Iterator[None]:
    use_links("tls")
    yield
    use_links("channel")


class Wiretap:
    """Listens in for one address, and keeps what it hears."""

    def __init__(self, address: str) -> None:
        self._to = address
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.heard = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            host, port = self._to.split(":")
            far = socket.create_connection((host, int(port)))
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either end may hang up
            while data := source.recv(1 << 16):
                self.heard += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_rows_cannot_be_read_on_the_way(groups: list[Peer]) -> None:
    """Every row goes through the wiretaps, and none is heard; neither are names."""
    _, addresses = serve(groups, SMALL, SLOTS)
    taps = [Wiretap(address) for address in addresses]
    transport = connect(spec_of(SMALL, "a-shard-with-a-name"), spread(SMALL, SLOTS), [tap.address for tap in taps])
    x_TD = torch.full((300, SMALL.hidden_size), WORD, dtype=torch.int16).view(torch.bfloat16)
    _, ids_TK, weights_TK = SMALL.batch(300)
    expected = SMALL.oracle().combine(SMALL.oracle().dispatch(0, x_TD, ids_TK, weights_TK))
    assert torch.equal(transport.combine(transport.dispatch(0, x_TD, ids_TK, weights_TK)), expected)
    transport.close()
    heard = bytes(b"".join(tap.heard for tap in taps))
    assert len(heard) > x_TD.nbytes, "the rows came this way"
    for secret in (x_TD[0, :8].view(torch.uint8).numpy().tobytes(), b"a-shard-with-a-name", b"fingerprint"):
        assert secret not in heard


def test_a_stranger_is_refused_and_the_group_goes_on_serving(groups: list[Peer], tmp_path: Path) -> None:
    key, addresses = serve(groups, SMALL, SLOTS)
    stranger = cluster_certificate(tmp_path / "theirs")
    ours = spec_of(SMALL).tls
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    for tls in (ClusterTlsConfig(), stranger, replace(stranger, ca_file=ours.ca_file)):
        with pytest.raises((PeerLost, TransportError)):
            connect(replace(spec_of(SMALL), tls=tls, connect_timeout_s=3), spread(SMALL, SLOTS), addresses)
        assert_equals_oracle(transport, SMALL)
    transport.close()
    assert eventually(lambda: not groups[0].ask("shards", key) and not groups[1].ask("shards", key))


def test_a_half_done_handshake_holds_up_nobody(groups: list[Peer]) -> None:
    key, addresses = serve(groups, SMALL, SLOTS)
    host, port = addresses[0].split(":")
    with socket.create_connection((host, int(port))) as silent:
        silent.sendall(b"\x16\x03\x01")
        transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
        assert_equals_oracle(transport, SMALL)
        silent.settimeout(20)
        assert silent.recv(1) == b"", "the group hangs up"
    transport.close()
    assert eventually(lambda: not groups[0].ask("shards", key))


def test_a_shard_without_its_files_says_which(groups: list[Peer]) -> None:
    _, addresses = serve(groups, SMALL, SLOTS)
    tls = replace(spec_of(SMALL).tls, key_file="/nowhere/key.pem")
    with pytest.raises(TransportError, match=r"cluster_tls\.cert_file .*No such file|cluster_tls\.key_file"):
        connect(replace(spec_of(SMALL), tls=tls), spread(SMALL, SLOTS), addresses)
