"""Death, hangs and strangers: a typed error in time for the shard, and a group that goes on serving."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_transport import SMALL, assert_equals_oracle, serve
from transport_peers import Peer, Shard, eventually, spec_of, spread

from moeray.mutual_tls import ClusterCertificate
from moeray.transport import PeerLost, Transport, TransportError, connect
from moeray.transport.handshake import Hello, receive_message, send_message

SLOTS = (4, 4)


def error_of(call: Callable[[], Any]) -> tuple[PeerLost, float]:
    started = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        call()
    return caught.value, time.monotonic() - started


def layer_call(transport: Transport, num_tokens: int = 5) -> None:
    transport.combine(transport.dispatch(0, *SMALL.batch(num_tokens)))


def assert_poisoned(transport: Transport, group: int) -> None:
    error, took_s = error_of(lambda: layer_call(transport))
    assert error.group == group
    assert took_s < 0.2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_group_killed_in_the_middle_of_a_call_is_named_within_a_second(
    mortal_groups: list[Peer], links: str, victim: int
) -> None:
    _, fast = serve(mortal_groups, SMALL, SLOTS)
    _, slow = serve(mortal_groups, SMALL, SLOTS, delay_s=30.0)
    addresses = [slow[group] if group == victim else fast[group] for group in range(2)]
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        mortal_groups[victim].kill()

    timer = threading.Timer(0.3, kill)
    timer.start()
    error, _ = error_of(lambda: layer_call(transport))
    assert time.monotonic() - killed_at[0] < 1.0
    assert error.group == victim
    assert_poisoned(transport, victim)


def test_survivors_are_freed_although_the_error_is_kept(mortal_groups: list[Peer], links: str) -> None:
    """The error's traceback must not keep the old connections alive: then nobody could come back."""
    key, addresses = serve(mortal_groups, SMALL, SLOTS)
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    layer_call(transport)
    mortal_groups[0].kill()
    kept, _ = error_of(lambda: [layer_call(transport) for _ in range(100)])
    assert kept.group == 0
    assert eventually(lambda: mortal_groups[1].ask("shards", key) == [])
    assert kept.__traceback__ is not None


@pytest.mark.parametrize("how", ["close", "forget"])
def test_ending_with_a_call_in_flight_frees_the_groups(groups: list[Peer], links: str, how: str) -> None:
    key, addresses = serve(groups, SMALL, SLOTS)
    for num_tokens in (1, 5, 200, 700, 2000) * 3:  # replies arrive before, while and after the transport ends
        transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
        handle = transport.dispatch(0, *SMALL.batch(num_tokens))
        if how == "forget":
            del transport
            continue
        transport.close()
        with pytest.raises(TransportError, match="closed"):
            transport.combine(handle)
    assert eventually(lambda: not groups[0].ask("shards", key) and not groups[1].ask("shards", key))


def test_a_group_refuses_by_itself_whatever_the_shard_thinks(groups: list[Peer], links: str) -> None:
    key, addresses = serve(groups, SMALL, (8,))
    host, port = addresses[0].split(":")
    identity = replace(SMALL.identity, fingerprint="other")
    hello = Hello(
        sender="shard x", backend="gloo", group=0, generation=1, inline_rows=4, max_tokens=9, identity=identity
    )
    deadline = time.monotonic() + 5
    certificate = ClusterCertificate.of(spec_of(SMALL).tls)
    with socket.create_connection((host, int(port))) as plain:
        connection = plain if certificate is None else certificate.dialled(plain)
        send_message(connection, hello.to_json(), deadline)
        answer = receive_message(connection, deadline)
        assert answer["refused"].startswith("fingerprint is 'other' at shard x, ")
        assert connection.recv(1) == b""
    assert groups[0].ask("shards", key) == []


def test_a_group_that_died_while_idle_is_noticed_by_the_next_call(mortal_groups: list[Peer], links: str) -> None:
    _, addresses = serve(mortal_groups, SMALL, SLOTS)
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    mortal_groups[1].kill()
    mortal_groups[1].process.join()
    assert_poisoned(transport, 1)


def test_a_stopped_group_is_lost_after_the_timeout_and_named(mortal_groups: list[Peer], links: str) -> None:
    _, addresses = serve(mortal_groups, SMALL, SLOTS)
    transport = connect(spec_of(SMALL, timeout_s=0.5), spread(SMALL, SLOTS), addresses)
    mortal_groups[1].kill(signal.SIGSTOP)
    error, took_s = error_of(lambda: layer_call(transport))
    assert (error.group, error.reason) == (1, "no answer within 0.5 s")
    assert 0.4 < took_s < 1.5
    assert_poisoned(transport, 1)
    mortal_groups[1].kill(signal.SIGCONT)


