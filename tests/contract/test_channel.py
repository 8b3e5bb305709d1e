"""What only the same-node channel promises: whom it talks to, how it notices an end, and that it is used at all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from test_transport import SMALL, assert_equals_oracle, connected, serve
from test_transport_faults import error_of, layer_call
from transport_peers import NUM_LAYERS, Peer, Shard, eventually, spec_of, spread

from moeray.transport import connect
from moeray.transport.all_to_all import AllToAllTransport
from moeray.transport.arena import Arena
from moeray.transport.channel import CALL, ChannelListener, GroupChannel, open_channel, share_arena, user_of
from moeray.transport.communicator import LinkBroken
from moeray.transport.handshake import Hello, receive_message, send_message

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it becomes another user")


def in_child(work: object) -> int:
    """Run in a process of another user; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(STRANGER, STRANGER, STRANGER)
            os._exit(int(work()))  # type: ignore[operator]
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@as_root
@pytest.mark.parametrize(("users", "reached"), [("same_user", False), ("any_user", True), ("off", False)])
def test_a_shard_talks_to_other_users_groups_only_if_told_to(users: str, reached: bool) -> None:
    listener = ChannelListener("any_user")
    assert in_child(lambda: open_channel(listener.name, users) is not None) == reached  # type: ignore[arg-type]
    listener.close()


@as_root
def test_a_group_sends_strangers_away_and_still_takes_its_shard() -> None:
    listener = ChannelListener("same_user")
    accepted: list[GroupChannel] = []
    waiting = threading.Thread(target=lambda: accepted.append(listener.accept("token", 30)))
    waiting.start()

    def stranger() -> bool:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(f"\0{listener.name}")
        share_arena(connection, Arena.create(4096), "token")
        connection.settimeout(20)
        return connection.recv(8) == b""

    assert in_child(stranger)
    ours = open_channel(listener.name, "same_user")
    assert ours is not None and user_of(ours) == os.geteuid()
    share_arena(ours, Arena.create(4096), "token")
    waiting.join(30)
    assert len(accepted) == 1
    ours.close()
    with pytest.raises(LinkBroken, match="closed by peer"):
        accepted[0].next_block(None)
    accepted[0].close()
    listener.close()


def test_nobody_without_the_token_takes_a_shards_place() -> None:
    """Its own user's processes, and with `any_user` all of the machine, can see where a group listens."""
    listener = ChannelListener("any_user")
    silent, wrong, right = (open_channel(listener.name, "any_user") for _ in range(3))
    assert silent is not None and wrong is not None and right is not None
    share_arena(wrong, Arena.create(4096), "guess")
    share_arena(right, Arena.create(4096), "token")
    channel = listener.accept("token", 30)
    right.send(CALL.pack(0, 64, 0, 0))
    assert len(channel.next_block(None)) == 64
    for stranger in (silent, wrong):
        stranger.settimeout(20)
        with suppress(ConnectionResetError):
            assert stranger.recv(8) == b""
        stranger.close()
    channel.close()
    listener.close()
    right.close()


LISTENER = """
import sys
from moeray.transport.channel import ChannelListener
listener = ChannelListener("same_user")
print(listener.name, flush=True)
sys.stdin.read()
"""


