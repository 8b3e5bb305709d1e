"""The ports that clients know: taken early, by one ingress alone or by all ingresses of the cluster on this node."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

import psutil

from moeray.ingress.errors import PortInUse


def bind(host: str, port: int, key: str, *, shared: bool = False) -> socket.socket:
    """A listening address, taken now.

    Args:
        shared: other ingresses of this cluster may listen there, too; the kernel spreads connections over them. They
            are the processes that have the same parent, Ray's node process. The address is taken and not yet listened
            on: a client's connection must go to an ingress that is ready.
    Raises:
        PortInUse: with the configuration key that sets the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        if shared:
            # The kernel lets any process of this user in that asks for it, as every gRPC server does by default.
            if (strangers := _strangers(port)) and port:
                raise PortInUse(key, host, port, f"used by {', '.join(strangers)}, which is no ingress of this cluster")
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        if not shared:
            listener.listen(2048)
    except PortInUse:
        listener.close()
        raise
    except OSError as error:
        listener.close()
        raise PortInUse(key, host, port, error.strerror or str(error)) from error
    return listener


def free_ports(host: str, count: int) -> list[int]:
    """Ports that nothing listens on, to be bound later, perhaps by another process.

    They are below those that the kernel gives to outgoing connections (`ip_local_port_range`), or one of these would
    take them meanwhile: a start takes a minute and opens hundreds.

    Raises:
        OSError: there are not that many.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    # Ray's workers have 10002 to 19999.
    below = range(20_000 if first_of_connections > 21_000 else first_of_connections // 2, first_of_connections)
    found: list[int] = []
    for port in random.SystemRandom().sample(below, len(below)):
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"{len(found)} free ports on {host} in {below[0]} to {below[-1]}, {count} wanted")


def _strangers(port: int) -> list[str]:
    """Who listens on this port and is neither this process nor one with the same parent.

    Only processes of this user can be seen, and only with those the kernel would share a port.
    """
    found = []
    for connection in psutil.net_connections("tcp"):
        pid = connection.pid
        address = connection.laddr
        if connection.status != psutil.CONN_LISTEN or not address or address.port != port or pid in (None, os.getpid()):
            continue
        try:
            other = psutil.Process(pid)
            if other.ppid() != os.getppid():
                found.append(f"{other.name()} (pid {pid})")
        except psutil.NoSuchProcess:
            continue
    return found