def test_a_shard_reconnects_to_the_survivors_under_a_new_placement(mortal_groups: list[Peer], links: str) -> None:
    _, addresses = serve(mortal_groups, SMALL, SLOTS)
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    mortal_groups[1].kill()
    error_of(lambda: [layer_call(transport) for _ in range(100)])
    _, alone = serve(mortal_groups, SMALL, (8,))
    again = connect(spec_of(SMALL), spread(SMALL, (8,)), alone)
    assert_equals_oracle(again, SMALL, (5, 100))
    again.close()


def test_a_killed_shard_frees_its_group_which_serves_the_others(mortal_group: Peer, links: str) -> None:
    key, addresses = serve([mortal_group], SMALL, (8,))
    transport = connect(spec_of(SMALL, "survivor"), spread(SMALL, (8,)), addresses)
    doomed = Peer(Shard)
    doomed.ask("connect", spec_of(SMALL, "doomed"), spread(SMALL, (8,)), addresses)
    doomed.tell("loop", SMALL)
    assert eventually(
        lambda: any(name == "shard doomed" and calls > 3 for name, calls, _ in mortal_group.ask("shards", key))
    )
    doomed.kill()
    assert_equals_oracle(transport, SMALL, (5, 100))
    assert eventually(lambda: [name for name, *_ in mortal_group.ask("shards", key)] == ["shard survivor"])
    transport.close()
    doomed.end()


def test_a_stopped_shard_holds_up_nobody(mortal_group: Peer, links: str) -> None:
    _, addresses = serve([mortal_group], SMALL, (8,))
    stopped = Peer(Shard)
    stopped.ask("connect", spec_of(SMALL, "stopped"), spread(SMALL, (8,)), addresses)
    stopped.tell("loop", SMALL)
    time.sleep(0.1)
    stopped.kill(signal.SIGSTOP)
    transport = connect(spec_of(SMALL), spread(SMALL, (8,)), addresses)
    assert_equals_oracle(transport, SMALL, (5, 100))
    transport.close()
    stopped.end()


def test_a_stopped_server_is_noticed_by_the_shards_next_call(groups: list[Peer], links: str) -> None:
    key, addresses = serve(groups, SMALL, SLOTS)
    transport = connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)
    layer_call(transport)
    groups[1].tell("stop", key)
    time.sleep(0.1)
    assert_poisoned(transport, 1)
    assert groups[1]._pipe.recv() == (True, None)
    with pytest.raises(PeerLost, match="no handshake with"):
        connect(spec_of(SMALL), spread(SMALL, SLOTS), addresses)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 5000,
        b"\0\0\0\x02[]",
        b"\0\0\0\x04null",
        b"\0\0\xff\xff{",
    ],
)
def test_strangers_cost_the_group_nothing(groups: list[Peer], links: str, data: bytes) -> None:
    _, addresses = serve(groups, SMALL, (8,))
    host, port = addresses[0].split(":")
    stranger = socket.create_connection((host, int(port)))
    stranger.sendall(data)
    transport = connect(spec_of(SMALL), spread(SMALL, (8,)), addresses)
    assert_equals_oracle(transport, SMALL, (5,))
    transport.close()
    stranger.close()


def test_many_silent_strangers_do_not_keep_a_shard_out(groups: list[Peer], links: str) -> None:
    _, addresses = serve(groups, SMALL, (8,))
    host, port = addresses[0].split(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(50)]
    transport = connect(spec_of(SMALL), spread(SMALL, (8,)), addresses)
    transport.close()
    for stranger in strangers:
        stranger.close()


def test_an_address_where_nobody_listens_is_a_lost_group() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLost, match=f"expert group 0 lost: no handshake with 127.0.0.1:{port}"):
        connect(spec_of(SMALL), spread(SMALL, (8,)), [f"127.0.0.1:{port}"])


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1:http"])
def test_an_address_that_is_none_is_a_lost_group(address: str) -> None:
    with pytest.raises(PeerLost, match="expert group 0 lost"):
        connect(spec_of(SMALL), spread(SMALL, (8,)), [address])


def test_a_silent_listener_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        with pytest.raises(PeerLost):
            connect(
                spec_of(SMALL, connect_timeout_s=0.3), spread(SMALL, (8,)), [f"127.0.0.1:{listener.getsockname()[1]}"]
            )
        assert time.monotonic() - started < 2


def test_a_listener_that_is_no_group_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TransportError, match="expert group 0"):
            connect(spec_of(SMALL), spread(SMALL, (8,)), [f"127.0.0.1:{listener.getsockname()[1]}"])
        thread.join()
