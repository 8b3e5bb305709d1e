"""Two nodes in one machine: network namespaces with a link between them that can be slow, lossy, or cut.

Nothing of the machine's own network is touched: the namespaces are new, belong to two child processes, and vanish with
them. Needs root (CAP_SYS_ADMIN), iproute2 and util-linux.

A link without delay or loss is a veth pair. Otherwise it is a veth pair under `tc netem` where the kernel has it; else
two TUN devices and a process between them that holds packets back and drops some (`forward`). That process adds some
tens of microseconds per packet of its own, so what runs over a link is compared with a plain TCP exchange over the
same link, never with a number from elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

DEVICE = "wire"
TUN = Path("/dev/net/tun")
CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PR_SET_TIMERSLACK = 29
MAX_PACKET = 65536
START_TIMEOUT_S = 20.0

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Link:
    """One way: each direction is delayed by `delay_ms` and loses `loss_percent` of its packets."""

    delay_ms: float = 0.0
    loss_percent: float = 0.0
    forwarded: bool = False  # through `forward` even without delay: what that process costs

    @property
    def plain(self) -> bool:
        return not (self.delay_ms or self.loss_percent or self.forwarded)


@dataclass(frozen=True)
class Node:
    """A network namespace, named by a process that lives in it."""

    pid: int
    host: str

    @property
    def namespace(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")

    def enter(self) -> None:
        """The calling thread, and the threads and processes that it starts from now on, are on this node.

        Raises:
            OSError: the node is gone, or this process may not.
        """
        enter(self.namespace)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is on this node for a while."""
        with Path("/proc/thread-self/ns/net").open("rb") as before:
            self.enter()
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there; its failure is the caller's to look at."""
        return subprocess.run(
            ["nsenter", f"--net={self.namespace}", *command], capture_output=True, text=True, check=False
        )

    def must(self, *command: str) -> None:
        """Run a command there.

        Raises:
            OSError: it failed; says what it said.
        """
        done = self.run(*command)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass(frozen=True)
class TwoNodes:
    """`how` is the link's kind: veth, netem or forwarded."""

    a: Node
    b: Node
    how: str

    def cut(self) -> None:
        """Take the link away without a word to anybody who uses it."""
        for node in (self.a, self.b):
            node.must("ip", "link", "set", DEVICE, "down")


def missing() -> str | None:
    """Why there can be no two nodes here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"the program {program} is missing"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "this process may not make network namespaces"
    return None


def link_missing(link: Link) -> str | None:
    """Why there can be no such link here; None if there can."""
    if link.plain or (TUN.exists() and os.access(TUN, os.R_OK | os.W_OK)):
        return None
    return f"{TUN} is missing and tc netem may be" if not _has_netem() else None


@contextlib.contextmanager
def two_nodes(link: Link) -> Iterator[TwoNodes]:
    """Both nodes, linked, for as long as the context lasts.

    Raises:
        OSError: one of the steps failed; says which.
    """
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(_namespace(host)) for host in ("10.77.0.1", "10.77.0.2"))
        how = "veth" if link.plain else "netem" if _has_netem() and not link.forwarded else "forwarded"
        if how == "forwarded":
            stack.enter_context(_forwarding(a, b, link))
        else:
            a.must("ip", "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", str(b.pid))
        for node in (a, b):
            node.must("ip", "addr", "add", f"{node.host}/24", "dev", DEVICE)
            node.must("ip", "link", "set", "lo", "up")
            node.must("ip", "link", "set", DEVICE, "up")
            if how == "netem":
                node.must("tc", "qdisc", "add", "dev", DEVICE, "root", "netem", *_netem(link))
        yield TwoNodes(a, b, how)


def enter(namespace: Path) -> None:
    """Move the calling thread into a network namespace."""
    with namespace.open("rb") as file:
        _set_namespace(file.fileno())


def _set_namespace(descriptor: int) -> None:
    if _libc.setns(descriptor, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


@contextlib.contextmanager
def _namespace(host: str) -> Iterator[Node]:
    """Held by a `cat` that ends with its input, so with this process."""
    ours = Path("/proc/self/ns/net").readlink()
    with subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) as holder:
        node = Node(holder.pid, host)
        deadline = monotonic() + START_TIMEOUT_S
        while node.namespace.readlink() == ours:
            if holder.poll() is not None or monotonic() > deadline:
                raise OSError("unshare made no network namespace")
            sleep(0.005)
        try:
            yield node
        finally:
            holder.kill()


def _netem(link: Link) -> list[str]:
    delay = ["delay", f"{link.delay_ms}ms"] if link.delay_ms else []
    return delay + (["loss", f"{link.loss_percent}%"] if link.loss_percent else [])


def _has_netem() -> bool:
    if shutil.which("tc") is None:
        return False
    command = ["unshare", "--net", "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# ---- a slow and lossy wire, where the kernel has none


@contextlib.contextmanager
def _forwarding(a: Node, b: Node, link: Link) -> Iterator[None]:
    arguments = [str(a.pid), str(b.pid), str(link.delay_ms / 1e3), str(link.loss_percent / 100)]
    command = [sys.executable, "-S", "-E", str(Path(__file__).resolve()), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as forwarder:
        try:
            assert forwarder.stdout is not None
            if not forwarder.stdout.readline():
                raise OSError("the link's process did not start")
            yield
        finally:
            forwarder.kill()


def forward(pid_a: int, pid_b: int, delay_s: float, loss: float) -> None:
    """Carry packets between a device on each node until standard input ends."""
    _libc.prctl(PR_SET_TIMERSLACK, 1)
    ends = [_tun(Path(f"/proc/{pid}/ns/net")) for pid in (pid_a, pid_b)]
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    chance = random.Random(0)  # noqa: S311
    # One queue for both directions: the delay is the same, so what came first is due first.
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    print("ready", flush=True)
    while True:
        patience = max(0.0, on_the_way[0][0] - monotonic()) if on_the_way else None
        readable, _, _ = select.select([0, *ends], [], [], patience)
        if 0 in readable:
            return
        for end in readable:
            on_the_way.extend((monotonic() + delay_s, other[end], packet) for packet in _packets(end, loss, chance))
        while on_the_way and on_the_way[0][0] <= monotonic():
            _, end, packet = on_the_way.popleft()
            with contextlib.suppress(OSError):  # a device that is down takes no packet: it is lost
                os.write(end, packet)


def _packets(end: int, loss: float, chance: random.Random) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # none left, or the device is down
        while True:
            packet = os.read(end, MAX_PACKET)
            if chance.random() >= loss:
                yield packet


def _tun(namespace: Path) -> int:
    enter(namespace)
    end = os.open(TUN, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return end


if __name__ == "__main__":
    forward(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
