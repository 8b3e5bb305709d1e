"""Sockets of other processes, taken hold of while they run: cut for both ends, or deaf without either end knowing."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from contextlib import closing

import psutil

_PIDFD_GETFD = 438  # x86-64 and arm64 alike
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_libc = ctypes.CDLL(None, use_errno=True)


def take(pid: int, descriptor: int) -> socket.socket:
    """A duplicate of a descriptor of another process; both name one socket.

    Raises:
        OSError: not permitted, or it is gone.
    """
    process = os.pidfd_open(pid)
    try:
        duplicate = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if duplicate < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd({pid}, {descriptor}): {os.strerror(number)}")
    return socket.socket(fileno=duplicate)


def cut(pid: int, descriptor: int) -> None:
    """Shut both directions: each end reads end-of-file."""
    with closing(take(pid, descriptor)) as taken:
        taken.shutdown(socket.SHUT_RDWR)


def deafen(pid: int, descriptor: int) -> None:
    """Let the kernel drop all that arrives (a filter that accepts nothing): to its peer the link is dead and silent."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF_RET with length 0
    program = struct.pack("HL", 1, ctypes.addressof(drop_all))
    with closing(take(pid, descriptor)) as taken:
        taken.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def hear(pid: int, descriptor: int) -> None:
    """The end of `deafen`."""
    with closing(take(pid, descriptor)) as taken:
        taken.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def listeners(pid: int) -> list[int]:
    """Descriptors of its TCP ports. One that is deaf takes no new connection; those that it has taken go on."""
    connections = psutil.Process(pid).net_connections("tcp")
    return sorted(each.fd for each in connections if each.status == psutil.CONN_LISTEN)


def connections_to(pid: int, server_pid: int) -> list[int]:
    """Descriptors of `pid`'s TCP connections to a port on which `server_pid` listens."""
    ports = {
        each.laddr.port
        for each in psutil.Process(server_pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }
    return sorted(
        each.fd
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED and each.raddr.port in ports
    )


def connections_between(pid: int, server_pid: int) -> list[tuple[int, int]]:
    """(pid, descriptor) of every TCP connection from `pid` to `server_pid`, both ends."""
    near = connections_to(pid, server_pid)
    own = {each.laddr.port for each in psutil.Process(pid).net_connections("tcp") if each.fd in near}
    far = [
        (server_pid, each.fd)
        for each in psutil.Process(server_pid).net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED and each.raddr and each.raddr.port in own
    ]
    return [(pid, descriptor) for descriptor in near] + far


def doorbells(pid: int) -> list[int]:
    """Descriptors of `pid`'s connected AF_UNIX packet sockets, which moeray's channels are (type 5, SEQPACKET)."""
    packet = {
        line.split()[6]
        for line in open(f"/proc/{pid}/net/unix").read().splitlines()[1:]  # noqa: SIM115, PTH123
        if line.split()[4] == "0005" and line.split()[5] == "03"
    }
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
        except OSError:
            continue
        if target.startswith("socket:[") and target[8:-1] in packet:
            found.append(int(name))
    return sorted(found)
