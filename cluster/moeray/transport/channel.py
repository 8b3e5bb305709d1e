"""Between processes of one node: rows in shared memory (see arena.py), an AF_UNIX socket as doorbell and death notice.

A call is one 32-byte message that says where the message and its reply lie; an answer is one of 8 bytes. No row passes
through the kernel, nothing is copied but by the ends themselves, and the end of a process is an end-of-file at once.
The system calls order memory for both ends, on any architecture.

The socket's address is abstract: it exists in the network namespace and not in a file system. Containers of a pod share
it without a shared volume; processes that do not share it (other pods, other nodes) cannot connect and use the remote
backend. Each end asks the kernel for the other's user (SO_PEERCRED), and the shard proves by a token, told over the
handshake's connection, that it is the one that was expected.

How a wait ends is a choice of the placement: an end with cores of its own may poll for a while before it sleeps, which
saves the wake-up and keeps its caches warm; on a shared core it must not. Measured on two cores: a round trip takes 33
us with the shard polling and 50 without; between the layers of a small model, a group that slept answers 0.1 ms later.
"""

from __future__ import annotations

import os
import secrets
import select
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, perf_counter

import torch
from torch import Tensor

from moeray.config import ChannelUsers
from moeray.transport.arena import Arena
from moeray.transport.communicator import NOBODY, Last, LinkBroken, Message
from moeray.transport.errors import no_answer

CALL = struct.Struct("=4q")  # offset and bytes of the message and of the reply's room
ANSWER = struct.Struct("=q")  # bytes of the reply
CREDENTIALS = struct.Struct("=3i")  # struct ucred: pid, uid, gid
IDLE_SPIN_S = 4e-3
"""Longer than a shard takes from one layer of a small model to the next, and not much."""
FIRST_WORD_S = 1.0
"""A shard sends it before it says that it comes."""
MAX_TOKEN_BYTES = 64
CLOSED = "connection closed by peer"


class ChannelFlight:
    """See `Flight`."""

    def __init__(self, channels: Channels, pending: set[int]) -> None:
        self._channels = channels
        self._pending = pending

    def wait(self, timeout_s: float | None) -> Last:
        return self._channels.wait(self._pending, timeout_s)

    def abandon(self) -> None:
        """Nothing to end: an answer that comes late wakes nobody."""


class Channels:
    """The shard's end to all groups of its node; see `Communicator`."""

    bucketed = False
    device = torch.device("cpu")

    def __init__(self, connections: dict[int, socket.socket], arena: Arena, spin_s: float) -> None:
        """Take the connections over.

        Args:
            connections: by rank, greeted: see `open_channel` and `share_arena`.
            arena: every message lies in it.
            spin_s: how long a wait may keep its core busy.
        """
        self._connections = connections
        self._arena = arena
        self._spin_s = spin_s
        self._rank_of = {connection.fileno(): rank for rank, connection in connections.items()}
        self._poll = select.poll()
        for connection in connections.values():
            self._poll.register(connection, select.POLLIN)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> ChannelFlight:
        """One call to every rank in `receives`.

        Args:
            sends: one message to each rank.
            receives: room for one reply of each rank, in the same order.
        """
        offset_of = self._arena.offset_of
        for (message, rank), (reply, _) in zip(sends, receives, strict=True):
            call = CALL.pack(offset_of(message), message.nbytes, offset_of(reply), reply.nbytes)
            try:
                # One call is outstanding at most, so its 32 bytes always fit into the socket's buffer.
                self._connections[rank].send(call, socket.MSG_DONTWAIT)
            except OSError as error:
                raise LinkBroken(rank, _reason(error)) from None
        return ChannelFlight(self, {rank for _, rank in receives})

    def wait(self, pending: set[int], timeout_s: float | None) -> Last:
        """Until every rank of `pending`, which is emptied, has answered; the end of any connection ends it."""
        started = perf_counter()
        last, alone_since, is_one_of_many = -1, 0.0, len(pending) > 1
        spin_until = started + self._spin_s
        deadline = None if timeout_s is None else started + timeout_s
        while pending:
            now = perf_counter()
            if now < spin_until:
                left_ms = 0.0
            elif deadline is None:
                left_ms = -1.0
            elif now < deadline:
                left_ms = 1e3 * (deadline - now)
            else:
                raise LinkBroken(min(pending), no_answer(timeout_s))
            events = self._poll.poll(left_ms)
            if not events:
                os.sched_yield()  # the relay may share this core
            for descriptor, _ in events:
                pending.discard(self._answer_of(self._rank_of[descriptor]))
            if is_one_of_many and last < 0 and len(pending) == 1:
                (last,), alone_since = pending, perf_counter()
        return NOBODY if last < 0 else Last(last, perf_counter() - alone_since)

    def _answer_of(self, rank: int) -> int:
        try:
            answer = self._connections[rank].recv(ANSWER.size)
        except OSError as error:
            raise LinkBroken(rank, _reason(error)) from None
        if len(answer) != ANSWER.size:
            raise LinkBroken(rank, CLOSED)
        return rank

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections = {}
        self._arena.close()


