"""Who may listen where: ingresses of one cluster together, anybody else not."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeray.ingress.errors import PortInUse
from moeray.ingress.ports import bind, free_ports

LISTEN = (
    "import socket, sys\n"
    "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(sys.argv[1]))\n"
    "s.bind(('127.0.0.1', 0)); s.listen(); print(s.getsockname()[1], flush=True); sys.stdin.read()"
)


def listener(reuse_port: bool, *wrapper: str) -> Iterator[int]:
    """A process that listens; its port. With a wrapper it is a grandchild, as foreign to us as any."""
    command = [*wrapper, sys.executable, "-c", LISTEN, str(int(reuse_port))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        yield int(process.stdout.readline())
        process.stdin.close()


@pytest.fixture(params=[False, True], ids=["alone", "willing to share"])
def foreign_port(request: pytest.FixtureRequest) -> Iterator[int]:
    yield from listener(request.param, "sh", "-c", '"$@"; exit', "sh")


@pytest.mark.parametrize("shared", [False, True])
def test_a_foreign_process_on_the_port_is_named_with_the_key_that_sets_it(foreign_port: int, shared: bool) -> None:
    with pytest.raises(PortInUse, match=rf"ingress\.http_port: cannot listen on 127\.0\.0\.1:{foreign_port}"):
        bind("127.0.0.1", foreign_port, "ingress.http_port", shared=shared)


def test_ingresses_of_one_node_share_a_port_and_one_that_dies_leaves_the_others() -> None:
    first = bind("127.0.0.1", 0, "ingress.http_port", shared=True)
    port = first.getsockname()[1]
    first.listen()
    second = bind("127.0.0.1", port, "ingress.http_port", shared=True)
    for _ in range(20):  # the second is not ready, and gets none of them
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            first.settimeout(5)
            first.accept()[0].close()

    second.listen()
    first.close()

    with socket.create_connection(("127.0.0.1", port), timeout=5):
        second.settimeout(5)
        second.accept()[0].close()
    second.close()


def test_without_sharing_the_second_is_refused() -> None:
    with bind("127.0.0.1", 0, "ingress.http_port") as first, pytest.raises(PortInUse):
        bind("127.0.0.1", first.getsockname()[1], "ingress.http_port")


def test_a_process_of_the_same_parent_is_one_of_ours() -> None:
    program = (
        "import sys\n"
        "from subprocess import PIPE, Popen, run\n"
        "other = Popen([sys.executable, '-c', sys.argv[1], '1'], stdin=PIPE, stdout=PIPE)\n"
        "port = int(other.stdout.readline())\n"
        "sys.exit(run([sys.executable, '-c', sys.argv[2], str(port)]).returncode)"
    )
    ours = 'import sys; from moeray.ingress.ports import bind; bind("127.0.0.1", int(sys.argv[1]), "key", shared=True)'
    assert subprocess.run([sys.executable, "-c", program, LISTEN, ours], timeout=60).returncode == 0


def test_free_ports_differ_and_are_none_that_an_outgoing_connection_gets() -> None:
    ports = free_ports("127.0.0.1", 300)
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 300 and max(ports) < first_of_connections


def test_a_port_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    (taken,) = free_ports("127.0.0.1", 1)
    monkeypatch.setattr(random.SystemRandom, "sample", lambda _, ports, count: [taken, taken + 1])
    with socket.create_server(("127.0.0.1", taken)), pytest.raises(OSError, match=r"1 free ports on 127\.0\.0\.1"):
        free_ports("127.0.0.1", 2)