@as_root
@pytest.mark.parametrize(
    ("namespaces", "reached"),
    [
        (["--mount", "--pid", "--ipc", "--uts", "--fork"], True),  # another container of the same pod
        (["--net"], False),  # another pod
    ],
)
def test_containers_of_a_pod_reach_each_other_and_other_pods_do_not(namespaces: list[str], reached: bool) -> None:
    other = subprocess.Popen(
        ["unshare", *namespaces, sys.executable, "-c", LISTENER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin is not None and other.stdout is not None and other.stderr is not None
    name = other.stdout.readline().strip()
    try:
        if not name:
            pytest.skip(f"no namespaces here: {other.stderr.read().strip()}")
        connection = open_channel(name, "same_user")
        assert (connection is not None) == reached
        if connection is not None:
            connection.close()
    finally:
        other.stdin.close()
        other.wait(30)


def test_a_listener_that_is_gone_or_elsewhere_means_no_channel() -> None:
    listener = ChannelListener("same_user")
    listener.close()
    assert open_channel(listener.name, "same_user") is None
    assert open_channel("", "same_user") is None


def test_a_group_waits_for_its_shard_for_a_bounded_time() -> None:
    listener = ChannelListener("same_user")
    with pytest.raises(TimeoutError):
        listener.accept("token", 0.1)
    listener.close()


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, GroupChannel]]:
    """A shard's bare socket, and the group's end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    group = GroupChannel(theirs, Arena.create(4096))
    yield ours, group
    ours.close()
    group.close()


@pytest.mark.parametrize(
    "call",
    [
        b"x" * 7,
        CALL.pack(0, 4097, 0, 0),
        CALL.pack(-64, 64, 0, 0),
        CALL.pack(4000, 2**40, 0, 0),
    ],
)
def test_a_call_that_is_none_is_refused(channel: tuple[socket.socket, GroupChannel], call: bytes) -> None:
    ours, group = channel
    ours.send(call)
    with pytest.raises(ValueError, match=r"call of 7 bytes|in an arena of 4096"):
        group.next_block(None)


def test_a_reply_that_does_not_fit_the_call_is_refused(channel: tuple[socket.socket, GroupChannel]) -> None:
    ours, group = channel
    ours.send(CALL.pack(0, 64, 4000, 1000))
    group.next_block(None)
    with pytest.raises(ValueError, match="second message"):
        group.payload(129)
    with pytest.raises(ValueError, match="reply of 1001 bytes, room for 1000"):
        group.reply(1001)
    with pytest.raises(ValueError, match="in an arena"):
        group.reply(1000)


def test_a_group_drops_a_shard_that_sends_garbage_and_serves_the_others(groups: list[Peer]) -> None:
    key, addresses = serve(groups, SMALL, (8,))
    with connected(groups, SMALL, (8,)) as (transport, _):
        host, port = addresses[0].split(":")
        hello = Hello(
            sender="shard x",
            backend="gloo",
            group=0,
            generation=1,
            inline_rows=4,
            max_tokens=9,
            identity=SMALL.identity,
        )
        deadline = time.monotonic() + 30
        with socket.create_connection((host, int(port))) as control:
            send_message(control, hello.to_json(), deadline)
            bell = open_channel(receive_message(control, deadline)["channel"], "same_user")
            assert bell is not None
            share_arena(bell, Arena.create(1 << 16), "word")
            start = {"rank": 0, "size": 1, "store": "", "connect_timeout_s": 20, "token": "word"}
            send_message(control, start, deadline)
            assert receive_message(control, deadline) == {"ready": True}
            bell.send(CALL.pack(0, 1 << 16, 0, 0))  # zeros are no header
            assert bell.recv(8) == b""
            bell.close()
        assert eventually(lambda: not groups[0].ask("shards", key))
        assert_equals_oracle(transport, SMALL, (5, 100))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_groups_end_is_noticed_while_another_one_computes(mortal_groups: list[Peer], victim: int) -> None:
    """In whatever order they are: with messages between them it is noticed only when its turn comes."""
    _, addresses = serve(mortal_groups, SMALL, (4, 4), delay_s=60.0)
    transport = connect(spec_of(SMALL, timeout_s=50), spread(SMALL, (4, 4)), addresses)
    threading.Timer(0.3, mortal_groups[victim].kill).start()
    error, took_s = error_of(lambda: layer_call(transport))
    assert (error.group, error.reason) == (victim, "connection closed by peer")
    assert took_s < 20


def test_a_dispatch_to_a_stopped_group_does_not_wait_however_large(mortal_groups: list[Peer]) -> None:
    """Rows do not pass through a socket that could be full."""
    _, addresses = serve(mortal_groups, SMALL, (4, 4))
    transport = connect(spec_of(SMALL, timeout_s=1.0), spread(SMALL, (4, 4)), addresses)
    mortal_groups[1].kill(signal.SIGSTOP)
    handle = transport.dispatch(0, *SMALL.batch(2000))
    error, _ = error_of(lambda: transport.combine(handle))
    assert (error.group, error.reason) == (1, "no answer within 1 s")
    mortal_groups[1].kill(signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_in_a_mixed_dispatch_each_group_that_fails_is_named(
    mortal_groups: list[Peer], mixed_links: None, victim: int, how: signal.Signals
) -> None:
    _, addresses = serve(mortal_groups, SMALL, (4, 4))
    transport = connect(spec_of(SMALL, timeout_s=1.0), spread(SMALL, (4, 4)), addresses)
    assert isinstance(transport, AllToAllTransport) and transport.links == ("channel", "gloo")
    layer_call(transport)
    mortal_groups[victim].kill(how)
    error, _ = error_of(lambda: [layer_call(transport) for _ in range(1000)])
    reason = "no answer within 1 s" if how is signal.SIGSTOP else "connection closed by peer"
    assert (error.group, error.reason) == (victim, reason)
    if how is signal.SIGSTOP:
        mortal_groups[victim].kill(signal.SIGCONT)


def test_memory_of_a_killed_shard_goes_with_it(mortal_group: Peer) -> None:
    """The group maps it too, and lets go."""
    key, addresses = serve([mortal_group], SMALL, (8,))
    before = mortal_group.ask("resources")
    doomed = Peer(Shard)
    doomed.ask("connect", spec_of(SMALL, "doomed", max_tokens=1 << 16), spread(SMALL, (8,)), addresses)
    doomed.kill()
    doomed.end()
    assert eventually(lambda: not mortal_group.ask("shards", key))
    assert eventually(lambda: mortal_group.ask("resources") <= before)
    assert "moeray-arena" not in mortal_group.ask("maps")


def test_fp8_rows_give_the_same_bits_over_every_link(groups: list[Peer], links: str) -> None:
    spec = spec_of(SMALL, dispatch_format="fp8")
    _, addresses = serve(groups, SMALL, (3, 5))
    transport = connect(spec, spread(SMALL, (3, 5)), addresses)
    everything = SMALL.experts(dict.fromkeys(range(NUM_LAYERS), tuple(range(SMALL.num_experts))))
    oracle = connect(replace(spec, backend="local"), spread(SMALL, (8,)), [], everything)
    for num_tokens in (0, 1, 64, 200):
        batch = SMALL.batch(num_tokens)
        expected = oracle.combine(oracle.dispatch(1, *batch))
        assert torch.equal(transport.combine(transport.dispatch(1, *batch)), expected)
    transport.close()


def test_what_fp8_rows_change_in_the_result_is_small_but_not_nothing() -> None:
    """2^-4 of every element is the most; the clamp adds nothing, and errors of a row's elements average out."""
    batch, plain = SMALL.batch(200), SMALL.oracle()
    everything = SMALL.experts(dict.fromkeys(range(NUM_LAYERS), tuple(range(SMALL.num_experts))))
    fp8 = connect(spec_of(SMALL, dispatch_format="fp8", backend="local"), spread(SMALL, (8,)), [], everything)
    exact, rounded = (each.combine(each.dispatch(0, *batch)).float() for each in (plain, fp8))
    assert 0.001 < ((rounded - exact).norm() / exact.norm()).item() < 2**-4