class GroupChannel:
    """A group's end: the block, the rows and the reply are views of the shard's arena. See `session.GroupLink`."""

    device = torch.device("cpu")

    def __init__(self, connection: socket.socket, arena: Arena, may_poll: Callable[[], bool] = lambda: False) -> None:
        """Take both over.

        Args:
            may_poll: whether to wait for the next call awake, for IDLE_SPIN_S at most.
        """
        self._connection = connection
        self._arena = arena
        self._may_poll = may_poll
        self._reply_at = self._reply_bytes = 0

    def next_block(self, reply: Tensor | None) -> Tensor:
        try:
            if reply is not None:
                self._connection.send(ANSWER.pack(reply.nbytes))
            call = self._next_call()
        except OSError as error:
            raise LinkBroken(0, _reason(error)) from None
        if not call:
            raise LinkBroken(0, CLOSED)
        if len(call) != CALL.size:
            raise ValueError(f"a call of {len(call)} bytes; {CALL.size} is legal")
        offset, num_bytes, self._reply_at, self._reply_bytes = CALL.unpack(call)
        return self._arena.view(offset, num_bytes)

    def _next_call(self) -> bytes:
        if self._may_poll():
            until = perf_counter() + IDLE_SPIN_S
            while perf_counter() < until:
                try:
                    return self._connection.recv(CALL.size, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    os.sched_yield()
        return self._connection.recv(CALL.size)

    def payload(self, num_bytes: int) -> Tensor:
        raise ValueError(f"a second message of {num_bytes} bytes by channel")

    def reply(self, num_bytes: int) -> Tensor:
        if num_bytes > self._reply_bytes:
            raise ValueError(f"a reply of {num_bytes} bytes, room for {self._reply_bytes}")
        return self._arena.view(self._reply_at, num_bytes)

    def close(self) -> None:
        self._connection.close()
        self._arena.close()


class ChannelListener:
    """Where one shard can reach a group on its node, for as long as their handshake takes."""

    def __init__(self, users: ChannelUsers) -> None:
        """Raises OSError: no descriptor left."""
        self._users = users
        self._name = f"moeray-{secrets.token_hex(16)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self._name}")
        self._socket.listen(4)

    @property
    def name(self) -> str:
        """For the hello."""
        return self._name

    def accept(self, token: str, timeout_s: float, may_poll: Callable[[], bool] = lambda: False) -> GroupChannel:
        """The shard that has said it would come; strangers are sent away.

        Args:
            token: what it sends with its arena; any local process may find the listener, nobody else knows this.
            may_poll: see `GroupChannel`.
        Raises:
            TimeoutError: it did not come.
            OSError, ValueError: its arena cannot be used.
        """
        deadline = monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.001, deadline - monotonic()))
            connection, _ = self._socket.accept()
            descriptor = self._arena_of(connection, token)
            if descriptor is not None:
                break
            connection.close()
        try:
            arena = Arena.join(descriptor)
        except BaseException:
            connection.close()
            raise
        connection.settimeout(None)
        return GroupChannel(connection, arena, may_poll)

    def _arena_of(self, connection: socket.socket, token: str) -> int | None:
        """The arena that came with the token; None from a stranger, whose silence costs FIRST_WORD_S."""
        if self._users != "any_user" and user_of(connection) != os.geteuid():
            return None
        connection.settimeout(FIRST_WORD_S)
        descriptors: list[int] = []
        with suppress(OSError):
            word, descriptors, _, _ = socket.recv_fds(connection, MAX_TOKEN_BYTES, 1)
            if descriptors and secrets.compare_digest(word, token.encode()):
                return descriptors[0]
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def close(self) -> None:
        self._socket.close()


def open_channel(name: str, users: ChannelUsers) -> socket.socket | None:
    """Reach a group's listener; None where it is not of this network namespace, or not of a user we talk to.

    Args:
        name: from the group's hello; "" if it offers none.
    """
    if not name or users == "off":
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with suppress(OSError):
        connection.connect(f"\0{name}")
        if users == "any_user" or user_of(connection) == os.geteuid():
            return connection
    connection.close()
    return None


def share_arena(connection: socket.socket, arena: Arena, token: str) -> None:
    """The shard's first word on a new channel.

    Args:
        token: that it also sends over the handshake's connection, so that the group knows whose channel this is.
    Raises:
        OSError: the group is gone.
    """
    socket.send_fds(connection, [token.encode()], [arena.descriptor])


def user_of(connection: socket.socket) -> int:
    """The user id of the process at the other end, from the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(credentials)[1])


def _reason(error: OSError) -> str:
    if isinstance(error, (BrokenPipeError, ConnectionResetError)):
        return CLOSED
    return str(error) or type(error).__name__
